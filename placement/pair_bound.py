"""A bound for two slots a rank and even split, in milliseconds a layer.

At a target T let a replica of load v cost ``1 + large(v) - small(v)``, where large adds up the
prices of sizes x > T/2 at or below v, and small of those with v <= T - x. Two replicas that share
a rank have v + u <= T, so together they cost at most 2; all of them cost at most the S slots. If
the cheapest replica counts cost more, T is out of reach. Any prices that add up to at most 1 give
a valid bound; here multiplicative weights look for those that refute most (the dual of the linear
relaxation of :func:`eplb.placement.pairs.counts_within`).
Importing this module costs numba. Shape letters: L layers, E logical experts, X sizes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from eplb.arrays import FloatArray

__all__ = ["pair_bounds"]

_SLACK = 1e-9
_PRECISION = 1e-4
_SIZES = 96
_ITERATIONS = 100
# Of the weights: largest change of a logarithm in one step.
_RATE = 1.0
# Steps after which it has halved.
_SETTLING = 20


@njit(cache=True, nogil=True)
def pair_bounds(
    load_LE: FloatArray, num_ranks: int, low_L: FloatArray, high_L: FloatArray
) -> FloatArray:
    """Return the bounds on the largest rank load, shape [L], between ``low_L`` and ``high_L``.

    Parameters
    ----------
    load_LE : array of float64
    num_ranks : int
    low_L, high_L : arrays of float64
        Bounds known before, and what was reached: no bound is looked for above it.
    """
    bound_L = low_L.copy()
    for layer in range(len(load_LE)):
        low, high = low_L[layer], high_L[layer]
        target = high
        # From one target to the next the best prices change little.
        log_weight_X = np.zeros(_SIZES + 1)
        while high > low * (1.0 + _PRECISION):
            if _refuted(load_LE[layer], num_ranks, target, log_weight_X):
                low = target
            else:
                high = target
            target = 0.5 * (low + high)
        bound_L[layer] = low
    return bound_L


@njit(cache=True, nogil=True)
def _refuted(load_E: FloatArray, num_ranks: int, target: float, log_weight_X: FloatArray) -> bool:
    """Return whether prices were found that prove the target out of reach.

    ``log_weight_X`` are the logarithms of the prices to start from, changed in place.
    """
    num_slots = 2 * num_ranks
    num_experts = len(load_E)
    least_E = np.maximum(1.0, np.ceil(load_E / target * (1.0 - _SLACK))).astype(np.int64)
    spare = num_slots - least_E.sum()
    if spare < 0 or least_E.max() > num_ranks:
        return True
    # Size number 0 is above all loads: its price is that of a slot.
    at_or_below_X = np.empty(_SIZES + 2)
    step = 0.5 * target / _SIZES
    need_X = np.empty(_SIZES + 1)
    for iteration in range(_ITERATIONS):
        weight_X = np.exp(log_weight_X - log_weight_X.max())
        weight_X /= weight_X.sum()
        at_or_below_X[0] = 0.0
        for x in range(1, _SIZES + 1):
            at_or_below_X[x] = at_or_below_X[x - 1] + weight_X[x]
        need_X[:] = 0.0
        total = 0.0
        for e in range(num_experts):
            cost, count, large, small = np.inf, 0, 0, 0
            for c in range(least_E[e], min(least_E[e] + spare, num_ranks) + 1):
                value = load_E[e] / c
                # Sizes 1 .. X lie at T/2 + (x - 1/2) step.
                above = int(np.floor((value * (1.0 - _SLACK) - 0.5 * target) / step + 0.5))
                above = min(max(above, 0), _SIZES)
                below = int(np.floor((0.5 * target - value * (1.0 - _SLACK)) / step + 0.5))
                below = min(max(below, 0), _SIZES)
                price = c * (1.0 + at_or_below_X[above] - at_or_below_X[below])
                if price < cost:
                    cost, count, large, small = price, c, above, below
                if below == _SIZES:
                    # More replicas are no cheaper each.
                    break
            total += cost
            need_X[0] += count
            for x in range(1, large + 1):
                need_X[x] += count
            for x in range(1, small + 1):
                need_X[x] -= count
        if total > num_slots * (1.0 + _SLACK):
            return True
        need_X[1:] += need_X[0]
        over_X = need_X - num_slots
        rate = _RATE / (1.0 + iteration / _SETTLING)
        log_weight_X += rate * over_X / max(1.0, np.abs(over_X).max())
    return False
