"""A plan of part of a recording, and its report."""

from __future__ import annotations

import json
import re

import pytest


@pytest.fixture
def planned(run, loads, small):
    """A folder with ``plan.yaml``, which leaves the last third of day.npz out."""
    result = run("plan", loads / "day.npz", *small, "--holdout", "33%", "-o", "plan.yaml")
    assert result.code == 0, result.err
    return loads


@pytest.fixture
def report(run, planned, tmp_path):
    """Write a report of that plan and return its text and its pictures."""

    def call(*args):
        result = run("report", "plan.yaml", *args, "-o", "report.html")
        assert (result.code, result.err) == (0, "")
        text = (tmp_path / "report.html").read_text()
        (data,) = re.findall(r'id="data-pictures">(.*?)</script>', text)
        return text, {key: value["option"] for key, value in json.loads(data).items()}

    return call
