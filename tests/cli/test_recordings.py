"""Commands on recordings: merge, drift, scenarios, watch, and all of them on a journal."""

import json

import numpy as np
import pytest

import eplb
from eplb.profiles.journal import Journal
from eplb.source import journal_path


@pytest.fixture
def going_on(tmp_path):
    """A recording in progress: three windows so far."""
    header = {"layer_ids": np.array([1, 2]), "metadata": np.array("{}")}
    journal = Journal(tmp_path / "live.npz", header)
    rng = np.random.default_rng(0)
    for number in range(3):
        journal.append(
            {
                "counts": rng.integers(1, 99, (2, 2, 16)),
                "phase": np.array(["prefill", "decode"]),
                "scenario": np.array(["default", "default"]),
                "steps": np.array([1, 1]),
                "time_s": np.full(2, 1.7e9 + 3600 * number),
                "tokens": np.array([20, 10]),
            }
        )
    yield "live.npz"
    journal.close()


def test_a_recording_in_progress_can_be_planned_for(run, going_on, small):
    assert "6 windows" in run("profile", "show", going_on).out
    assert run("plan", going_on, *small, "-o", "plan.yaml").code == 0
    assert run("evaluate", "plan.yaml", going_on).code == 0
    run("profile", "convert", going_on, "-o", "copy.npz")
    assert eplb.read_profile("copy.npz").num_windows == 6


def test_watch_prints_the_last_windows(run, going_on):
    result = run("profile", "watch", going_on, "--once")
    assert (result.code, result.err) == (0, "")
    assert "live.npz: recording, 6 windows" in result.out
    assert "5 prefill" in result.out
    run("profile", "convert", going_on, "-o", "copy.npz")
    assert "copy.npz: finished, 6 windows" in run("profile", "watch", "copy.npz").out


def test_watch_needs_a_recording(run, tmp_path):
    result = run("profile", "watch", "none.npz")
    assert (result.code, result.out) == (2, "")
    assert "nor is it being recorded" in result.err
    journal_path(tmp_path / "bad.npz").write_bytes(b"no journal at all")
    result = run("profile", "watch", "bad.npz")
    assert "is not a journal of a recording" in result.err


def test_merge_joins_and_adds(run, loads):
    run("profile", "merge", loads / "day.npz", loads / "night.npz", "-o", "both.npz")
    merged = eplb.read_profile("both.npz")
    assert merged.scenarios == ("day.npz", "night.npz")
    report = json.loads(
        run("profile", "merge", loads / "day.npz", loads / "night.npz", "--add", "-o", "sum.npz",
            "--windows", ":4", "--json").out
    )  # fmt: skip
    assert report["shape"] == [4, 2, 16]
    day, night = (eplb.read_profile(loads / f"{name}.npz") for name in ("day", "night"))
    added = eplb.read_profile("sum.npz").counts_WLE
    assert np.array_equal(added, (day.counts_WLE + night.counts_WLE)[:4])


def test_drift_tells_how_far_loads_moved(run, loads):
    same = json.loads(run("profile", "drift", loads / "day.npz", loads / "day.npz", "--json").out)
    assert same["drift"] == pytest.approx(0)
    words = ("profile", "drift", loads / "day.npz", loads / "night.npz")
    moved = json.loads(run(*words, "--json").out)
    assert set(moved["layers"]) == {"1", "2"}
    assert 0 < moved["drift"] <= moved["drift_worst_layer"] <= 1
    assert "of the load falls on other experts" in run(*words).out


@pytest.mark.parametrize("by", ["phase", "time", "cluster"])
def test_scenarios_are_written(run, going_on, by):
    words = ("profile", "scenarios", going_on, "--by", by, "--clusters", 2, "--hours", 1)
    report = json.loads(run(*words, "-o", "out.npz", "--json").out)
    expected = {"phase": 2, "time": 3, "cluster": 2}[by]
    assert len(report["scenarios"]) == expected
    assert eplb.read_profile("out.npz").scenarios == tuple(report["scenarios"])


def test_representatives_say_what_they_stand_for(run, going_on):
    words = ("profile", "scenarios", going_on, "--by", "phase", "--representatives", 2)
    report = json.loads(run(*words, "-o", "out.npz", "--json").out)
    assert report["shape"][0] == 4
    for some in report["representatives"].values():
        assert len(some["windows"]) == 2
        assert sum(some["share"]) == pytest.approx(1)
    kept = eplb.read_profile("out.npz")
    assert set(kept.metadata["stand_for"]) == {"prefill", "decode"}
    assert "stand for" in run(*words, "-o", "out.npz").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--by", "weather"), "unknown way to split 'weather'"),
        (("--by", "time", "--hours", "5"), "must divide 24"),
        (("--by", "cluster", "--clusters", "7"), "within 1 and the 6 windows"),
    ],
)
def test_scenarios_that_cannot_be_made(run, going_on, words, message, tmp_path):
    result = run("profile", "scenarios", going_on, *words, "-o", "out.npz")
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert not (tmp_path / "out.npz").exists()
