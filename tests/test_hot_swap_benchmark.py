"""The benchmark of hot swaps runs, at sizes that show nothing but that."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import hot_swap_tables
from hot_swap_ranks import BUDGETS_BYTES_PER_S, TINY

ROOT = Path(__file__).resolve().parents[1]


def test_a_small_run(tmp_path, monkeypatch):
    report = tmp_path / "report.json"
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "hot_swap.py", "--tiny", "-o", report],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    results = json.loads(report.read_text())["results"]
    assert results["exit_codes"] == [0, 0]
    assert results["random_swaps"]["swaps"] == TINY.random_swaps
    assert results["random_swaps"]["tokens_lost"] == 0
    assert len(results["swaps"]) == len(TINY.tokens) * len(BUDGETS_BYTES_PER_S)
    assert all({"idle", "switched"} <= set(row["stages"]) for row in results["swaps"])
    [death] = results["deaths"]
    assert death["exit_codes"] == [0, -signal.SIGKILL]
    assert [survivor["dead"] for survivor in death["survivors"]] == [[1]]
    # The documents' tables can be made of it.
    monkeypatch.setattr(hot_swap_tables, "RESULTS", report)
    assert all(table() for table in hot_swap_tables.HOT_SWAP_TABLES.values())
