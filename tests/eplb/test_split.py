from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import strategies as own
from hypothesis import given
from hypothesis import strategies as st
from oracles import share_of_slots

from eplb.check import rank_fractions
from eplb.errors import InvalidInput
from eplb.split import SPLIT_RULES, slot_share
from eplb.topology import Topology


def share_of(plan: Any, split: str) -> Any:
    return slot_share(
        plan.placement.phys_to_log_LS, plan.placement.num_experts, plan.topology, split
    )


def test_every_rule_is_generated_in_tests() -> None:
    assert tuple(SPLIT_RULES) == own.ALL_SPLITS


@given(own.cases(splits=("weighted",)))
def test_fixed_fractions_are_those_of_the_placement(case: Any) -> None:
    _, placement, topology, split = case
    share_LS = slot_share(
        placement.phys_to_log_LS, placement.num_experts, topology, split,
        placement.split_weights_LS,
    )  # fmt: skip
    assert np.array_equal(share_LS, placement.split_weights_LS)
    for row, share_S in zip(placement.phys_to_log_LS.tolist(), share_LS.tolist(), strict=True):
        fractions = rank_fractions(row, topology, split, share_S)
        for expert in range(placement.num_experts):
            total = sum(part for (e, _), part in fractions.items() if e == expert)
            assert total == pytest.approx(1, abs=1e-9)


def test_weighted_without_fractions_says_where_they_come_from() -> None:
    topology = Topology(num_nodes=1, ranks_per_node=1, slots_per_rank=2)
    with pytest.raises(InvalidInput, match="plan with --split weighted"):
        slot_share(np.array([[0, 1]]), 2, topology, "weighted")


def test_batch_has_no_one_set_of_fractions() -> None:
    topology = Topology(num_nodes=1, ranks_per_node=1, slots_per_rank=2)
    with pytest.raises(InvalidInput, match="every window has fractions of its own"):
        slot_share(np.array([[0, 1]]), 2, topology, "batch")


def test_an_unknown_rule_is_named() -> None:
    rows = np.array([[0, 1]])
    topology = Topology(num_nodes=1, ranks_per_node=1, slots_per_rank=2)
    with pytest.raises(InvalidInput, match="unknown split rule 'evn'; did you mean 'even'"):
        slot_share(rows, 2, topology, "evn")


@given(own.plans(), st.sampled_from(own.SPLITS))
def test_share_is_that_of_the_enumeration(plan: Any, split: str) -> None:
    share_LS = share_of(plan, split)
    for layer, row in enumerate(plan.placement.phys_to_log_LS.tolist()):
        expected = [float(f) for f in share_of_slots(row, plan.topology, split)]
        assert share_LS[layer] == pytest.approx(expected, rel=1e-12, abs=0)


@given(own.plans(), st.sampled_from(own.SPLITS))
def test_no_token_is_lost_or_doubled(plan: Any, split: str) -> None:
    share_LS = share_of(plan, split)
    rows = plan.placement.phys_to_log_LS
    assert (share_LS[rows < 0] == 0).all()
    assert (share_LS[rows >= 0] > 0).all()
    for layer, row in enumerate(rows):
        of_expert = np.bincount(row[row >= 0], weights=share_LS[layer][row >= 0])
        assert of_expert == pytest.approx(np.ones(plan.placement.num_experts), rel=1e-12)


@given(own.plans(), st.sampled_from(own.SPLITS))
def test_the_checker_splits_alike(plan: Any, split: str) -> None:
    share_LS = share_of(plan, split)
    for layer, row in enumerate(plan.placement.phys_to_log_LS.tolist()):
        of_rank: dict[tuple[int, int], float] = {}
        for slot, expert in enumerate(row):
            if expert >= 0:
                key = (expert, slot // plan.topology.slots_per_rank)
                of_rank[key] = of_rank.get(key, 0.0) + share_LS[layer, slot]
        assert rank_fractions(row, plan.topology, split) == pytest.approx(of_rank, rel=1e-12)


@given(st.data(), st.integers(1, 6), st.integers(0, 3))
def test_nearest_on_one_rank_is_even(data: Any, num_experts: int, spare: int) -> None:
    topology = Topology(num_nodes=1, ranks_per_node=1, slots_per_rank=num_experts + spare)
    row = data.draw(own.rows(num_experts, topology))[np.newaxis]
    even, nearest = (slot_share(row, num_experts, topology, split) for split in own.SPLITS)
    assert nearest == pytest.approx(even, rel=1e-12)


@given(st.data(), own.topologies(min_slots=4))
def test_nearest_with_one_replica_a_node_is_even(data: Any, topology: Topology) -> None:
    """All nodes hold one slot of the expert, so each gets what its node sends."""
    row = np.full(topology.num_slots, 1)
    per_node = topology.ranks_per_node * topology.slots_per_rank
    for node in range(topology.num_nodes):
        row[node * per_node + data.draw(st.integers(0, per_node - 1))] = 0
    share_S = slot_share(row[np.newaxis], 2, topology, "nearest")[0]
    assert share_S[row == 0] == pytest.approx(1 / topology.num_nodes, rel=1e-12)


def test_nearest_by_hand() -> None:
    """Expert 0: rank 0 twice and rank 1 of node 0, rank 2 of node 1; node 2 has none."""
    topology = Topology(num_nodes=3, ranks_per_node=2, slots_per_rank=2)
    row = np.array([[0, 0, 0, 1, 0, -1, 2, -1, 3, -1, 4, -1]])
    share_S = slot_share(row, 5, topology, "nearest")[0]
    node_1 = (1 + 1 + 2 / 4) / 6
    assert share_S[[0, 1, 2, 4]] == pytest.approx([1 / 6, 1 / 6, 1.5 / 6, node_1])
    assert share_S[[3, 6, 8, 10]].tolist() == [1, 1, 1, 1]
