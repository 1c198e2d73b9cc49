"""References are tested too: against published results, and against each other."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import strategies as own
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import deepseek_rebalance, optimal_imbalance_mean, optimal_max_rank_load, rank_loads

from eplb.topology import Topology


def test_deepseek_readme_example() -> None:
    """github.com/deepseek-ai/EPLB, README: its loads, and the placement it prints."""
    weight_LE = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    phys_to_log, log_to_phys, count = deepseek_rebalance(
        weight_LE, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8
    )
    assert phys_to_log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    for layer, row in enumerate(phys_to_log.tolist()):
        for expert in range(12):
            slots = [slot for slot, held in enumerate(row) if held == expert]
            held = log_to_phys[layer, expert]
            assert sorted(held[held >= 0]) == slots
            assert count[layer, expert] == len(slots)


@pytest.mark.parametrize(
    ("load_E", "num_ranks", "slots_per_rank", "expected"),
    [
        ([4, 2], 2, 1, 4),
        ([4, 2], 3, 1, 2),
        ([4, 2], 2, 2, 3),
        ([6, 1, 1], 4, 1, 3),
        ([1, 1, 1], 2, 2, Fraction(3, 2)),
        # Five ones on two ranks: 2.5 if one of them is on both.
        ([1, 1, 1, 1, 1], 2, 3, Fraction(5, 2)),
        ([0.5, 0.25], 1, 2, Fraction(3, 4)),
    ],
)
def test_optima_by_hand(
    load_E: list[float], num_ranks: int, slots_per_rank: int, expected: Fraction
) -> None:
    for distinct in (True, False):
        found = optimal_max_rank_load(load_E, num_ranks, slots_per_rank, distinct_ranks=distinct)
        assert found == expected


def test_two_replicas_on_one_rank_help_where_a_rank_may_hold_a_larger_part() -> None:
    load_E = [9, 6]
    shared, distinct = (
        optimal_max_rank_load(load_E, 2, 2, distinct_ranks=d) for d in (False, True)
    )
    assert distinct == shared == Fraction(15, 2)
    load_E = [9.5, 3, 3, 2, 1, 0.5]
    shared, distinct = (
        optimal_max_rank_load(load_E, 2, 4, distinct_ranks=d) for d in (False, True)
    )
    assert shared < distinct


def test_too_many_experts_have_no_placement() -> None:
    assert optimal_max_rank_load([1, 1, 1], 2, 1, distinct_ranks=True) is None


def test_flashlb_example_is_where_the_baselines_found_greedy() -> None:
    """The optimum is 196.67; 8 ranks are too many for brute force."""
    load_E = [600, 560, 120, 120, 20, 10, 10, 10]
    row = deepseek_rebalance([load_E], 16, 1, 1, 8)[0][0].tolist()
    topology = Topology(num_nodes=1, ranks_per_node=8, slots_per_rank=2)
    greedy = max(rank_loads(load_E, row, topology, "even"))
    assert round(float(greedy)) == 232


@settings(max_examples=30)
@given(st.data())
def test_no_random_placement_beats_the_brute_force(data: Any) -> None:
    num_ranks = data.draw(st.integers(1, 4))
    slots_per_rank = data.draw(st.integers(1, 8 // num_ranks))
    num_experts = data.draw(st.integers(1, min(6, num_ranks * slots_per_rank)))
    topology = Topology(num_nodes=1, ranks_per_node=num_ranks, slots_per_rank=slots_per_rank)
    distinct = data.draw(st.booleans())
    load_WE = data.draw(own.loads(data.draw(st.integers(1, 2)), num_experts))
    best = optimal_imbalance_mean(
        load_WE.tolist(), num_ranks, slots_per_rank, distinct_ranks=distinct
    )
    for _ in range(10):
        row = data.draw(own.rows(num_experts, topology, distinct=distinct)).tolist()
        scores = []
        for load_E in load_WE.tolist():
            received = rank_loads(load_E, row, topology, "even")
            scores.append(max(received) * num_ranks / sum(received))
        assert sum(scores) / len(scores) >= best
    # What is reached by more slots a rank or by fewer windows can only be less.
    assert best >= 1
    if not distinct:
        assert best <= optimal_imbalance_mean(
            load_WE.tolist(), num_ranks, slots_per_rank, distinct_ranks=True
        )


@given(st.data())
def test_deepseek_rebalance_places_every_expert(data: Any) -> None:
    num_nodes, groups_per_node = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    num_groups = num_nodes * groups_per_node
    num_experts = num_groups * data.draw(st.integers(1, 4))
    ranks = num_nodes * data.draw(st.integers(1, 3))
    slots = ranks * (-(-num_experts // ranks) + data.draw(st.integers(0, 2)))
    weight_LE = data.draw(own.loads(2, num_experts))
    for groups in (num_groups, num_groups + num_nodes - 1):
        if num_experts % groups:
            continue
        phys_to_log, log_to_phys, count = deepseek_rebalance(
            weight_LE, slots, groups, num_nodes, ranks
        )
        assert phys_to_log.shape == (2, slots)
        assert (count >= 1).all()
        assert (count.sum(axis=1) == slots).all()
        assert np.count_nonzero(log_to_phys >= 0) == 2 * slots
