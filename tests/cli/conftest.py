"""Running the command line in this process, and loads for it to read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from eplb.cli.main import main


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run ``eplb`` with arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        captured = capsys.readouterr()
        return Result(stop.value.code or 0, captured.out, captured.err)

    return call


@pytest.fixture
def loads(tmp_path):
    """A folder beside the current one, with two recordings of one small model."""
    folder = tmp_path.with_name(tmp_path.name + "-loads")
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("day", "night"):
        counts = rng.poisson(rng.lognormal(3, 1, (3, 16)), (6, 3, 16))
        counts[:, 0] = 0
        np.savez(folder / f"{name}.npz", counts=counts, extra=counts[0].astype(float))
    return folder


@pytest.fixture
def small():
    """Topology options that fit those recordings."""
    return ("--nodes", 2, "--ranks-per-node", 2, "--slots-per-rank", 5)
