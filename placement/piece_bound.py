"""A bound for free splits (``weighted``, ``batch``) with two slots a rank, in some 100 ms a layer.

A rank holds two pieces of experts that add up to the target T at most, so the prices of
:mod:`eplb.placement.pair_bound` hold for pieces: one of size v costs ``1 + large(v) - small(v)``,
two on a rank at most 2, and all of them at most the S slots. What is new is that an expert can be
cut as one likes: it costs what its cheapest pieces do that make up its load. A price for slots
alone says that a load w needs w / T of them, rounded up.
Importing this module costs numba. Shape letters: E logical experts, X sizes, K classes of pieces,
D units of load.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from eplb.arrays import FloatArray, IntArray

__all__ = ["piece_bound"]

_SIZES, _ITERATIONS = 64, 200
_SLACK = 1e-9
_PRECISION = 1e-4
# Of the prices: largest change of a logarithm in one step, and steps after which it has halved.
_RATE, _SETTLING = 4.0, 30


@njit(cache=True, nogil=True)
def piece_bound(load_E: FloatArray, num_ranks: int, low: float, high: float) -> float:
    """Return a bound on the largest rank load of one window, between ``low`` and ``high``.

    Parameters
    ----------
    load_E : array of float64
    num_ranks : int
    low, high : float
        A bound known before, and what was reached: no bound is looked for above it.
    """
    log_weight_X = np.zeros(_SIZES + 1)
    target = high
    while high > low * (1.0 + _PRECISION):
        if _refuted(load_E, num_ranks, target, log_weight_X):
            low = target
        else:
            high = target
        target = 0.5 * (low + high)
    return low


@njit(cache=True, nogil=True)
def _refuted(load_E: FloatArray, num_ranks: int, target: float, log_weight_X: FloatArray) -> bool:
    """Return whether prices were found that prove the target out of reach.

    Sizes 1 .. X lie at T/2 + (x - 1/2) T/2X. Pieces between two sizes are one class, number X those
    about T/2, and count as large as any of them: in units of T/4X, class k up to 2 k + 1.
    ``log_weight_X`` are the logarithms of the prices to start from, changed in place.
    """
    num_slots = 2 * num_ranks
    # In units, rounded down in favour of the target.
    load_units_E = load_E / target * (4 * _SIZES) * (1.0 - _SLACK)
    whole_E = np.ceil(load_units_E).astype(np.int64)
    class_E = np.minimum(np.floor((load_units_E + 1.0) / 2.0), 2 * _SIZES).astype(np.int64)
    is_whole_E = load_units_E <= 4 * _SIZES
    price_K = np.empty(2 * _SIZES + 1)
    for iteration in range(_ITERATIONS):
        weight_X = np.exp(log_weight_X - log_weight_X.max())
        weight_X /= weight_X.sum()
        price_K[_SIZES] = 1.0
        at_or_below = 0.0
        for x in range(1, _SIZES + 1):
            at_or_below += weight_X[x]
            price_K[_SIZES + x] = 1.0 + at_or_below
            price_K[_SIZES - x] = 1.0 - at_or_below
        cost_D, by_D = _cheapest(price_K, whole_E.max())
        total = 0.0
        piece_K = np.zeros(2 * _SIZES + 1)
        for e in range(len(load_E)):
            units = whole_E[e]
            # In one piece an expert is of its own class, and without load it has a slot as well.
            if units == 0 or (is_whole_E[e] and price_K[class_E[e]] <= cost_D[units]):
                total += price_K[class_E[e]]
                piece_K[class_E[e]] += 1.0
                continue
            total += cost_D[units]
            while units > 0:
                piece_K[by_D[units]] += 1.0
                units = max(units - 2 * by_D[units] - 1, 0)
        if total > num_slots * (1.0 + _SLACK):
            return True
        # Slots needed for each size: those of pieces, more of large and less of small ones.
        over_X = np.empty(_SIZES + 1)
        over_X[0] = piece_K.sum() - num_slots
        large_small = piece_K[_SIZES + 1 :].sum() - piece_K[:_SIZES].sum()
        for x in range(1, _SIZES + 1):
            over_X[x] = over_X[0] + large_small
            large_small -= piece_K[_SIZES + x] - piece_K[_SIZES - x]
        step = _RATE / (1.0 + iteration / _SETTLING)
        log_weight_X += step * over_X / max(1.0, np.abs(over_X).max())
    return False


@njit(cache=True, nogil=True)
def _cheapest(price_K: FloatArray, most: int) -> tuple[FloatArray, IntArray]:
    """Return the least price of pieces that make up so many units, and one of them, [D]."""
    cost_D = np.zeros(most + 1)
    by_D = np.zeros(most + 1, np.int64)
    for units in range(1, most + 1):
        cost, by = np.inf, 0
        for k in range(len(price_K)):
            price = price_K[k] + cost_D[max(units - 2 * k - 1, 0)]
            if price < cost:
                cost, by = price, k
        cost_D[units], by_D[units] = cost, by
    return cost_D, by_D
