"""Kernels of the decode balancer: place the arrivals of a step, and find swaps.

Shape letters: Q arrivals, R ranks, M places of a rank. Places 0 to ``count_R[r]`` of a row are
filled; the KV cache of the request in one is ``base_RM + step``, for it grows by a token a step.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray

__all__ = ["NOT_PLACED", "find_swaps", "place_arrivals"]

NOT_PLACED = -1
# Light ranks that a full one looks for a partner in.
PARTNERS = 6


@njit(cache=True, nogil=True)
def place_arrivals(
    order_Q: IntArray,
    kv_tokens_Q: IntArray,
    overdue_Q: NDArray[np.bool_],
    kv_R: FloatArray,
    count_R: IntArray,
    capacity_R: FloatArray,
    speed_R: FloatArray,
    max_requests: int,
    count_slack: float,
    reserve_tokens: float,
) -> IntArray:
    """Place arrivals in order and return their ranks; ``kv_R`` and ``count_R`` are updated.

    A rank is in the band while its count is at most its share of all requests, rounded up after
    adding the slack. Of those with room the one that ends with least KV for its speed is taken. If
    none of the band has room, the emptiest by count has to do. Each running request keeps
    ``reserve_tokens`` to grow into. An overdue request without room reserves the first rank that is
    free of reservations: nothing younger goes there.
    """
    num_ranks = kv_R.shape[0]
    rank_Q = np.full(order_Q.shape[0], NOT_PLACED, np.int64)
    speed = speed_R.sum()
    if speed <= 0.0:
        return rank_Q
    everyone = count_R[speed_R > 0.0].sum() + order_Q.shape[0]
    limit_R = np.ceil(everyone * (1.0 + count_slack) * speed_R / speed - 1e-9)
    reserved_R = speed_R <= 0.0
    for q in order_Q:
        best, best_in_band, best_key = NOT_PLACED, False, np.inf
        for r in range(num_ranks):
            kv = kv_R[r] + kv_tokens_Q[q]
            if (
                reserved_R[r]
                or count_R[r] >= max_requests
                or kv + reserve_tokens * (count_R[r] + 1) > capacity_R[r]
            ):
                continue
            in_band = count_R[r] < limit_R[r]
            if best_in_band and not in_band:
                continue
            key = (kv if in_band else float(count_R[r])) / speed_R[r]
            if (in_band and not best_in_band) or key < best_key:
                best, best_in_band, best_key = r, in_band, key
        if best != NOT_PLACED:
            kv_R[best] += kv_tokens_Q[q]
            count_R[best] += 1
            rank_Q[q] = best
        elif overdue_Q[q]:
            # The oldest one so holds on to the same rank from step to step.
            reserved_R[np.argmin(reserved_R)] = True
    return rank_Q


@njit(cache=True, nogil=True)
def find_swaps(
    base_RM: IntArray,
    count_R: IntArray,
    kv_R: FloatArray,
    capacity_R: FloatArray,
    speed_R: FloatArray,
    moving_R: NDArray[np.bool_],
    step: int,
    band: float,
    max_swaps: int,
    max_tokens: float,
) -> IntArray:
    """Return exchanges that bring the fullest ranks below the band, shape [swaps, 4].

    A row is the full rank, its place, the light rank, its place. A rank takes part in one exchange,
    and in none while it is ``moving``.
    Of the exchanges that bring the full rank to the band and keep the light one below it, the one
    with fewest tokens to move; if there are none, the one after which the higher of the two is
    lowest. No rank sends more than ``max_tokens``. ``kv_R`` is updated.
    """
    swap_X4 = np.empty((max_swaps, 4), np.int64)
    num_ranks = kv_R.shape[0]
    speed, total = 0.0, 0.0
    for r in range(num_ranks):
        if speed_R[r] > 0.0:
            speed, total = speed + speed_R[r], total + kv_R[r]
    if speed <= 0.0:
        return swap_X4[:0]
    target = total / speed * (1.0 + band)
    free_R = (speed_R > 0.0) & ~moving_R
    found = 0
    while found < max_swaps:
        full, level = -1, target
        for r in range(num_ranks):
            if free_R[r] and kv_R[r] > level * speed_R[r]:
                full, level = r, kv_R[r] / speed_R[r]
        if full < 0:
            break
        i, light, j = _best_partner(full, target, base_RM, count_R, kv_R, capacity_R, speed_R,
                                    free_R, step, max_tokens)  # fmt: skip
        free_R[full] = False
        if i < 0:
            continue
        moved = base_RM[full, i] - base_RM[light, j]
        kv_R[full] -= moved
        kv_R[light] += moved
        free_R[light] = False
        swap_X4[found] = (full, i, light, j)
        found += 1
    return swap_X4[:found]


@njit(cache=True, nogil=True)
def _best_partner(
    full: int,
    target: float,
    base_RM: IntArray,
    count_R: IntArray,
    kv_R: FloatArray,
    capacity_R: FloatArray,
    speed_R: FloatArray,
    free_R: NDArray[np.bool_],
    step: int,
    max_tokens: float,
) -> tuple[int, int, int]:
    """Return the place that a full rank gives, the rank it gives it to, and that one's place."""
    need = kv_R[full] - target * speed_R[full]
    best = (-1, -1, -1)
    fewest, lowest = np.inf, kv_R[full] / speed_R[full] * (1.0 - 1e-3)
    candidates = np.argsort(np.where(free_R, kv_R / np.maximum(speed_R, 1e-9), np.inf))
    for light in candidates[: min(PARTNERS, kv_R.shape[0])]:
        room = target * speed_R[light] - kv_R[light]
        if light == full or not free_R[light] or room <= 0.0:
            continue
        for i in range(count_R[full]):
            given = base_RM[full, i] + step
            if given > max_tokens or (given < need and fewest < np.inf):
                continue
            for j in range(count_R[light]):
                taken = base_RM[light, j] + step
                moved = given - taken
                if moved <= 0 or kv_R[light] + moved > capacity_R[light]:
                    continue
                if need <= moved <= room:
                    if given + taken < fewest:
                        fewest, best = given + taken, (i, light, j)
                elif fewest == np.inf:
                    after = max(
                        (kv_R[full] - moved) / speed_R[full],
                        (kv_R[light] + moved) / speed_R[light],
                    )
                    if after < lowest:
                        lowest, best = after, (i, light, j)
    return best
