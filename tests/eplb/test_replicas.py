"""Choosing replicas: the rules' fractions in expectation, and to within a token in every step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import plans

from eplb.errors import InvalidInput
from eplb.replicas import (
    choose_slots,
    replica_bounds,
    source_share,
    token_offset,
)
from eplb.split import slot_share
from eplb.topology import Topology

RULES = ("even", "nearest", "weighted")


def shares(plan, layer=0):
    weights = plan.placement.split_weights_LS
    return np.stack(
        [
            source_share(
                plan.placement.phys_to_log_LS[layer], plan.model.num_experts, plan.topology,
                plan.split, rank, None if weights is None else weights[layer],
            )
            for rank in range(plan.topology.num_ranks)
        ]
    )  # fmt: skip


def chosen(plan, topk_TK, rank=0, step=0):
    slots_S = plan.placement.phys_to_log_LS[0]
    bounds = replica_bounds(slots_S, shares(plan)[rank])
    offset_E = token_offset(rank, plan.placement.layer_ids[0], plan.model.num_experts)
    return choose_slots(topk_TK, bounds, offset_E, step)


@given(plans(splits=RULES))
def test_shares_of_ranks_average_to_the_shares_that_solvers_use(plan):
    expected = slot_share(
        plan.placement.phys_to_log_LS, plan.model.num_experts, plan.topology, plan.split,
        plan.placement.split_weights_LS,
    )  # fmt: skip
    for layer in range(plan.placement.num_layers):
        assert np.allclose(shares(plan, layer).mean(axis=0), expected[layer])


@given(plans(splits=RULES), st.integers(0, 2**32 - 1), st.integers(0, 10_000))
def test_every_replica_gets_its_share_to_within_one_token(plan, seed, step):
    rng = np.random.default_rng(seed)
    num_experts = plan.model.num_experts
    topk_TK = rng.integers(-1, num_experts, (rng.integers(0, 40), 3))
    rank = int(rng.integers(plan.topology.num_ranks))
    slot_TK = chosen(plan, topk_TK, rank, step)
    slots_S = plan.placement.phys_to_log_LS[0]
    assert (slot_TK[topk_TK < 0] == -1).all()
    assert (slots_S[slot_TK[topk_TK >= 0]] == topk_TK[topk_TK >= 0]).all()
    routed_E = np.bincount(topk_TK[topk_TK >= 0], minlength=num_experts)
    received_S = np.bincount(slot_TK[slot_TK >= 0], minlength=len(slots_S))
    wanted_S = shares(plan)[rank] * routed_E[np.maximum(slots_S, 0)] * (slots_S >= 0)
    assert (np.abs(received_S - wanted_S) < 1 + 1e-6).all()


def test_single_tokens_of_many_ranks_and_steps_spread_over_the_replicas():
    topology = Topology(num_nodes=1, ranks_per_node=4, slots_per_rank=2)
    slots_S = np.array([0, 1, 0, 1, 0, 2, 0, 3])
    received_S = np.zeros(8)
    for rank in range(4):
        bounds = replica_bounds(slots_S, source_share(slots_S, 4, topology, "even", rank))
        offset_E = token_offset(rank, 3, 4)
        for step in range(100):
            slot_TK = choose_slots(np.array([[0, 1]]), bounds, offset_E, step)
            received_S += np.bincount(slot_TK.ravel(), minlength=8)
    # Round robin that starts anew in every step would give all 400 to the first replica.
    assert np.abs(received_S[[0, 2, 4, 6]] - 100).max() <= 6
    assert np.abs(received_S[[1, 3]] - 200).max() <= 6


def test_batch_has_no_fixed_fractions():
    topology = Topology(num_nodes=1, ranks_per_node=1, slots_per_rank=2)
    with pytest.raises(InvalidInput, match="under split batch"):
        source_share(np.array([0, 1]), 2, topology, "batch", 0)
