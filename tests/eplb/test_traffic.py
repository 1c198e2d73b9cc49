"""Traffic between nodes, against sums over every source, expert and replica."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eplb
from eplb.errors import InvalidInput
from eplb.receive import receive_tokens
from eplb.slots import Placement
from eplb.topology import Topology
from eplb.traffic import node_traffic, receive_node_tokens


def brute_force(load_E, slots, topology, split, weights=None):
    """Send every expert's rows from every rank to every replica its rule allows."""
    nodes, per_node = topology.num_nodes, topology.ranks_per_node
    traffic = np.zeros((nodes, nodes))
    for source in range(topology.num_ranks):
        for expert, load in enumerate(load_E):
            places = [s for s, e in enumerate(slots) if e == expert]
            ranks = [s // topology.slots_per_rank for s in places]
            share = [1.0] * len(places) if weights is None else [weights[s] for s in places]
            if split == "nearest":
                for allowed in (
                    [r == source for r in ranks],
                    [r // per_node == source // per_node for r in ranks],
                ):
                    if any(allowed):
                        share = [float(a) for a in allowed]
                        break
            for rank, part in zip(ranks, share, strict=True):
                traffic[source // per_node, rank // per_node] += (
                    load * part / sum(share) / topology.num_ranks
                )
    return traffic / sum(load_E)


@given(st.data(), st.sampled_from(["even", "nearest", "weighted"]))
def test_traffic_is_the_sum_over_sources_and_replicas(data, split):
    topology = Topology(num_nodes=data.draw(st.integers(1, 3)), ranks_per_node=2, slots_per_rank=3)
    num_experts = data.draw(st.integers(2, topology.num_slots))
    extra = topology.num_slots - num_experts
    filled = list(range(num_experts)) + data.draw(
        st.lists(st.integers(-1, num_experts - 1), min_size=extra, max_size=extra)
    )
    slots = np.array(data.draw(st.permutations(filled)))
    loads = st.lists(st.integers(0, 9), min_size=num_experts, max_size=num_experts)
    load_E = np.array(data.draw(loads), float)
    load_E[0] += 1
    weights = None
    if split == "weighted":
        count = np.bincount(slots[slots >= 0], minlength=num_experts)
        weights = np.where(slots >= 0, 1 / count[slots], 0.0)
    placement = Placement(
        phys_to_log_LS=slots[np.newaxis], layer_ids=(0,), num_experts=num_experts,
        split_weights_LS=None if weights is None else weights[np.newaxis],
    )  # fmt: skip
    found = node_traffic(load_E[np.newaxis], placement, topology, split)
    assert found == pytest.approx(brute_force(load_E, slots, topology, split, weights))
    assert found.sum() == pytest.approx(1)


def test_tokens_of_nodes_are_those_of_a_cluster_of_one_rank_nodes():
    topology = Topology(num_nodes=2, ranks_per_node=2, slots_per_rank=3)
    rng = np.random.default_rng(0)
    slots = np.concatenate([np.arange(8), rng.integers(0, 8, 4)])[np.newaxis]
    placement = Placement(phys_to_log_LS=slots, layer_ids=(0,), num_experts=8)
    topk = np.array([rng.permutation(8)[:3] for _ in range(40)])[:, np.newaxis]
    by_node = receive_node_tokens(topk, placement, topology, "even")
    by_rank = receive_tokens(topk, placement, topology, "even")
    assert by_node.shape == (1, 2)
    # A node gets a token when any of its ranks does: at least the busier, at most both.
    pairs = by_rank.reshape(2, 2)
    assert (by_node[0] >= pairs.max(axis=1) - 1e-9).all()
    assert (by_node[0] <= pairs.sum(axis=1) + 1e-9).all()
    one = eplb.Topology(num_nodes=1, ranks_per_node=1, slots_per_rank=12)
    assert receive_node_tokens(topk, placement, one, "even")[0, 0] == pytest.approx(40)


def test_ranks_out_of_service_send_nothing():
    topology = Topology(
        num_nodes=2, ranks_per_node=2, slots_per_rank=2, ranks_out_of_service=(2, 3)
    )
    slots = np.array([[0, 1, 2, 3, -1, -1, -1, -1]])
    placement = Placement(phys_to_log_LS=slots, layer_ids=(0,), num_experts=4)
    found = node_traffic(np.ones((1, 4)), placement, topology, "even")
    assert found == pytest.approx(np.array([[1, 0], [0, 0]]))


def test_batch_says_nothing_of_sources():
    topology = Topology(num_nodes=2, ranks_per_node=1, slots_per_rank=2)
    placement = Placement(phys_to_log_LS=[[0, 1, 2, 3]], layer_ids=(0,), num_experts=4)
    with pytest.raises(InvalidInput, match="not from whom"):
        node_traffic(np.ones((1, 4)), placement, topology, "batch")
