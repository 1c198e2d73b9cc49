"""The example, small, on the CPU: a model is trained, recorded, and planned for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_record_plan.py"


def test_a_plan_made_from_a_recording_helps_on_other_text(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5")
    result = subprocess.run(
        [sys.executable, EXAMPLE, "--folder", tmp_path, "--json", tmp_path / "report.json"],
        capture_output=True, text=True, check=False, env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    for name in ("deepseek", "mixtral"):
        assert report[name]["loss_last"] < report[name]["loss_first"]
        imbalance = report[name]["imbalance"]
        assert set(imbalance) == {"all", "prose", "code", "tables", "names"}
        assert imbalance["all"]["after"] < imbalance["all"]["before"]
        assert (tmp_path / f"{name}.npz").exists()
