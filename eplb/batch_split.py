"""The ``batch`` rule: each window's tokens divide over the replicas in the best way for it.

The largest rank load at the best split is the optimum of a linear programme; here it is found
exactly, by a relaxation and a few augmenting paths (:mod:`eplb.batch_kernel`), for thousands of
windows a second.
Shape letters: W windows, E logical experts, S slots, R ranks, M experts on several ranks, X shares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray

__all__ = ["batch_max_load", "batch_rank_load"]


def batch_max_load(
    counts_WE: NDArray[np.number], phys_to_log_S: IntArray, num_ranks: int
) -> FloatArray:
    """Return the largest rank load of each window at its best split, shape [W].

    Parameters
    ----------
    counts_WE : array
        Non-negative loads of one layer.
    phys_to_log_S : array of int
        The expert in each slot, -1 for an empty one; every expert has a slot.
    num_ranks : int
        Divides S.

    Notes
    -----
    In the unit of the counts, and exact up to rounding (1e-12 of the mean rank load).
    """
    largest_W: FloatArray = batch_rank_load(counts_WE, phys_to_log_S, num_ranks).max(axis=1)
    return largest_W


def batch_rank_load(
    counts_WE: NDArray[np.number], phys_to_log_S: IntArray, num_ranks: int
) -> FloatArray:
    """Return the rank loads of each window at a best split of it, shape [W, R].

    Takes what :func:`batch_max_load` takes. The largest load is unique, the others need not be.
    """
    # Numba takes a second to import, and only this rule needs it.
    from eplb.batch_kernel import best_rank_load  # noqa: PLC0415

    load_WE = np.ascontiguousarray(counts_WE, np.float64)
    num_experts = load_WE.shape[1]
    slots_per_rank = len(phys_to_log_S) // num_ranks
    filled = np.flatnonzero(phys_to_log_S >= 0)
    # Each pair of expert and rank once, in order of experts: two replicas on one rank are as one.
    pair = np.unique(phys_to_log_S[filled] * num_ranks + filled // slots_per_rank)
    expert_P, rank_P = pair // num_ranks, pair % num_ranks
    count_E = np.bincount(expert_P, minlength=num_experts)
    shared_P = count_E[expert_P] > 1
    base_WR = np.zeros((len(load_WE), num_ranks))
    np.add.at(base_WR.T, rank_P[~shared_P], load_WE.T[expert_P[~shared_P]])
    expert_M = np.flatnonzero(count_E > 1)
    rank_X = rank_P[shared_P]
    by_rank_X = np.argsort(rank_X, kind="stable")
    ranks_R1 = np.arange(num_ranks + 1)
    rank_load_WR: FloatArray = best_rank_load(
        load_WE,
        base_WR,
        expert_M,
        np.concatenate([[0], np.cumsum(count_E[expert_M])]),
        rank_X,
        by_rank_X,
        np.searchsorted(rank_X[by_rank_X], ranks_R1),
    )
    return rank_load_WR
