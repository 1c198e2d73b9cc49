"""Tokens received, against counting every choice."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from eplb.errors import InvalidInput
from eplb.receive import receive_tokens
from eplb.slots import Placement
from eplb.topology import Topology


def choices(expert, row, topology, split, source):
    """Ranks a token of ``source`` may be sent to for an expert, each as likely as the others."""
    ranks = [s // topology.slots_per_rank for s, e in enumerate(row) if e == expert]
    if split == "nearest":
        node = source // topology.ranks_per_node
        own = [r for r in ranks if r == source]
        near = [r for r in ranks if r // topology.ranks_per_node == node]
        return own or near or ranks
    return ranks


def received(tokens, row, topology, split):
    """Expected tokens of each rank: every source, every combination of replicas."""
    total = np.zeros(topology.num_ranks)
    for source, experts in product(range(topology.num_ranks), tokens):
        options = [choices(e, row, topology, split, source) for e in experts]
        outcomes = list(product(*options))
        for outcome in outcomes:
            for rank in set(outcome):
                total[rank] += 1 / len(outcomes) / topology.num_ranks
    return total


@settings(max_examples=60)
@given(cases(), st.data())
def test_equals_counting_every_choice(case, data):
    _, placement, topology, split = case
    top_k = min(placement.num_experts, 3)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    topk_TLK = np.array(
        [
            [rng.permutation(placement.num_experts)[:top_k] for _ in placement.layer_ids]
            for _ in range(3)
        ]
    )
    ours_LR = receive_tokens(topk_TLK, placement, topology, split)
    for layer, row in enumerate(placement.phys_to_log_LS.tolist()):
        expected = received(topk_TLK[:, layer].tolist(), row, topology, split)
        assert ours_LR[layer] == pytest.approx(expected)


@given(cases())
def test_routings_that_do_not_fit_are_refused(case):
    _, placement, topology, split = case
    fits = np.zeros((2, placement.num_layers, 1), np.int64)
    for bad, message in (
        (fits[:, 0], r"\[tokens, layers, top_k\]"),
        (fits.astype(float), "whole numbers"),
        (np.concatenate([fits, fits], axis=1), "layers and the plan"),
        (fits + placement.num_experts, "routings name expert"),
        (fits - 1, "routings name expert"),
    ):
        with pytest.raises(InvalidInput, match=message):
            receive_tokens(bad, placement, topology, split)


def test_fractions_of_a_plan_are_heeded():
    topology = Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=2)
    placement = Placement(
        phys_to_log_LS=[[0, 1, 0, 2]],
        layer_ids=(0,),
        num_experts=3,
        split_weights_LS=[[0.75, 1.0, 0.25, 1.0]],
    )
    topk_TLK = np.array([[[0]]] * 8)
    assert receive_tokens(topk_TLK, placement, topology, "weighted")[0] == pytest.approx([6, 2])
    both_TLK = np.array([[[0, 1]]] * 8)
    assert receive_tokens(both_TLK, placement, topology, "weighted")[0] == pytest.approx([8, 2])
