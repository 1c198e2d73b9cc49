"""The ``greedy`` solver: DeepSeek's EPLB as an array program over all layers at once.

Hierarchical: pack expert groups to nodes, replicate within nodes, pack replicas to the node's
ranks. Global: the same with one group and one node. Described in the README of
github.com/deepseek-ai/EPLB (commit d52c72d); written anew from that description.

Shape letters: L layers, E logical experts, S slots, G groups, N nodes, R ranks; X = L * N rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import IntArray, take_rows
from eplb.placement.packing import falling_order, pack_balanced
from eplb.placement.replication import replicate
from eplb.placement.spread import spread_replicas

__all__ = ["place_greedy"]

Order = Callable[[NDArray[np.float32]], IntArray]


def place_greedy(
    load_LE: NDArray[np.float32],
    *,
    num_slots: int,
    num_ranks: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    distinct_ranks: bool = False,
    order: Order = falling_order,
) -> tuple[IntArray, IntArray]:
    """Return the expert and the replica number of each slot, both of shape [L, S].

    Parameters
    ----------
    load_LE : array of float32
        Non-negative loads with finite sums.
    num_slots, num_ranks : int
        S is a multiple of R and at least E.
    num_nodes, num_groups : int
        More than one node asks for the hierarchical policy: groups are then a multiple of nodes
        and divide the experts, and ranks are a multiple of nodes.
    distinct_ranks : bool
        Never place two replicas of an expert on one rank. Needs S <= E * R / N. False gives
        DeepSeek's own results.
    order : callable
        Items of each row by falling weight, for the packing.
    """
    num_layers, num_experts = load_LE.shape
    experts_of_node = num_experts // num_nodes
    ranks_of_node = num_ranks // num_nodes
    slots_of_node = num_slots // num_nodes

    node_expert_LE = _experts_by_node(load_LE, num_nodes, num_groups, order)
    node_load_LE = load_LE if node_expert_LE is None else take_rows(load_LE, node_expert_LE)
    node_load_XE = node_load_LE.reshape(num_layers * num_nodes, experts_of_node)
    expert_XS, replica_XS, replica_load_XE = replicate(
        node_load_XE, slots_of_node, ranks_of_node if distinct_ranks else slots_of_node
    )
    load_XS = take_rows(replica_load_XE, expert_XS)
    slot_XS = pack_balanced(load_XS, order(load_XS), ranks_of_node)
    expert_XS = take_rows(expert_XS, slot_XS)
    replica_XS = take_rows(replica_XS, slot_XS)
    if distinct_ranks:
        load_XS = take_rows(load_XS, slot_XS).astype(np.float64)
        spread_replicas(replica_XS, expert_XS, load_XS, ranks_of_node)

    replica_LS = replica_XS.reshape(num_layers, num_slots)
    first_N = np.arange(num_nodes)[:, np.newaxis] * experts_of_node
    expert_LS = (expert_XS.reshape(num_layers, num_nodes, -1) + first_N).reshape(num_layers, -1)
    if node_expert_LE is not None:
        expert_LS = take_rows(node_expert_LE, expert_LS)
    return expert_LS, replica_LS


def _experts_by_node(
    load_LE: NDArray[np.float32], num_nodes: int, num_groups: int, order: Order
) -> IntArray | None:
    """Return the experts node by node, shape [L, E], or None if they keep their order."""
    if num_groups == num_nodes:
        return None
    num_layers, num_experts = load_LE.shape
    group_size = num_experts // num_groups
    # Added in float64 and rounded once: the order in which float32 sums are taken differs from
    # machine to machine in torch.
    load_LG = (
        load_LE.reshape(num_layers, num_groups, group_size)
        .sum(axis=2, dtype=np.float64)
        .astype(np.float32)
    )
    group_LG = pack_balanced(load_LG, order(load_LG), num_nodes)
    expert_LGE = group_LG[:, :, np.newaxis] * group_size + np.arange(group_size)
    expert_LE: IntArray = expert_LGE.reshape(num_layers, num_experts)
    return expert_LE
