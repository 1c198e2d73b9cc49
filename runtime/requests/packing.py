"""Kernels that spread waiting requests over ranks, two objectives at once.

Each request has two sizes, new tokens and attention work, and each rank two levels. Levels are
divided by what is best possible for each (their bounds), and the larger one counts: vector
longest-first packing, then exchanges that lower the highest rank.
Shape letters: Q requests, R ranks, C sizes that differ between ranks (R of them, or 1).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray

__all__ = ["NOT_PLACED", "pack", "refine"]

NOT_PLACED = -1
# Only the lightest ranks are asked to exchange with the highest one.
PARTNERS = 4


@njit(cache=True, nogil=True)
def pack(
    order_Q: IntArray,
    overdue_Q: NDArray[np.bool_],
    tokens_QC: FloatArray,
    work_QC: FloatArray,
    kv_tokens_Q: IntArray,
    tokens_R: FloatArray,
    work_R: FloatArray,
    kv_free_R: IntArray,
    places_R: IntArray,
    slowness_R: FloatArray,
    cache_weight: float,
) -> IntArray:
    """Place requests in order and return their ranks, ``NOT_PLACED`` where no rank has room.

    Sizes and levels are in units of their bounds and weighted; ``slowness_R`` is 1 / speed. Arrays
    of ranks are updated; a rank that takes nothing has no places and -1 free. An overdue request
    without room reserves the first rank that is free of reservations: nothing younger goes there.
    The oldest one so holds on to the same rank from call to call.

    Where prefixes are cached on some ranks only, a request's own size there counts once more,
    ``cache_weight`` times, so that a hit outweighs a higher level.
    """
    num_ranks = tokens_R.shape[0]
    per_rank = tokens_QC.shape[1] > 1
    rank_Q = np.full(kv_tokens_Q.shape[0], NOT_PLACED, np.int64)
    reserved_R = np.zeros(num_ranks, np.bool_)
    for q in order_Q:
        best, best_level, best_sum = NOT_PLACED, np.inf, np.inf
        for r in range(num_ranks):
            if places_R[r] <= 0 or kv_free_R[r] < kv_tokens_Q[q] or reserved_R[r]:
                continue
            c = r if per_rank else 0
            tokens = (tokens_R[r] + tokens_QC[q, c]) * slowness_R[r]
            work = (work_R[r] + work_QC[q, c]) * slowness_R[r]
            level = max(tokens, work)
            if per_rank:
                level += cache_weight * max(tokens_QC[q, c], work_QC[q, c])
            total = tokens + work
            if level < best_level or (level == best_level and total < best_sum):
                best, best_level, best_sum = r, level, total
        if best != NOT_PLACED:
            c = best if per_rank else 0
            tokens_R[best] += tokens_QC[q, c]
            work_R[best] += work_QC[q, c]
            kv_free_R[best] -= kv_tokens_Q[q]
            places_R[best] -= 1
            rank_Q[q] = best
        elif overdue_Q[q]:
            for r in range(num_ranks):
                if not reserved_R[r] and kv_free_R[r] >= 0:
                    reserved_R[r] = True
                    break
    return rank_Q


@njit(cache=True, nogil=True)
def refine(
    rank_Q: IntArray,
    tokens_QC: FloatArray,
    work_QC: FloatArray,
    kv_tokens_Q: IntArray,
    tokens_R: FloatArray,
    work_R: FloatArray,
    kv_free_R: IntArray,
    places_R: IntArray,
    slowness_R: FloatArray,
    goal: float,
    max_rounds: int,
) -> int:
    """Move or exchange requests while that lowers the highest rank; return the rounds used.

    ``rank_Q`` and the arrays of ranks are updated. Ends when no rank is above ``goal``, or nothing
    lowers the highest one.
    """
    num_ranks = tokens_R.shape[0]
    level_R = np.maximum(tokens_R, work_R) * slowness_R
    for rounds in range(max_rounds):
        high = int(np.argmax(level_R))
        best_level = level_R[high] * (1.0 - 1e-9)
        if best_level <= goal:
            return rounds
        best_q, best_p, best_r = NOT_PLACED, NOT_PLACED, NOT_PLACED
        for r in np.argsort(level_R)[: min(PARTNERS, num_ranks - 1)]:
            if best_level <= goal:
                break
            level, q, p = _best_exchange(
                high, r, best_level, rank_Q, tokens_QC, work_QC, kv_tokens_Q, tokens_R, work_R,
                kv_free_R, places_R, slowness_R)  # fmt: skip
            if level < best_level:
                best_level, best_q, best_p, best_r = level, q, p, r
        if best_q == NOT_PLACED:
            return rounds
        _move(best_q, high, best_r, rank_Q, tokens_QC, work_QC, kv_tokens_Q, tokens_R, work_R,
              kv_free_R, places_R)  # fmt: skip
        if best_p != NOT_PLACED:
            _move(best_p, best_r, high, rank_Q, tokens_QC, work_QC, kv_tokens_Q, tokens_R, work_R,
                  kv_free_R, places_R)  # fmt: skip
        for r in (high, best_r):
            level_R[r] = max(tokens_R[r], work_R[r]) * slowness_R[r]
    return max_rounds


@njit(cache=True, nogil=True)
def _best_exchange(
    high: int,
    low: int,
    level: float,
    rank_Q: IntArray,
    tokens_QC: FloatArray,
    work_QC: FloatArray,
    kv_tokens_Q: IntArray,
    tokens_R: FloatArray,
    work_R: FloatArray,
    kv_free_R: IntArray,
    places_R: IntArray,
    slowness_R: FloatArray,
) -> tuple[float, int, int]:
    """Return the move or exchange between two ranks whose higher level is lowest.

    As that level, the request that leaves the high rank, and the one that comes back; nothing is
    returned for either where no exchange is below ``level``.
    """
    per_rank = tokens_QC.shape[1] > 1
    ch, cl = (high, low) if per_rank else (0, 0)
    best_q, best_p = NOT_PLACED, NOT_PLACED
    lows = np.flatnonzero(rank_Q == low)
    for q in np.flatnonzero(rank_Q == high):
        high_tokens = tokens_R[high] - tokens_QC[q, ch]
        high_work = work_R[high] - work_QC[q, ch]
        low_tokens = tokens_R[low] + tokens_QC[q, cl]
        low_work = work_R[low] + work_QC[q, cl]
        if places_R[low] > 0 and kv_free_R[low] >= kv_tokens_Q[q]:
            after = max(
                max(high_tokens, high_work) * slowness_R[high],
                max(low_tokens, low_work) * slowness_R[low],
            )
            if after < level:
                level, best_q, best_p = after, int(q), NOT_PLACED
        for p in lows:
            extra = kv_tokens_Q[q] - kv_tokens_Q[p]
            if kv_free_R[low] < extra or kv_free_R[high] < -extra:
                continue
            high_after = max(high_tokens + tokens_QC[p, ch], high_work + work_QC[p, ch])
            low_after = max(low_tokens - tokens_QC[p, cl], low_work - work_QC[p, cl])
            after = max(high_after * slowness_R[high], low_after * slowness_R[low])
            if after < level:
                level, best_q, best_p = after, int(q), int(p)
    return level, best_q, best_p


@njit(cache=True, nogil=True)
def _move(
    q: int,
    source: int,
    target: int,
    rank_Q: IntArray,
    tokens_QC: FloatArray,
    work_QC: FloatArray,
    kv_tokens_Q: IntArray,
    tokens_R: FloatArray,
    work_R: FloatArray,
    kv_free_R: IntArray,
    places_R: IntArray,
) -> None:
    """Take a request from one rank to another."""
    per_rank = tokens_QC.shape[1] > 1
    cs, ct = (source, target) if per_rank else (0, 0)
    tokens_R[source] -= tokens_QC[q, cs]
    work_R[source] -= work_QC[q, cs]
    kv_free_R[source] += kv_tokens_Q[q]
    places_R[source] += 1
    tokens_R[target] += tokens_QC[q, ct]
    work_R[target] += work_QC[q, ct]
    kv_free_R[target] -= kv_tokens_Q[q]
    places_R[target] -= 1
    rank_Q[q] = target
