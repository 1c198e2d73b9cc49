"""The compiled half of :mod:`eplb.placement.pairs`: a tabu search over replica counts.

Importing this module costs numba. Shape letters: E logical experts, S slots.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from eplb.arrays import FloatArray, IntArray

__all__ = ["search_counts"]

# The search aims this much below the best so far. Aiming lower, at the bound, was measured worse.
_AIM = 1e-4
# Experts tried at random beside those of the pair that is too full.
_EXTRA = 4
# Counts above are one entry of the tabu list.
_LISTED = 64


@njit(cache=True, nogil=True)
def search_counts(
    load_E: FloatArray, start_E: IntArray, num_slots: int, evaluations: int, seed: int, low: float
) -> tuple[IntArray, float]:
    """Return replica counts of a small largest pair, and that pair.

    Replicas in order of load pair up first with last (the best there is for given counts). One of
    the pairs above the aim is picked, and one of its two experts gets a replica, at the cost of
    another expert's or of an empty slot: the change that leaves least load above the aim, even
    if that is more than before. A count just left is barred for some steps.

    Parameters
    ----------
    load_E, start_E : arrays
        Loads and replica counts to start from.
    num_slots, evaluations, seed : int
        Slots of a layer (even), the work to spend in changes looked at, and the random seed.
    low : float
        A bound: the search ends where it is met.
    """
    np.random.seed(seed)  # noqa: NPY002 (numba has this generator only)
    count_E = start_E.copy()
    best_E = start_E.copy()
    value_S = np.empty(num_slots)
    trial_S = np.empty(num_slots)
    barred = np.zeros((len(load_E), _LISTED), np.int64)
    order_E = np.argsort(-load_E / count_E)
    _fill(load_E, count_E, order_E, -1, -1, value_S)
    best = _largest(value_S)
    step, spent = 0, 0
    while spent < evaluations and best > low:
        step += 1
        tried = _tried(load_E, count_E, value_S, best * (1.0 - _AIM))
        more, fewer, looked_at = _best_change(
            load_E, count_E, order_E, tried, barred, step, best * (1.0 - _AIM), trial_S
        )
        spent += 1 + looked_at
        if more < 0:
            continue
        _bar(barred, more, count_E[more], step)
        count_E[more] += 1
        if fewer >= 0:
            _bar(barred, fewer, count_E[fewer], step)
            count_E[fewer] -= 1
        order_E = np.argsort(-load_E / count_E)
        _fill(load_E, count_E, order_E, -1, -1, value_S)
        largest = _largest(value_S)
        if largest < best:
            best = largest
            best_E[:] = count_E
    return best_E, best


@njit(cache=True, nogil=True)
def _tried(load_E: FloatArray, count_E: IntArray, value_S: FloatArray, aim: float) -> IntArray:
    """Return the experts of one of the pairs above the aim, and a few more at random."""
    last = len(value_S) - 1
    picked, seen = 0, 0
    for i in range(len(value_S) // 2):
        if value_S[i] + value_S[last - i] > aim:
            seen += 1
            if np.random.randint(seen) == 0:  # noqa: NPY002
                picked = i
    num_experts = len(load_E)
    tried = np.empty(num_experts + _EXTRA, np.int64)
    num_tried = 0
    for e in range(num_experts):
        value = load_E[e] / count_E[e]
        if value in (value_S[picked], value_S[last - picked]):
            tried[num_tried] = e
            num_tried += 1
    for _ in range(_EXTRA):
        tried[num_tried] = np.random.randint(num_experts)  # noqa: NPY002
        num_tried += 1
    return tried[:num_tried]


@njit(cache=True, nogil=True)
def _best_change(
    load_E: FloatArray,
    count_E: IntArray,
    order_E: IntArray,
    tried: IntArray,
    barred: IntArray,
    step: int,
    aim: float,
    trial_S: FloatArray,
) -> tuple[int, int, int]:
    """Return the expert to get a replica, the one to lose one (or -1), and the changes tried."""
    num_slots = len(trial_S)
    first = -1 if count_E.sum() < num_slots else 0
    least, more, fewer, looked_at = np.inf, -1, -1, 0
    for up in tried:
        if count_E[up] >= num_slots // 2:
            continue
        up_stale = barred[up, min(count_E[up] + 1, _LISTED - 1)] > step
        for down in range(first, len(load_E)):
            stale = up_stale
            if down >= 0:
                if down == up or count_E[down] < 2 or load_E[down] > aim * (count_E[down] - 1):
                    continue
                stale |= barred[down, min(count_E[down] - 1, _LISTED - 1)] > step
            looked_at += 1
            _fill(load_E, count_E, order_E, up, down, trial_S)
            over = _excess(trial_S, aim)
            if over < least and (over == 0.0 or not stale):
                least, more, fewer = over, up, down
    return more, fewer, looked_at


@njit(cache=True, nogil=True)
def _bar(barred: IntArray, expert: int, count: int, step: int) -> None:
    """Keep an expert from this count for some steps."""
    barred[expert, min(count, _LISTED - 1)] = step + 5 + np.random.randint(15)  # noqa: NPY002


@njit(cache=True, nogil=True)
def _fill(
    load_E: FloatArray,
    count_E: IntArray,
    order_E: IntArray,
    up: int,
    down: int,
    value_S: FloatArray,
) -> None:
    """Write the replicas' loads, falling, with one replica more of ``up`` and fewer of ``down``."""
    # The two changed experts, the larger replicas first.
    first_left, first = _changed(load_E, count_E, up, 1)
    second_left, second = _changed(load_E, count_E, down, -1)
    if second > first:
        first, second = second, first
        first_left, second_left = second_left, first_left
    s = 0
    for e in order_E:
        if e in (up, down):
            continue
        value = load_E[e] / count_E[e]
        if first_left > 0 and first >= value:
            s = _put(value_S, s, first_left, first)
            first_left = 0
        if second_left > 0 and second >= value:
            s = _put(value_S, s, second_left, second)
            second_left = 0
        s = _put(value_S, s, count_E[e], value)
    s = _put(value_S, s, first_left, first)
    s = _put(value_S, s, second_left, second)
    _put(value_S, s, len(value_S) - s, 0.0)


@njit(cache=True, nogil=True)
def _changed(load_E: FloatArray, count_E: IntArray, expert: int, change: int) -> tuple[int, float]:
    """Return the replicas of an expert after a change, and the load of each."""
    if expert < 0:
        return 0, 0.0
    left = count_E[expert] + change
    return left, load_E[expert] / left


@njit(cache=True, nogil=True)
def _put(value_S: FloatArray, s: int, times: int, value: float) -> int:
    """Write a value several times, from ``s`` on; return where it ends."""
    for i in range(s, s + times):
        value_S[i] = value
    return s + times


@njit(cache=True, nogil=True)
def _excess(value_S: FloatArray, aim: float) -> float:
    """Return what the pairs have above the aim, in all."""
    over = 0.0
    last = len(value_S) - 1
    for i in range(len(value_S) // 2):
        over += max(0.0, value_S[i] + value_S[last - i] - aim)
    return over


@njit(cache=True, nogil=True)
def _largest(value_S: FloatArray) -> float:
    """Return the largest pair."""
    largest = 0.0
    last = len(value_S) - 1
    for i in range(len(value_S) // 2):
        largest = max(largest, value_S[i] + value_S[last - i])
    return largest
