"""Ranks numbered anew: nothing but the numbering changes, and the fewest experts move."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb.placement.keep_slots import count_moves, keep_slots


@st.composite
def pairs(draw):
    """(new, old, ranks, nodes) of small placements; doubled experts and empty old slots too."""
    nodes, per_node = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    ranks, per_rank = nodes * per_node, draw(st.integers(1, 3))
    experts, layers = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    new = random.integers(0, experts, (layers, ranks * per_rank))
    old = random.integers(-1, experts, new.shape)
    return new, old, ranks, nodes


def by_rank(row, ranks):
    return [tuple(sorted(rank)) for rank in row.reshape(ranks, -1).tolist()]


def missing(row, old, ranks):
    """What moves cost here: different experts that a rank lacks."""
    return sum(
        len(set(a) - set(b)) for a, b in zip(by_rank(row, ranks), by_rank(old, ranks), strict=True)
    )


@given(pairs())
def test_the_same_ranks_with_the_fewest_moves(case):
    new, old, ranks, nodes = case
    kept = keep_slots(new, old, ranks, nodes)
    per_node = ranks // nodes
    for row, new_row, old_row in zip(kept, new, old, strict=True):
        found = by_rank(row, ranks)
        before = by_rank(new_row, ranks)
        assert sorted(found) == sorted(before)
        of_node = [sorted(found[i : i + per_node]) for i in range(0, ranks, per_node)]
        assert sorted(of_node) == sorted(
            sorted(before[i : i + per_node]) for i in range(0, ranks, per_node)
        )
        numbers = np.arange(ranks).reshape(nodes, per_node)
        best = min(
            missing(
                new_row.reshape(ranks, -1)[[r for node in order for r in within[node]]], old_row,
                ranks,
            )
            for order in permutations(range(nodes))
            for within in _within_nodes(numbers)
        )  # fmt: skip
        assert missing(row, old_row, ranks) == best


def _within_nodes(numbers):
    """Every order of ranks within each of the nodes."""
    if not len(numbers):
        yield []
        return
    for first in permutations(numbers[0].tolist()):
        for rest in _within_nodes(numbers[1:]):
            yield [list(first), *rest]


@given(pairs())
def test_experts_that_stay_keep_their_slots(case):
    new, old, ranks, nodes = case
    kept = keep_slots(new, old, ranks, nodes)
    for row, old_row in zip(kept, old, strict=True):
        for here, before in zip(row.reshape(ranks, -1), old_row.reshape(ranks, -1), strict=True):
            for expert in set(here.tolist()) & set(before.tolist()):
                both = min((here == expert).sum(), (before == expert).sum())
                assert ((here == expert) & (before == expert)).sum() == both


@given(pairs())
def test_a_placement_is_kept_as_it_is(case):
    new, _, ranks, nodes = case
    assert np.array_equal(keep_slots(new, new, ranks, nodes), new)
    assert count_moves(new, new, ranks) == 0


@pytest.mark.parametrize(("old", "moves"), [([0, 1, 2, 3], 0), ([2, 3, 0, 1], 4), ([-1] * 4, 4)])
def test_moves_are_experts_that_a_rank_lacks(old, moves):
    assert count_moves(np.array([old]), np.array([[1, 0, 3, 2]]), 2) == moves
