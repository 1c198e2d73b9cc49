"""Ranks in nodes: the same ranks, and under nearest what even split has where that can be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eplb
from eplb.load_profile import LoadProfile
from eplb.metrics import evaluate
from eplb.model import MoEModel
from eplb.placement.greedy import place_greedy
from eplb.placement.node_spread import spread_over_nodes
from eplb.placement.solve import Effort
from eplb.problem import Problem
from eplb.slots import Placement
from eplb.topology import Topology


def together(row, topology):
    """Count the pairs of replicas of an expert on one node."""
    by_node = row.reshape(topology.num_nodes, -1)
    count = [np.bincount(node[node >= 0]) for node in by_node]
    return sum(int((c * (c - 1) // 2).sum()) for c in count)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_same_ranks_and_fewer_replicas_together(num_nodes, per_node, slots, seed):
    topology = Topology(num_nodes=num_nodes, ranks_per_node=per_node, slots_per_rank=slots)
    random = np.random.default_rng(seed)
    row = random.integers(-1, 6, topology.num_slots)
    # All alike, so that what is counted is what is minimised where experts have as many replicas.
    load_E = np.maximum(np.bincount(row[row >= 0], minlength=6), 1).astype(float)
    spread = spread_over_nodes(row, load_E, topology)
    ranks = [sorted(x.reshape(topology.num_ranks, -1).tolist()) for x in (row, spread)]
    assert ranks[0] == ranks[1]
    assert together(spread, topology) <= together(row, topology)


def test_nearest_costs_what_even_does_where_replicas_have_nodes():
    load_E = np.random.default_rng(1).lognormal(0, 0.8, 48)
    topology = Topology(num_nodes=8, ranks_per_node=4, slots_per_rank=2)
    slots, _ = place_greedy(
        load_E[np.newaxis].astype(np.float32), num_slots=64, num_ranks=32, distinct_ranks=True
    )
    spread = spread_over_nodes(slots[0].astype(np.int64), load_E, topology)
    assert together(spread, topology) == 0
    profile = LoadProfile.from_counts((load_E * 1e6).round()[np.newaxis, np.newaxis])
    even, near = (
        evaluate(
            profile,
            Placement(phys_to_log_LS=row[np.newaxis], layer_ids=(0,), num_experts=48),
            topology,
            split,
        ).imbalance_mean
        for row, split in ((slots[0], "even"), (spread, "nearest"))
    )
    assert near == pytest.approx(even, rel=1e-12)


def test_search_starts_are_compared_under_nearest():
    """Starts were scored with equal parts, so that one worse under nearest was kept."""
    load_E = np.random.default_rng(2).lognormal(0, 0.8, 48)
    profile = LoadProfile.from_counts((load_E * 1e6).round()[np.newaxis, np.newaxis])
    model = MoEModel(name="t", num_experts=48, layer_ids=(0,))
    topology = Topology(num_nodes=8, ranks_per_node=4, slots_per_rank=2)
    even, near = (
        eplb.solve(
            Problem(profile=profile, model=model, topology=topology, split=split),
            "search",
            Effort(sweeps=1),
        ).objective
        for split in ("even", "nearest")
    )
    assert near <= even * (1 + 1e-9)
