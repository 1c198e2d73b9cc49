"""Taking recordings apart, comparing them, and adding them up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import profiles

from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.profiles import add_profiles, compare_profiles, scenarios
from eplb.profiles.summary import drift

KINDS = 3


def recording(windows=30, seed=0, **more):
    """Windows of three kinds of traffic in turn, each with some noise."""
    rng = np.random.default_rng(seed)
    kinds = rng.lognormal(3, 1, (KINDS, 2, 16))
    counts = rng.poisson(kinds[np.arange(windows) % KINDS] * rng.uniform(5, 50, (windows, 1, 1)))
    return LoadProfile.from_counts(counts, source="day.npz", **more)


def test_clusters_are_the_kinds_of_traffic():
    cluster_W = scenarios.cluster_windows(recording().counts_WLE, KINDS)
    for kind in range(KINDS):
        assert len(set(cluster_W[kind::KINDS].tolist())) == 1
    assert set(cluster_W.tolist()) == {0, 1, 2}


@given(profiles(), st.integers(1, 4), st.integers(0, 9))
def test_clusters_fill_and_the_largest_comes_first(profile, number, seed):
    number = min(number, profile.num_windows)
    cluster_W = scenarios.cluster_windows(profile.counts_WLE, number, seed)
    sizes = np.bincount(cluster_W, minlength=number)
    assert len(sizes) == number
    assert (sizes > 0).all()
    assert (np.diff(sizes) <= 0).all()
    again = scenarios.cluster_windows(profile.counts_WLE, number, seed)
    assert np.array_equal(cluster_W, again)


@given(profiles(), st.integers(1, 4))
def test_representatives_stand_for_all(profile, number):
    number = min(number, profile.num_windows)
    found = scenarios.representatives(profile.counts_WLE, number)
    assert len(set(found.windows)) == number
    assert sorted(found.windows) == list(found.windows)
    assert sum(found.share) == pytest.approx(1)
    assert 0 <= found.drift_mean <= found.drift_worst <= 1
    everybody = scenarios.representatives(profile.counts_WLE, profile.num_windows)
    assert everybody.windows == tuple(range(profile.num_windows))
    assert everybody.drift_worst == 0


def test_the_best_window_stands_for_a_cluster():
    counts = recording(windows=9).counts_WLE[::KINDS]
    found = scenarios.representatives(counts, 1)
    drift_WW = np.array([[drift(a, b) for b in counts] for a in counts])
    assert found.drift_mean == pytest.approx(drift_WW[:, found.windows[0]].mean())


def test_split_by_phase_and_time():
    profile = recording(
        windows=4,
        phase=["prefill", "decode", "decode", "prefill"],
        time_s=[0, 5 * 3600, 7 * 3600, 86400 + 23.5 * 3600],
    )
    assert scenarios.split_by_phase(profile).scenario_W == profile.phase_W
    parts = scenarios.split_by_time(profile, 6)
    assert parts.scenario_W == ("00h-06h", "00h-06h", "06h-12h", "18h-24h")
    shifted = scenarios.split_by_time(profile, 6, utc_offset_hours=2)
    assert shifted.scenario_W == ("00h-06h", "06h-12h", "06h-12h", "00h-06h")
    named = replace(profile, scenario_W=("a", "b", "a", "b"))
    assert scenarios.split_by_phase(named).scenario_W[1] == "b/decode"


def test_what_cannot_be_split_is_one_line():
    profile = recording(windows=3)
    with pytest.raises(InvalidInput, match="has no time_s"):
        scenarios.split_by_time(profile, 6)
    timed = replace(profile, time_s_W=np.arange(3.0))
    with pytest.raises(InvalidInput, match="must divide 24"):
        scenarios.split_by_time(timed, 5)
    with pytest.raises(InvalidInput, match="within 1 and the 3 windows"):
        scenarios.split_by_cluster(profile, 4)


def test_kept_windows_are_told_with_their_shares():
    profile = scenarios.split_by_cluster(recording(), KINDS)
    kept, chosen = scenarios.keep_representatives(profile, 2)
    assert kept.num_windows == 2 * KINDS
    assert set(chosen) == set(profile.scenarios)
    for name, some in chosen.items():
        for window in some.windows:
            assert profile.scenario_W[window] == name
            assert (profile.counts_WLE[window] == kept.counts_WLE).all(axis=(1, 2)).any()
    assert kept.metadata["stand_for"] == {n: list(s.share) for n, s in chosen.items()}


def test_layers_tell_which_experts_gained():
    old = LoadProfile.from_counts([[[4.0, 4, 2]], [[8, 8, 4]]])
    new = LoadProfile.from_counts([[[2.0, 4, 4]]])
    (layer,) = compare_profiles(old, new)
    assert layer.drift == pytest.approx(0.2)
    assert [expert for expert, _ in layer.gained] == [2]
    assert [expert for expert, _ in layer.lost] == [0]
    assert layer.gained[0][1] == pytest.approx(0.2)


@given(profiles())
def test_a_recording_does_not_drift_from_itself(profile):
    assert all(layer.drift == pytest.approx(0) for layer in compare_profiles(profile, profile))


def test_ranks_add_up_window_by_window():
    first, second = recording(seed=1, tokens=np.ones(30)), recording(seed=2, tokens=np.ones(30))
    added = add_profiles([first, second])
    assert np.array_equal(added.counts_WLE, first.counts_WLE + second.counts_WLE)
    assert added.tokens_W.tolist() == [2] * 30
    with pytest.raises(InvalidInput, match="29 and 30 windows"):
        add_profiles([first, second.windows(1, None)])
    with pytest.raises(InvalidInput, match="give profiles of one model"):
        add_profiles([first, LoadProfile.from_counts(np.ones((30, 2, 8)))])
