"""A bound for two slots a rank and even split, in milliseconds a layer.

At a target T let a replica of load v cost ``1 + large(v) - small(v)``, where large adds up the
prices of sizes x > T/2 at or below v, and small of those with v <= T - x. Two replicas that share
a rank have v + u <= T, so together they cost at most 2; all of them cost at most the S slots. If
the cheapest replica counts cost more, T is out of reach. Any prices that add up to at most 1 give
a valid bound; here multiplicative weights look for those that refute most (the dual of the linear
relaxation of :func:`eplb.placement.pairs.counts_within`).
Importing this module costs numba. Shape letters: E logical experts, X sizes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from eplb.arrays import FloatArray, IntArray

__all__ = ["QUICK", "THOROUGH", "pair_bound", "prices_refute"]

# Sizes with a price, and steps in which prices are looked for: about 5 ms a layer of 256 experts on
# 144 ranks, 0.8% below what was reached, or 60 ms and 0.3% (the linear relaxation itself: 0.2%).
QUICK, THOROUGH = (96, 100), (768, 600)
_SLACK = 1e-9
_PRECISION = 1e-4
# Of the weights: largest change of a logarithm in one step.
_RATE = 4.0
# Steps after which it has halved.
_SETTLING = 30


@njit(cache=True, nogil=True)
def pair_bound(
    load_E: FloatArray, num_ranks: int, low: float, high: float, effort: tuple[int, int]
) -> float:
    """Return a bound on the largest rank load of one window, between ``low`` and ``high``.

    Parameters
    ----------
    load_E : array of float64
    num_ranks : int
    low, high : float
        A bound known before, and what was reached: no bound is looked for above it.
    effort : tuple of int
        ``QUICK`` or ``THOROUGH``.
    """
    num_sizes, iterations = effort
    target = high
    # From one target to the next the best prices change little.
    log_weight_X = np.zeros(num_sizes + 1)
    while high > low * (1.0 + _PRECISION):
        if _refuted(load_E, num_ranks, target, log_weight_X, iterations):
            low = target
        else:
            high = target
        target = 0.5 * (low + high)
    return low


@njit(cache=True, nogil=True)
def _refuted(
    load_E: FloatArray, num_ranks: int, target: float, log_weight_X: FloatArray, iterations: int
) -> bool:
    """Return whether prices were found that prove the target out of reach.

    ``log_weight_X`` are the logarithms of the prices to start from, changed in place.
    """
    num_slots = 2 * num_ranks
    num_sizes = len(log_weight_X) - 1
    least_E = np.maximum(1.0, np.ceil(load_E / target * (1.0 - _SLACK))).astype(np.int64)
    spare = num_slots - least_E.sum()
    if spare < 0 or least_E.max() > num_ranks:
        return True
    first_E, count_O, large_O, small_O = _options(
        load_E, least_E, spare, num_ranks, target, num_sizes
    )
    return prices_refute(first_E, count_O, large_O, small_O, num_slots, log_weight_X, iterations)


@njit(cache=True, nogil=True)
def prices_refute(
    first_E: IntArray,
    count_O: IntArray,
    large_O: IntArray,
    small_O: IntArray,
    num_slots: int,
    log_weight_X: FloatArray,
    iterations: int,
) -> bool:
    """Return whether prices are found under which no options fit into the slots.

    Parameters
    ----------
    first_E : array of int64
        Where the options of each expert begin, and at last their number.
    count_O, large_O, small_O : arrays of int64
        Of each option: replicas, sizes where they are large, sizes where they are small.
    num_slots, iterations : int
    log_weight_X : array of float64
        Logarithms of the prices to start from, changed in place.
    """
    num_sizes = len(log_weight_X) - 1
    # Size number 0 is above all loads: its price is that of a slot.
    at_or_below_X = np.zeros(num_sizes + 1)
    for iteration in range(iterations):
        weight_X = np.exp(log_weight_X - log_weight_X.max())
        weight_X /= weight_X.sum()
        for x in range(1, num_sizes + 1):
            at_or_below_X[x] = at_or_below_X[x - 1] + weight_X[x]
        # Differences from one size to the next, of the slots needed by what is cheapest.
        change_X = np.zeros(num_sizes + 2)
        total, slots = 0.0, 0
        for e in range(len(first_E) - 1):
            cost, o = np.inf, 0
            for option in range(first_E[e], first_E[e + 1]):
                price = count_O[option] * (
                    1.0 + at_or_below_X[large_O[option]] - at_or_below_X[small_O[option]]
                )
                if price < cost:
                    cost, o = price, option
            total += cost
            slots += count_O[o]
            change_X[large_O[o] + 1] -= count_O[o]
            change_X[small_O[o] + 1] += count_O[o]
        if total > num_slots * (1.0 + _SLACK):
            return True
        over_X = slots + np.cumsum(change_X[:-1]) - num_slots
        rate = _RATE / (1.0 + iteration / _SETTLING)
        log_weight_X += rate * over_X / max(1.0, np.abs(over_X).max())
    return False


@njit(cache=True, nogil=True)
def _options(
    load_E: FloatArray,
    least_E: IntArray,
    spare: int,
    num_ranks: int,
    target: float,
    num_sizes: int,
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Return where an expert's options begin, and of each: replicas, large sizes, small sizes.

    Sizes 1 .. X lie at T/2 + (x - 1/2) T/2X. A replica is large for all sizes up to the first
    number, or small for all up to the second.
    """
    step = 0.5 * target / num_sizes
    first_E = np.zeros(len(load_E) + 1, np.int64)
    option_O3 = np.empty((len(load_E) * (spare + 1), 3), np.int64)
    o = 0
    for e in range(len(load_E)):
        for c in range(least_E[e], min(least_E[e] + spare, num_ranks) + 1):
            value = load_E[e] / c * (1.0 - _SLACK)
            large = int(np.floor((value - 0.5 * target) / step + 0.5))
            small = int(np.floor((0.5 * target - value) / step + 0.5))
            option_O3[o] = c, min(max(large, 0), num_sizes), min(max(small, 0), num_sizes)
            o += 1
            if option_O3[o - 1, 2] == num_sizes:
                # More replicas are no cheaper each.
                break
        first_E[e + 1] = o
    return first_E, option_O3[:o, 0], option_O3[:o, 1], option_O3[:o, 2]
