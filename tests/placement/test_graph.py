"""Rings for the batch rule: whole placements in which all ranks are connected alike."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import loads

from eplb.placement.graph import ring_placement


@given(st.data(), st.integers(3, 16), st.integers(2, 6))
def test_every_expert_is_placed_on_distinct_ranks(data, num_ranks, slots_per_rank):
    num_slots = num_ranks * slots_per_rank
    num_experts = data.draw(st.integers(-(-num_slots // 2), num_slots - num_ranks))
    load_E = data.draw(loads(num_experts))
    slot_RK = ring_placement(load_E, num_ranks, slots_per_rank)
    if slot_RK is None:
        return
    assert slot_RK.shape == (num_ranks, slots_per_rank)
    count_E = np.bincount(slot_RK.reshape(-1), minlength=num_experts)
    assert slot_RK.min() >= 0
    assert set(count_E.tolist()) <= {1, 2}
    assert count_E.sum() == num_slots
    assert all(len(set(rank)) == slots_per_rank for rank in slot_RK.tolist())
    # The hottest have the replicas.
    assert load_E[count_E == 2].min() >= load_E[count_E == 1].max(initial=0)


def degrees_and_parts(slot_RK):
    """How many connections each rank has, and how many parts the ranks fall into."""
    num_ranks = len(slot_RK)
    edges = [
        (a, b)
        for a, b in combinations(range(num_ranks), 2)
        for _ in set(slot_RK[a].tolist()) & set(slot_RK[b].tolist())
    ]
    part = list(range(num_ranks))
    for a, b in edges * num_ranks:
        part[a] = part[b] = min(part[a], part[b])
    return [sum(r in edge for edge in edges) for r in range(num_ranks)], len(set(part))


@pytest.mark.parametrize(("num_ranks", "slots_per_rank", "num_experts", "degree"), [
    (32, 9, 256, 2), (16, 18, 256, 4), (8, 36, 256, 8), (64, 5, 256, 2), (5, 4, 10, 4),
])  # fmt: skip
def test_ranks_have_the_same_number_of_connections(num_ranks, slots_per_rank, num_experts, degree):
    load_E = np.random.default_rng(0).lognormal(0, 1, num_experts)
    slot_RK = ring_placement(load_E, num_ranks, slots_per_rank)
    degrees, parts = degrees_and_parts(slot_RK)
    assert parts == 1
    assert degrees == [degree] * num_ranks


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "slots_per_rank"),
    [
        (16, 4, 4),  # no redundant slot
        (14, 4, 4),  # too few to close a ring
        (6, 4, 4),  # more than one second replica for each expert
        (3, 2, 3),  # two ranks are no ring
        (3, 1, 3),
    ],
)
def test_where_there_is_no_ring(num_experts, num_ranks, slots_per_rank):
    assert ring_placement(np.ones(num_experts), num_ranks, slots_per_rank) is None
