"""What `eplb profile show` says of loads, and the built-in sample."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from strategies import profiles

from eplb.load_profile import LoadProfile
from eplb.profiles import sample_profile, sample_routings, summarise
from eplb.profiles.summary import drift

ROOT = Path(__file__).resolve().parents[2]


def test_drift_is_the_part_of_the_load_that_moved():
    before = np.array([[4.0, 0, 0], [1, 1, 2]])
    assert drift(before, before * 7) == 0
    assert drift(before, np.array([[0.0, 2, 2], [1, 1, 2]])) == 0.5
    assert drift(before, np.array([[3.0, 1, 0], [2, 1, 1]])) == pytest.approx(0.25)
    assert drift(before, np.zeros((2, 3))) == 0


@given(profiles())
def test_figures_equal_their_definitions(profile):
    summary = summarise(profile)
    json.dumps(summary.to_dict(), allow_nan=False)
    for layer, load_E in zip(summary.layers, profile.mean_load_LE(), strict=True):
        part = load_E / load_E.sum()
        assert layer.max_over_mean == pytest.approx(part.max() / part.mean())
        assert layer.idle_experts == sum(p == 0 for p in part)
        expected = sorted(part, reverse=True)[: len(layer.hottest)]
        assert [p for _, p in layer.hottest] == pytest.approx(expected)
        assert all(part[e] == pytest.approx(p) for e, p in layer.hottest)
        tenth = max(1, round(len(part) / 10))
        assert layer.top_10_percent == pytest.approx(sum(sorted(part)[-tenth:]))
    assert sum(summary.windows_of_scenario.values()) == profile.num_windows
    assert 0 <= summary.window_drift <= 1


def test_scenarios_are_compared_pairwise():
    counts = [[[1, 0]], [[0, 1]], [[1, 1]]]
    summary = summarise(LoadProfile.from_counts(counts, scenario=["a", "b", "c"]))
    assert summary.scenario_drift == {("a", "b"): 1.0, ("a", "c"): 0.5, ("b", "c"): 0.5}
    assert summary.window_drift == 0.75


def test_sample():
    profile, routings = sample_profile(), sample_routings()
    assert profile.counts_WLE.shape == (96, 8, 256)
    assert (profile.counts_WLE.sum(axis=2) == 8 * 20480).all()
    assert profile.metadata["model"] == "moe-lm-256"
    assert routings.shape == (2816, 8, 8)
    assert all(len(set(row)) == 8 for row in routings[:50].reshape(-1, 8).tolist())
    assert (ROOT / "profiles" / "data" / "sample.npz").stat().st_size <= 1_000_000


def test_sample_is_what_the_script_makes(shared_data, tmp_path):
    spec = importlib.util.spec_from_file_location("make_sample", ROOT / "tools" / "make_sample.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(shared_data / "moe_lm_256", tmp_path / "sample.npz")
    shipped = ROOT / "profiles" / "data" / "sample.npz"
    with np.load(tmp_path / "sample.npz") as made, np.load(shipped) as kept:
        assert sorted(made) == sorted(kept)
        assert all(np.array_equal(made[name], kept[name]) for name in made)
