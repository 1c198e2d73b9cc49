"""Which windows are fitted: recorded, represented, extrapolated and mixed ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import profiles

from eplb.load_profile import LoadProfile
from eplb.placement.windows import (
    ADDED_WEIGHT,
    EXTRAPOLATION,
    MAX_WINDOWS,
    MIN_STEPS,
    fit_windows,
    scaled_windows,
    window_weights,
)


def steps(num_windows, num_layers=2, num_experts=12, seed=0):
    """Steps that are mixes of three kinds of traffic, sampled."""
    random = np.random.default_rng(seed)
    kind_FLE = random.dirichlet(np.full(num_experts, 0.3), (3, num_layers))
    mix_WF = random.dirichlet(np.ones(3), num_windows)
    return LoadProfile.from_counts(random.poisson(3000 * np.tensordot(mix_WF, kind_FLE, axes=1)))


@given(profiles(max_windows=8), st.integers(1, 16), st.booleans())
def test_every_fitted_window_has_a_mean_rank_load_of_1_and_weights_add_up(
    profile, num_ranks, extend
):
    fitted = fit_windows(profile, num_ranks, extend=extend, seed=0)
    load_WLE = fitted.load_WLE
    assert load_WLE.min() >= 0
    total_WL = load_WLE.sum(axis=2)
    loaded_WL = load_WLE.any(axis=2)
    assert total_WL[loaded_WL] == pytest.approx(num_ranks, rel=1e-9)
    assert fitted.weight_WL.sum() == pytest.approx(1, rel=1e-12)
    assert (fitted.weight_WL >= 0).all()
    assert not fitted.weight_WL[~loaded_WL].any()
    recorded_WLE = scaled_windows(profile, num_ranks)
    assert np.array_equal(load_WLE[: len(fitted.kept)], recorded_WLE[fitted.kept])
    if not extend:
        assert np.array_equal(load_WLE, recorded_WLE)
        assert fitted.weight_WL == pytest.approx(window_weights(recorded_WLE), rel=1e-12)
    assert fitted.notes == {
        "windows_recorded": profile.num_windows,
        "windows_kept": profile.num_windows,
        "windows_added": len(load_WLE) - profile.num_windows,
    }


def test_scenarios_are_pushed_away_from_each_other():
    profile = LoadProfile.from_counts([[[8, 4, 0, 0]], [[0, 4, 8, 0]]])
    fitted = fit_windows(profile, 3, extend=True, seed=0)
    x, y = scaled_windows(profile, 3)[:, 0]
    pushed = np.maximum(x + EXTRAPOLATION * (x - y), 0)
    assert fitted.load_WLE[2, 0] == pytest.approx(pushed * 3 / pushed.sum())
    assert len(fitted.load_WLE) == 4
    assert fitted.weight_WL[2:].sum() == pytest.approx(ADDED_WEIGHT)


def test_windows_of_a_scenario_are_one_to_extrapolate():
    counts = np.random.default_rng(0).integers(1, 99, (6, 1, 5))
    profile = LoadProfile.from_counts(counts, scenario=list("aabbbb"))
    assert fit_windows(profile, 2, extend=True, seed=0).notes["windows_added"] == 2


def test_one_window_is_all_there_is_to_fit():
    fitted = fit_windows(LoadProfile.from_counts(np.ones((2, 4))), 2, extend=True, seed=0)
    assert fitted.notes == {"windows_recorded": 1, "windows_kept": 1, "windows_added": 0}


def test_a_layer_without_load_in_one_of_two_windows_is_not_extrapolated():
    counts = np.ones((2, 2, 4))
    counts[0, 1] = 0
    fitted = fit_windows(LoadProfile.from_counts(counts), 2, extend=True, seed=0)
    assert fitted.load_WLE[2:, 0].any(axis=1).all()
    assert not fitted.load_WLE[2:, 1].any()


def test_mixes_are_those_of_a_seed_and_hold_what_can_come():
    profile = steps(60)
    first, again = (fit_windows(profile, 4, extend=True, seed=7) for _ in range(2))
    assert np.array_equal(first.load_WLE, again.load_WLE)
    other = fit_windows(profile, 4, extend=True, seed=8)
    assert not np.array_equal(first.load_WLE, other.load_WLE)
    # What no window ever had, no mix has more of than a sliver.
    added_WLE = first.load_WLE[60:]
    assert len(added_WLE) == first.notes["windows_added"] > 0
    largest_LE = first.load_WLE[:60].max(axis=0)
    assert (added_WLE.max(axis=0) < 3 * largest_LE + 0.1).all()


def test_mixes_are_more_extreme_than_what_was_recorded():
    """Kinds of traffic that were never seen alone are found, and shown nearly alone."""
    random = np.random.default_rng(1)
    kind_FE = random.dirichlet(np.full(40, 0.3), 3)
    part_WF = 0.2 + 0.4 * random.dirichlet(np.ones(3), 80)
    counts_WLE = random.poisson(20000 * part_WF @ kind_FE)[:, np.newaxis]
    fitted = fit_windows(LoadProfile.from_counts(counts_WLE), 1, extend=True, seed=0)
    part_of_kind = [
        np.linalg.lstsq(kind_FE.T, window_E, rcond=None)[0].max()
        for window_E in fitted.load_WLE[:, 0]
    ]
    assert max(part_of_kind[80:]) > max(part_of_kind[:80])


def test_without_time_there_are_mixes_all_the_same():
    profile = steps(60)
    hurried = fit_windows(profile, 4, extend=True, seed=7, time_limit_s=0.0)
    assert hurried.notes == fit_windows(profile, 4, extend=True, seed=7).notes
    assert hurried.load_WLE.sum(axis=2) == pytest.approx(4)


@settings(max_examples=10)
@given(st.integers(MAX_WINDOWS + 1, 400), st.integers(0, 5))
def test_windows_kept_stand_for_all(num_windows, seed):
    profile = steps(num_windows, 1, 6, seed)
    fitted = fit_windows(profile, 2, extend=False, seed=seed)
    kept = fitted.kept
    assert len(kept) == len(set(kept.tolist())) == MAX_WINDOWS
    assert fitted.weight_WL.sum() == pytest.approx(1)
    count_K = fitted.weight_WL[:, 0] * num_windows
    assert count_K == pytest.approx(count_K.round(), abs=1e-6)
    assert count_K.min() > 0.5
    assert fitted.notes["windows_kept"] == MAX_WINDOWS


def test_a_lone_window_is_kept():
    profile = steps(500)
    counts_WLE = profile.counts_WLE.copy()
    counts_WLE[321, :, 1:] = 0
    counts_WLE[321, :, 0] = 6000
    fitted = fit_windows(LoadProfile.from_counts(counts_WLE), 4, extend=False, seed=0)
    assert 321 in fitted.kept


def test_windows_that_are_alike_are_one():
    counts_WLE = np.repeat(steps(3).counts_WLE, 100, axis=0)
    fitted = fit_windows(LoadProfile.from_counts(counts_WLE), 4, extend=False, seed=0)
    assert fitted.notes["windows_kept"] == 3
    assert fitted.weight_WL.sum(axis=1) == pytest.approx(1 / 3)


@pytest.mark.parametrize("num_windows", [MIN_STEPS, 250])
def test_windows_that_are_all_alike_have_few_factors(num_windows):
    counts_WLE = np.repeat(steps(1).counts_WLE, num_windows, axis=0)
    fitted = fit_windows(LoadProfile.from_counts(counts_WLE), 4, extend=True, seed=0)
    assert np.isfinite(fitted.load_WLE).all()
    assert fitted.load_WLE == pytest.approx(np.broadcast_to(
        fitted.load_WLE[0], fitted.load_WLE.shape), rel=1e-6)  # fmt: skip
