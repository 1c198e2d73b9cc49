"""What pictures are made of: shrinking, drift, JSON numbers, scales."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import eplb
from eplb.cli.report.loads import buckets_of, chance_drift, drift_from, mean_where
from eplb.cli.report.maps import half_span
from eplb.cli.report.options import numbers
from eplb.cli.report.window_sections import shaded
from eplb.profiles.summary import drift

finite_or_nan = st.floats(-1e6, 1e6) | st.just(np.nan)


@given(
    arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 60)), elements=finite_or_nan),
    st.integers(1, 20),
)
def test_shrinking_keeps_the_largest_and_covers_all(values, most):
    shrunk, ranges = buckets_of(values, most)
    assert len(ranges) == shrunk.shape[1] <= max(most, 1)
    assert [a for a, _ in ranges] == [0, *(b + 1 for _, b in ranges[:-1])]
    assert ranges[-1][1] == values.shape[1] - 1
    for (a, b), column in zip(ranges, shrunk.T, strict=True):
        for row, value in zip(values[:, a : b + 1], column, strict=True):
            known = row[~np.isnan(row)]
            assert np.isnan(value) if len(known) == 0 else value == known.max()


@given(arrays(np.float64, st.integers(1, 30), elements=finite_or_nan))
def test_numbers_are_json(values):
    read = json.loads(json.dumps(numbers(values), allow_nan=False))
    for before, after in zip(values, read, strict=True):
        assert (after is None) if np.isnan(before) else after == pytest.approx(before, abs=6e-5)


@given(arrays(bool, st.integers(1, 40)))
def test_shaded_stretches_are_the_chosen_windows(chosen_W):
    last = len(chosen_W) - 1
    found = np.zeros(len(chosen_W), bool)
    for a, b in shaded(chosen_W):
        found[int(a) : int(b) + (b == last)] = True
    # A stretch ends where the next window begins; the last window has none.
    assert (found == chosen_W)[:last].all()


def test_drift_is_that_of_the_summary():
    counts = np.random.default_rng(0).poisson(20, (5, 3, 12))
    profile = eplb.LoadProfile.from_counts(counts)
    reference = profile.mean_load_LE()
    found = drift_from(profile, reference)
    assert found == pytest.approx([drift(window, reference) for window in profile.counts_WLE])


def test_chance_drift_is_what_independent_choices_show():
    rng = np.random.default_rng(0)
    part = rng.dirichlet(np.ones(32), 4)
    counts = np.stack([[rng.multinomial(2000, p) for p in part] for _ in range(200)])
    profile = eplb.LoadProfile.from_counts(counts)
    assert drift_from(profile, part).mean() == pytest.approx(
        chance_drift(profile, part).mean(), rel=0.03
    )


def test_means_leave_out_what_is_not_known():
    values = np.array([[1.0, np.nan], [3.0, np.nan]])
    assert np.array_equal(mean_where(values, axis=0), [2.0, np.nan], equal_nan=True)


def test_the_scale_reaches_the_loads_and_stays_useful():
    assert half_span([np.ones((2, 4))]) == 0.1
    assert half_span([np.array([[0.0, 9.0]])]) == 1.0
    assert half_span([np.array([[0.77, 1.23]])]) == pytest.approx(0.25)
