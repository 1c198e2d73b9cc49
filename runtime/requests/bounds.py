"""Lower bounds on the largest rank level: one objective at a time, and both together.

Shape letters: Q requests, R ranks.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from eplb.arrays import FloatArray

__all__ = ["joint_bound", "level_bound"]

# Of the joint bound, relative.
PRECISION = 1e-4


def level_bound(size_Q: FloatArray, level_R: FloatArray, speed_R: FloatArray) -> float:
    """Return a value that the largest level / speed cannot go below, whoever gets what.

    Every request is taken to be placed. The best of four arguments: a level that is there already;
    levels filled evenly, like water; the largest request on the rank where it ends lowest; and, of
    the R + 1 largest requests, two that must share a rank (at least the two smallest of them).

    Parameters
    ----------
    size_Q : array of float64
        Where sizes differ between ranks, the least of them.
    level_R, speed_R : array of float64
        Residual load and speed of ranks in service; speeds are positive.
    """
    bound = float((level_R / speed_R).max(initial=0.0))
    if not size_Q.size:
        return bound
    bound = max(bound, _water_level(float(size_Q.sum()), level_R, speed_R))
    bound = max(bound, float(((level_R + size_Q.max()) / speed_R).min()))
    num_ranks = len(level_R)
    if len(size_Q) > num_ranks:
        largest = np.partition(size_Q, len(size_Q) - num_ranks - 1)[-num_ranks - 1 :]
        two = float(np.partition(largest, 1)[:2].sum())
        bound = max(bound, float(((level_R + two) / speed_R).min()))
    return bound


def _water_level(volume: float, level_R: FloatArray, speed_R: FloatArray) -> float:
    """Return the level that ``volume`` brings the ranks to when it may be divided at will."""
    order = np.argsort(level_R / speed_R)
    level, speed = level_R[order].cumsum(), speed_R[order].cumsum()
    filled = (level + volume) / speed
    # The first k ranks take it all where the next one stands no lower.
    top = np.append((level_R / speed_R)[order][1:], np.inf)
    return float(filled[int(np.argmax(filled <= top))])


@njit(cache=True, nogil=True)
def joint_bound(
    tokens_Q: FloatArray,
    work_Q: FloatArray,
    tokens_R: FloatArray,
    work_R: FloatArray,
    least: float,
) -> float:
    """Return a value that the larger of two levels cannot go below on any assignment.

    Where a giant request fills a rank with attention, that rank is short of tokens and the others
    have to take them. For a level L, take the k largest items by work, residual loads of ranks
    among them, of which no two fit on one rank. Their ranks have ``sum(L - work)`` of attention
    left, which holds no more tokens than the requests with most tokens for their work bring
    (fractional knapsack); the other ranks hold L each. L is too low if that is not all tokens.

    Parameters
    ----------
    tokens_Q, work_Q, tokens_R, work_R : array of float64
        Sizes and residual loads in the units of one level, of ranks of equal speed.
    least : float
        A level that is known to be a bound.
    """
    num_ranks = tokens_R.shape[0]
    work = np.append(work_Q, work_R)
    tokens = np.append(tokens_Q, tokens_R)
    largest = np.argsort(-work)[:num_ranks]
    # Items of those ranks stay in the pool, as the last to be taken: that only lowers the bound.
    by_worth = np.argsort(-tokens / np.maximum(work, 1e-300))
    pool_work, pool_tokens = work[by_worth].cumsum(), tokens[by_worth].cumsum()
    total = tokens.sum()
    low, high = least, 2.0 * least
    while high - low > PRECISION * least:
        level = (low + high) / 2
        room, held, fits = 0.0, 0.0, True
        for k in range(num_ranks):
            item = largest[k]
            if k > 0 and work[largest[k - 1]] + work[item] <= level:
                break
            room += max(level - work[item], 0.0)
            held += tokens[item]
            i = np.searchsorted(pool_work, room)
            more = pool_tokens[i] if i < len(pool_tokens) else (pool_tokens[-1] if i else 0.0)
            if held + more + (num_ranks - k - 1) * level < total * (1.0 - 1e-12):
                fits = False
                break
        if fits:
            high = level
        else:
            low = level
    return low
