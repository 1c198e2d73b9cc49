"""The example of the layer, on two gloo processes: it plans for what it served."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "serve_layer.py"


def test_the_plan_balances_and_changes_no_output():
    pytest.importorskip("torch")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         EXAMPLE],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found = re.search(
        r"rows ([\d.]+) -> ([\d.]+), swapped in (\d+) .* off by ([-e\d.]+)", result.stdout
    )
    before, after, steps, off = map(float, found.groups())
    assert before > 1.1 > after
    assert steps > 1
    assert off < 1e-5
