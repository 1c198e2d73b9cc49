"""Which node each rank is in, so that an expert's replicas are on different nodes.

Under ``nearest`` a source rank prefers the replicas of its own node, and two of them there get less
each than a replica that has its node to itself. With every replica of an expert on another node
each receives the same part, so a placement made for ``even`` costs under ``nearest`` what it costs
under ``even``. Ranks are alike but for their nodes, so two whole ranks can change places.
Importing this module costs numba. Shape letters: E logical experts, S slots, R ranks, N nodes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from eplb.arrays import FloatArray, IntArray
from eplb.topology import Topology

__all__ = ["spread_over_nodes"]


def spread_over_nodes(phys_to_log_S: IntArray, load_E: FloatArray, topology: Topology) -> IntArray:
    """Return the same ranks in an order that puts few replicas of an expert on one node, shape [S].

    Parameters
    ----------
    phys_to_log_S : array of int64
        -1 for an empty slot.
    load_E : array of float64
        Replicas of hot experts count more.
    topology : Topology

    Notes
    -----
    Best swap first until none helps: a local optimum, which may leave replicas together.
    """
    row_RK = phys_to_log_S.reshape(topology.num_ranks, -1)
    rank_R1 = np.arange(topology.num_ranks)[:, np.newaxis]
    count_RE = np.zeros((topology.num_ranks, len(load_E) + 1))
    np.add.at(count_RE, (rank_R1, row_RK), 1.0)
    held_RE = count_RE[:, :-1]
    # Two replicas of an expert on one node cost what a replica carries.
    shared_RR = (held_RE * (load_E / np.maximum(held_RE.sum(axis=0), 1.0))) @ held_RE.T
    order_R = _order(np.ascontiguousarray(shared_RR), topology.ranks_per_node)
    spread_S: IntArray = row_RK[order_R].reshape(-1)
    return spread_S


@njit(cache=True, nogil=True)
def _order(shared_RR: FloatArray, per_node: int) -> IntArray:  # noqa: PLR0912 (one loop)
    """Return which rank comes where, so that the ranks of a node share least."""
    num_ranks = len(shared_RR)
    order_R = np.arange(num_ranks)
    # What each rank shares with the others of each node.
    with_RN = np.zeros((num_ranks, num_ranks // per_node))
    for place in range(num_ranks):
        for rank in range(num_ranks):
            if rank != order_R[place]:
                with_RN[rank, place // per_node] += shared_RR[rank, order_R[place]]
    # Each swap helps, so they end by themselves; the limit is against rounding.
    for _ in range(num_ranks * num_ranks):
        least, first, second = -1e-12 * shared_RR.max(), -1, -1
        for a in range(num_ranks):
            r, n = order_R[a], a // per_node
            if with_RN[r, n] <= 0.0:
                continue
            for b in range(num_ranks):
                s, m = order_R[b], b // per_node
                if n == m:
                    continue
                change = (
                    with_RN[r, m] + with_RN[s, n] - with_RN[r, n] - with_RN[s, m]
                    - 2.0 * shared_RR[r, s]
                )  # fmt: skip
                if change < least:
                    least, first, second = change, a, b
        if first < 0:
            break
        r, s, n, m = order_R[first], order_R[second], first // per_node, second // per_node
        for rank in range(num_ranks):
            if rank != r:
                with_RN[rank, n] -= shared_RR[rank, r]
                with_RN[rank, m] += shared_RR[rank, r]
            if rank != s:
                with_RN[rank, m] -= shared_RR[rank, s]
                with_RN[rank, n] += shared_RR[rank, s]
        order_R[first], order_R[second] = s, r
    return order_R
