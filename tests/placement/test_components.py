"""Components: levelled exactly, built on distinct ranks, and no worse than what is possible."""

import numpy as np
import pytest
from exhaustive import single_loads
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb.batch_split import batch_max_load
from eplb.placement.component_bound import component_bound
from eplb.placement.components import fill, place_groups, place_in_components
from eplb.placement.piece_bound import piece_bound


def rank_loads(load_E, row, fraction, num_ranks):
    """Check slots and fractions, and return what each rank receives."""
    filled = row >= 0
    assert (fraction[~filled] == 0).all()
    assert (fraction >= 0).all()
    total_E = np.bincount(row[filled], fraction[filled], minlength=len(load_E))
    np.testing.assert_allclose(total_E, 1.0, rtol=1e-9)
    for rank in row.reshape(num_ranks, -1):
        experts = rank[rank >= 0]
        assert len(set(experts.tolist())) == len(experts)
    load_S = np.where(filled, load_E[np.maximum(row, 0)], 0.0) * fraction
    return load_S.reshape(num_ranks, -1).sum(axis=1)


@given(st.data())
def test_any_component_is_levelled(data):
    num_ranks, slots = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 5))
    load_E = data.draw(single_loads((slots - 1) * num_ranks + 1, 64))
    row, fraction = fill(load_E, num_ranks, slots)
    load_R = rank_loads(load_E, row.reshape(-1), fraction.reshape(-1), num_ranks)
    np.testing.assert_allclose(load_R, load_E.sum() / num_ranks, rtol=1e-9)


@settings(max_examples=30)
@given(st.data())
def test_placements_and_bounds_of_one_load(data):
    num_ranks, slots = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    load_E = data.draw(single_loads(9, num_ranks * slots))
    row, fraction = place_in_components(load_E, num_ranks, slots, steps=200)
    reached = rank_loads(load_E, row, fraction, num_ranks).max()
    # No split of these slots is better than the fractions.
    best_split = batch_max_load(load_E[np.newaxis], row, num_ranks)[0]
    assert reached == pytest.approx(best_split, rel=1e-9)
    mean = load_E.sum() / num_ranks
    low, group_E = component_bound(load_E, num_ranks, slots, mean, reached)
    assert mean <= low <= reached
    best = reached
    if group_E is not None:
        row, fraction = place_groups(load_E, group_E, num_ranks, slots)
        best = rank_loads(load_E, row, fraction, num_ranks).max()
        assert best <= reached
    # The bound of components is an optimum.
    assert best <= low * (1 + 1e-6)
    if num_ranks * slots >= len(load_E) + num_ranks - 1:
        assert reached == pytest.approx(mean, rel=1e-9)
    if slots == 2:
        assert piece_bound(load_E, num_ranks, 0.5 * mean, 4 * reached) <= best * (1 + 1e-9)


def test_two_slots_a_rank_are_near_the_bound():
    load_E = np.random.default_rng(0).lognormal(0, 0.9, 64)
    load_E *= 36 / load_E.sum()
    row, fraction = place_in_components(load_E, 36, 2)
    reached = rank_loads(load_E, row, fraction, 36).max()
    bound = piece_bound(load_E, 36, 1.0, reached)
    assert bound <= reached <= bound * 1.02
    again, _ = place_in_components(load_E, 36, 2)
    np.testing.assert_array_equal(row, again)
