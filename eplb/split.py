"""Split rules: how the tokens of a logical expert divide over its replicas.

A rule gives each slot its fraction of its expert's tokens, exactly and in expectation over the
tokens' source ranks (each rank is the source of an equal part, as data-parallel ranks of one size
are). Evaluator and solvers use these functions; the runtime's choice of a replica follows them.
Shape letters: L layers, E logical experts, S slots, R ranks, N nodes, M ranks of a node.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import unknown_name
from eplb.slots import replica_count
from eplb.topology import Topology

__all__ = ["SPLIT_RULES", "slot_share"]


def slot_share(
    phys_to_log_LS: IntArray, num_experts: int, topology: Topology, split: str
) -> FloatArray:
    """Return the fraction of its expert's tokens that each slot receives, shape [L, S].

    Fractions of an expert's slots add up to 1; empty slots receive 0.

    Raises
    ------
    InvalidInput
        ``split`` is not a registered rule.
    """
    if split not in SPLIT_RULES:
        raise unknown_name("split rule", split, SPLIT_RULES)
    return SPLIT_RULES[split](phys_to_log_LS, num_experts, topology)


def _even(phys_to_log_LS: IntArray, num_experts: int, topology: Topology) -> FloatArray:
    """Give each replica the same part, as round robin and hashing do."""
    count_LS = _of_slots(replica_count(phys_to_log_LS, num_experts), phys_to_log_LS)
    return np.where(phys_to_log_LS >= 0, 1.0 / np.maximum(count_LS, 1), 0.0)


def _nearest(phys_to_log_LS: IntArray, num_experts: int, topology: Topology) -> FloatArray:
    """Let a rank use its own replicas, else those of its node, else all; evenly in each class.

    For a slot on rank r of node n, whose expert has d replicas on r, c on n and a in all, is on h
    ranks of n and on m of the nodes, the share is::

        (1/R) * (1/d + (M - h)/c + (R - M*m)/a)

    from its own rank, from ranks of its node without a replica, and from nodes without one.
    """
    num_layers, num_slots = phys_to_log_LS.shape
    num_ranks, num_nodes = topology.num_ranks, topology.num_nodes
    filled = phys_to_log_LS >= 0
    layer_LS = np.broadcast_to(np.arange(num_layers)[:, np.newaxis], phys_to_log_LS.shape)
    expert_LS = np.where(filled, phys_to_log_LS, 0)
    rank_S = np.arange(num_slots) // topology.slots_per_rank
    cell = (layer_LS * num_experts + expert_LS) * num_ranks + rank_S

    def to_slots(per_expert: IntArray) -> IntArray:
        values: IntArray = per_expert[layer_LS, expert_LS]
        return values

    on_rank = np.bincount(cell[filled], minlength=num_layers * num_experts * num_ranks)
    on_rank_LENM = on_rank.reshape(num_layers, num_experts, num_nodes, topology.ranks_per_node)
    on_node_LEN = on_rank_LENM.sum(axis=3)
    ranks_of_node_LEN = np.count_nonzero(on_rank_LENM, axis=3)
    node_S = rank_S // topology.ranks_per_node
    own_rank_LS = on_rank.reshape(-1)[cell]
    own_node_LS = on_node_LEN[layer_LS, expert_LS, node_S]
    node_ranks_LS = ranks_of_node_LEN[layer_LS, expert_LS, node_S]
    total_LS = to_slots(on_node_LEN.sum(axis=2))
    nodes_LS = to_slots(np.count_nonzero(on_node_LEN, axis=2))
    share_LS = (
        1.0 / np.maximum(own_rank_LS, 1)
        + (topology.ranks_per_node - node_ranks_LS) / np.maximum(own_node_LS, 1)
        + (num_ranks - topology.ranks_per_node * nodes_LS) / np.maximum(total_LS, 1)
    ) / num_ranks
    return np.where(filled, share_LS, 0.0)


def _of_slots(values_LE: IntArray, phys_to_log_LS: IntArray) -> IntArray:
    """Return each slot's value of its expert; an empty slot shows that of expert 0."""
    values: IntArray = np.take_along_axis(values_LE, np.maximum(phys_to_log_LS, 0), axis=1)
    return values


SPLIT_RULES: dict[str, Callable[[IntArray, int, Topology], FloatArray]] = {
    "even": _even,
    "nearest": _nearest,
}
