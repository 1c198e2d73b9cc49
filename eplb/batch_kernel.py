"""The compiled half of :mod:`eplb.batch_split`: one window after the other, exactly.

Importing this module costs numba; only a call for the ``batch`` rule does so. A *share* is what an
expert of several ranks has on one of them; shares of an expert stand side by side.
Shape letters: W windows, E logical experts, R ranks, M experts on several ranks, X shares.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from eplb.arrays import FloatArray, IntArray

__all__ = ["best_rank_load"]

# Sweeps of the relaxation: measured on 32 to 144 ranks, more of them cost more than the paths that
# they save.
_SWEEPS = 6
_OVER_RELAXATION = 1.5
# Rank loads end at most this much above the bound that proves them, relative to the mean.
_TOLERANCE = 1e-12


@njit(cache=True, nogil=True)
def best_rank_load(
    load_WE: FloatArray,
    base_WR: FloatArray,
    expert_M: IntArray,
    first_M1: IntArray,
    rank_X: IntArray,
    by_rank_X: IntArray,
    first_R1: IntArray,
) -> FloatArray:
    """Return the rank loads of a best split of each window, shape [W, R].

    Parameters
    ----------
    load_WE, base_WR : array of float64
        Loads, and what each rank has of experts that are nowhere else.
    expert_M, first_M1 : array of int64
        The experts on several ranks, and where each one's shares begin (and the last one's end).
    rank_X : array of int64
        Rank of each share.
    by_rank_X, first_R1 : array of int64
        Shares in order of rank, and where each rank's begin.
    """
    num_ranks = base_WR.shape[1]
    owner_X = np.empty(len(rank_X), np.int64)
    for m in range(len(expert_M)):
        owner_X[first_M1[m] : first_M1[m + 1]] = m
    out_WR = base_WR.copy()
    part_X = np.empty(len(rank_X))
    for w in range(len(load_WE)):
        load_R = out_WR[w]
        for m in range(len(expert_M)):
            first, end = first_M1[m], first_M1[m + 1]
            part = load_WE[w, expert_M[m]] / (end - first)
            for x in range(first, end):
                part_X[x] = part
                load_R[rank_X[x]] += part
        _relax(load_R, part_X, first_M1, rank_X)
        mean = load_R.sum() / num_ranks
        if mean > 0.0:
            _finish(load_R, part_X, mean, owner_X, first_M1, rank_X, by_rank_X, first_R1)
    return out_WR


@njit(cache=True, nogil=True)
def _relax(load_R: FloatArray, part_X: FloatArray, first_M1: IntArray, rank_X: IntArray) -> None:
    """Bring the rank loads near each other: Gauss-Seidel on their sum of squares, in place.

    Over the splits the minimum of the sum of squares is a minimum of the maximum as well.
    """
    for sweep in range(_SWEEPS):
        step = 0.5 if sweep == 0 else 0.5 * _OVER_RELAXATION
        for m in range(len(first_M1) - 1):
            first, end = first_M1[m], first_M1[m + 1]
            # Two shares are one pair; of more of them each meets its two neighbours.
            for x in range(first, end - 1 if end - first == 2 else end):
                y = x + 1 if x + 1 < end else first
                a, b = rank_X[x], rank_X[y]
                moved = min(max(step * (load_R[a] - load_R[b]), -part_X[y]), part_X[x])
                part_X[x] -= moved
                part_X[y] += moved
                load_R[a] -= moved
                load_R[b] += moved


@njit(cache=True, nogil=True)
def _finish(
    load_R: FloatArray,
    part_X: FloatArray,
    mean: float,
    owner_X: IntArray,
    first_M1: IntArray,
    rank_X: IntArray,
    by_rank_X: IntArray,
    first_R1: IntArray,
) -> None:
    """Lower the largest rank load to its minimum, in place.

    No split gets the largest load below ``target``, which starts at the mean. Load above it moves
    along the shortest path of shared experts to a rank below it. A rank without such a path
    reaches only ranks at or above the target, and none of their tokens can leave them: their mean
    load is the next target (Dinkelbach's method, on the cuts of a maximum flow).
    """
    num_ranks = len(load_R)
    target = mean
    slack = _TOLERANCE * mean
    queue = np.empty(num_ranks, np.int64)
    from_R = np.empty(num_ranks, np.int64)
    to_R = np.empty(num_ranks, np.int64)
    while True:
        top = np.argmax(load_R)
        if load_R[top] <= target + slack:
            return
        queue[0] = top
        low, reached = _search(
            load_R, part_X, target, owner_X, first_M1, rank_X, by_rank_X, first_R1,
            queue, from_R, to_R,
        )  # fmt: skip
        if low < 0:
            above = 0.0
            for i in range(reached):
                above += load_R[queue[i]]
            if above / reached <= target:
                # Only rounding is left.
                return
            target = above / reached
            continue
        moved = min(load_R[top] - target, target - load_R[low])
        b = low
        while b != top:
            moved = min(moved, part_X[from_R[b]])
            b = rank_X[from_R[b]]
        b = low
        while b != top:
            part_X[from_R[b]] -= moved
            part_X[to_R[b]] += moved
            b = rank_X[from_R[b]]
        load_R[top] -= moved
        load_R[low] += moved


@njit(cache=True, nogil=True)
def _search(
    load_R: FloatArray,
    part_X: FloatArray,
    target: float,
    owner_X: IntArray,
    first_M1: IntArray,
    rank_X: IntArray,
    by_rank_X: IntArray,
    first_R1: IntArray,
    queue: IntArray,
    from_R: IntArray,
    to_R: IntArray,
) -> tuple[int, int]:
    """Look, breadth first from ``queue[0]``, for a rank below the target that load can move to.

    Returns the rank (or -1), and how many ranks the queue holds: without a rank below, all that
    can be reached. ``from_R`` and ``to_R`` become the shares that give and take on the way.
    """
    seen_R = np.zeros(len(load_R), np.bool_)
    seen_R[queue[0]] = True
    head, tail = 0, 1
    while head < tail:
        a = queue[head]
        head += 1
        for i in range(first_R1[a], first_R1[a + 1]):
            x = by_rank_X[i]
            if part_X[x] <= 0.0:
                continue
            m = owner_X[x]
            for y in range(first_M1[m], first_M1[m + 1]):
                b = rank_X[y]
                if seen_R[b]:
                    continue
                seen_R[b] = True
                from_R[b] = x
                to_R[b] = y
                queue[tail] = b
                tail += 1
                if load_R[b] < target:
                    return b, tail
    return -1, tail
