"""Split rules: how the tokens of a logical expert divide over its replicas.

``even``, ``nearest`` and ``weighted`` give each slot its fraction of its expert's tokens, exactly
and in expectation over the tokens' source ranks (each rank in service is the source of an equal
part, as data-parallel ranks of one size are). Evaluator and solvers use these functions; the
runtime's choice of a replica follows them. Under ``batch`` fractions are chosen anew for every
window: :mod:`eplb.batch_split`.
Shape letters: L layers, E logical experts, S slots, R ranks, N nodes, M ranks of a node.
"""

from __future__ import annotations

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput, unknown_name
from eplb.slots import replica_count
from eplb.topology import Topology

__all__ = ["SPLIT_RULES", "check_speeds", "check_split", "slot_share"]

SPLIT_RULES = ("even", "nearest", "weighted", "batch")


def check_split(split: str, split_weights_LS: FloatArray | None) -> None:
    """Raise unless ``split`` is a rule, and a placement has fractions where it needs them.

    Raises
    ------
    InvalidInput
        The rule is unknown, or is ``weighted`` and there are no split weights.
    """
    if split not in SPLIT_RULES:
        raise unknown_name("split rule", split, SPLIT_RULES)
    if split == "weighted" and split_weights_LS is None:
        raise InvalidInput(
            "split weighted needs split_weights and this placement has none; plan with "
            "--split weighted, or use another rule"
        )


def check_speeds(split: str, topology: Topology) -> None:
    """Raise where the ranks' speeds differ and the best split of a batch would have to know them.

    Raises
    ------
    InvalidInput
        The rule is ``batch`` and ranks differ in speed.
    """
    if split == "batch" and topology.rank_speed is not None:
        raise InvalidInput(
            "split batch divides batches over ranks of one speed, and rank_speed says that they "
            "differ; use even, nearest or weighted, or leave rank_speed out"
        )


def slot_share(
    phys_to_log_LS: IntArray,
    num_experts: int,
    topology: Topology,
    split: str,
    split_weights_LS: FloatArray | None = None,
) -> FloatArray:
    """Return the fraction of its expert's tokens that each slot receives, shape [L, S].

    Fractions of an expert's slots add up to 1; empty slots receive 0.

    Raises
    ------
    InvalidInput
        ``split`` is not a rule, or is ``weighted`` without split weights, or ``batch``, whose
        fractions are different in every window.
    """
    check_split(split, split_weights_LS)
    if split == "even":
        return _even(phys_to_log_LS, num_experts)
    if split == "nearest":
        return _nearest(phys_to_log_LS, num_experts, topology)
    if split == "weighted":
        assert split_weights_LS is not None
        return split_weights_LS
    raise InvalidInput(
        "under split batch every window has fractions of its own; use even, nearest or weighted "
        "where one set of fractions is needed"
    )


def _even(phys_to_log_LS: IntArray, num_experts: int) -> FloatArray:
    """Give each replica the same part, as round robin and hashing do."""
    count_LS = _of_slots(replica_count(phys_to_log_LS, num_experts), phys_to_log_LS)
    return np.where(phys_to_log_LS >= 0, 1.0 / np.maximum(count_LS, 1), 0.0)


def _nearest(phys_to_log_LS: IntArray, num_experts: int, topology: Topology) -> FloatArray:
    """Let a rank use its own replicas, else those of its node, else all; evenly in each class.

    For a slot on rank r of node n, whose expert has d replicas on r, c on n and a in all, is on h
    of the M ranks of n and on nodes with q ranks, the share is::

        (1/R) * (1/d + (M - h)/c + (R - q)/a)

    from its own rank, from ranks of its node without a replica, and from nodes without one. Ranks
    are those in service.
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
    sources = topology.ranks_in_service
    sources_N = np.bincount(sources // topology.ranks_per_node, minlength=num_nodes)
    near_LS = to_slots((on_node_LEN > 0) @ sources_N)
    share_LS = (
        1.0 / np.maximum(own_rank_LS, 1)
        + (sources_N[node_S] - node_ranks_LS) / np.maximum(own_node_LS, 1)
        + (len(sources) - near_LS) / np.maximum(total_LS, 1)
    ) / len(sources)
    return np.where(filled, share_LS, 0.0)


def _of_slots(values_LE: IntArray, phys_to_log_LS: IntArray) -> IntArray:
    """Return each slot's value of its expert; an empty slot shows that of expert 0."""
    values: IntArray = np.take_along_axis(values_LE, np.maximum(phys_to_log_LS, 0), axis=1)
    return values
