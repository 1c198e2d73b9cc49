"""Number the ranks of a new placement so that few experts move from the old one.

A solver does not care which rank is which: exchanging ranks of a placement changes no balance.
Numbering them so that each gets the experts most of which it has already is an assignment problem;
then an expert that stays on its rank stays in its slot.

Shape letters: L layers, E logical experts, S slots, R ranks, K slots of a rank, N nodes, M ranks of
a node.
"""

from __future__ import annotations

import numpy as np

from eplb.arrays import IntArray

__all__ = ["count_moves", "keep_slots", "reorder_slots"]


def keep_slots(new_LS: IntArray, old_LS: IntArray, num_ranks: int, num_nodes: int = 1) -> IntArray:
    """Return the new placement with ranks exchanged and slots reordered to be like the old one.

    Parameters
    ----------
    new_LS, old_LS : array of int, shape [L, S]
        Logical expert in each slot; -1 in the old placement is a slot that holds nothing.
    num_ranks : int
        R; divides S.
    num_nodes : int
        N; divides R. Ranks that shared a node still do, where nodes are more than one.

    Returns
    -------
    kept_LS : array of int, shape [L, S]
        The fewest experts that a rank lacks, over all numberings of ranks (within nodes and of
        nodes); equal experts on a rank count once.
    """
    num_layers = len(new_LS)
    overlap_LRR = _overlap(old_LS, new_LS, num_ranks)
    order_LR = np.stack([_best_order(overlap_RR, num_nodes) for overlap_RR in overlap_LRR])
    new_LRK = new_LS.reshape(num_layers, num_ranks, -1)
    new_LRK = np.take_along_axis(new_LRK, order_LR[:, :, np.newaxis], axis=1)
    kept_LRK = reorder_slots(new_LRK, old_LS.reshape(new_LRK.shape))
    return kept_LRK.reshape(num_layers, -1)


def count_moves(old_LS: IntArray, new_LS: IntArray, num_ranks: int) -> int:
    """Return the experts that ranks have to fetch, over all layers; two slots fetch one twice."""
    shape = len(old_LS), num_ranks, -1
    old_LRK, new_LRK = old_LS.reshape(shape), new_LS.reshape(shape)
    there_LRK = (new_LRK[..., np.newaxis] == old_LRK[:, :, np.newaxis]).any(axis=3)
    return int(np.count_nonzero(~there_LRK & (new_LRK >= 0)))


def _overlap(old_LS: IntArray, new_LS: IntArray, num_ranks: int) -> IntArray:
    """Return how many experts an old and a new rank share, shape [L, R old, R new].

    A join of the slots by layer and expert: much smaller than a product of tables of experts.
    """
    num_layers = len(new_LS)
    num_experts = int(max(old_LS.max(), new_LS.max())) + 1
    old_key, old_rank = _first_slots(old_LS, num_ranks, num_experts)
    new_key, new_rank = _first_slots(new_LS, num_ranks, num_experts)
    old_rank = old_rank[np.argsort(old_key, kind="stable")]
    count = np.bincount(old_key, minlength=num_layers * num_experts)
    first = np.cumsum(count) - count
    matches = count[new_key]
    pair_of = np.repeat(np.arange(len(new_key)), matches)
    number = np.arange(len(pair_of)) - np.repeat(np.cumsum(matches) - matches, matches)
    key = new_key[pair_of]
    cell = (key // num_experts * num_ranks + old_rank[first[key] + number]) * num_ranks
    cell += new_rank[pair_of]
    shared = np.bincount(cell, minlength=num_layers * num_ranks * num_ranks)
    return shared.reshape(num_layers, num_ranks, num_ranks)


def _first_slots(rows_LS: IntArray, num_ranks: int, num_experts: int) -> tuple[IntArray, IntArray]:
    """Return layer * E + expert and the rank of each slot, one slot an expert of a rank."""
    rows_LRK = rows_LS.reshape(len(rows_LS), num_ranks, -1)
    layer, rank, slot = np.nonzero((rows_LRK >= 0) & (_occurrence(rows_LRK) == 0))
    return layer * num_experts + rows_LRK[layer, rank, slot], rank


def _best_order(overlap_RR: IntArray, num_nodes: int) -> IntArray:
    """Return the new rank to put on each rank, so that what they share adds up to the most."""
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415

    if num_nodes == 1:
        _, order_R = linear_sum_assignment(overlap_RR, maximize=True)
        return np.asarray(order_R)
    # Nodes are matched by what the best matching of their ranks is worth.
    num_ranks = len(overlap_RR)
    per_node = num_ranks // num_nodes
    overlap_NNMM = overlap_RR.reshape(num_nodes, per_node, num_nodes, per_node).swapaxes(1, 2)
    order_NNM = np.empty((num_nodes, num_nodes, per_node), np.int64)
    worth_NN = np.empty((num_nodes, num_nodes))
    for old, new in np.ndindex(num_nodes, num_nodes):
        rows, columns = linear_sum_assignment(overlap_NNMM[old, new], maximize=True)
        order_NNM[old, new] = columns
        worth_NN[old, new] = overlap_NNMM[old, new][rows, columns].sum()
    nodes, new_node_N = linear_sum_assignment(worth_NN, maximize=True)
    order_NM = order_NNM[nodes, new_node_N] + new_node_N[:, np.newaxis] * per_node
    return np.asarray(order_NM.reshape(-1))


def reorder_slots(new_LRK: IntArray, old_LRK: IntArray) -> IntArray:
    """Return the experts of each rank with those that stay in their old slots."""
    # The second replica of an expert on a rank is matched to the second one.
    number = max(int(new_LRK.max()), int(old_LRK.max())) + 2
    new_key, old_key = (k + number * _occurrence(k) for k in (new_LRK, old_LRK))
    same_LRKK = old_key[..., np.newaxis] == new_key[:, :, np.newaxis]
    same_LRKK &= (old_LRK >= 0)[..., np.newaxis]
    stays_LRK, placed_LRK = same_LRKK.any(axis=3), same_LRKK.any(axis=2)
    kept_LRK = np.where(stays_LRK, old_LRK, 0)
    # Each rank has as many experts left as slots, so both sides run in step.
    kept_LRK[~stays_LRK] = new_LRK[~placed_LRK]
    return kept_LRK


def _occurrence(rows_LRK: IntArray) -> IntArray:
    """Return how many earlier slots of the rank hold the same expert, shape [L, R, K]."""
    same = rows_LRK[..., np.newaxis] == rows_LRK[:, :, np.newaxis]
    earlier = np.tri(rows_LRK.shape[2], k=-1, dtype=bool)
    count: IntArray = (same & earlier).sum(axis=3)
    return count
