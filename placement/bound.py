"""Lower bounds: an imbalance that no placement on these slots can go below.

A rank's load is the sum of at most K replicas, and under even split each of an expert's c replicas
carries w / c. For a target T (largest rank load) suppose every set of at most K replicas of total
at most T has a value of at most 1. Then all replicas together are worth at most R, so T is out of
reach if even the cheapest choice of replica counts is worth more. The values used here are
dual feasible functions of bin packing (Fekete and Schepers, Math. Prog. 91, 2001, section 3),
blended with the value 1/K that counts slots::

    value(x) = 1 - (K-1) d          x > T - p          (with only small ones beside it)
             = (1 - K d) x / T + d  p <= x <= T - p    (1/2 where K = 2: two of them fill a rank)
             = d                    x < p

for thresholds 0 < p <= T/2 and slot prices 0 <= d <= 1/K. d = 1/K is slot counting (an expert needs
w / T replicas, and there are S slots), d = 0 counts large replicas that cannot share a rank.

Shape letters: W windows, L layers, E experts, R ranks, K slots of a rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray
from eplb.problem import Problem

__all__ = ["layer_bounds", "load_bound"]

# Values are compared with this relative slack, always in favour of "T can be reached".
_SLACK = 1e-9
_PRECISION = 1e-4
_THRESHOLDS = np.linspace(0.04, 0.5, 12)
_PRICES = np.linspace(0.0, 1.0, 6)


def layer_bounds(problem: Problem, imbalance_L: FloatArray) -> FloatArray:
    """Return a lower bound on each layer's ``imbalance_mean``, shape [L].

    It holds for every placement on the topology's slots, with or without the problem's policy
    and wherever the replicas of an expert lie.

    Parameters
    ----------
    problem : Problem
    imbalance_L : array of float64
        What was reached, which ends the search where it is met.
    """
    counts_WLE = problem.profile.counts_WLE
    # One placement serves all windows, so the mean of its largest loads is at least the largest
    # of its mean loads: the bound for the mean load holds.
    bound_L = load_bound(
        problem.profile.mean_load_LE(),
        num_ranks=problem.topology.num_ranks,
        slots_per_rank=problem.topology.slots_per_rank,
        even=problem.split == "even",
        reached_L=imbalance_L,
    )
    if len(counts_WLE) == 1:
        return bound_L
    # And each window's own bound holds for it.
    max_replicas = _max_replicas(problem.model.num_experts, problem.topology.num_ranks,
                                 problem.topology.num_slots)  # fmt: skip
    total_WL = counts_WLE.sum(axis=2)
    hottest_WL = np.divide(
        counts_WLE.max(axis=2) * (problem.topology.num_ranks / max_replicas),
        total_WL,
        out=np.full(total_WL.shape, np.nan),
        where=total_WL > 0,
    )
    window_L = np.nanmean(np.fmax(hottest_WL, total_WL * 0 + 1), axis=0)
    best_L: FloatArray = np.maximum(bound_L, window_L)
    return best_L


def load_bound(
    load_LE: FloatArray,
    *,
    num_ranks: int,
    slots_per_rank: int,
    even: bool = True,
    reached_L: FloatArray | None = None,
) -> FloatArray:
    """Return a lower bound on max / mean rank load for one load vector a layer, shape [L].

    Parameters
    ----------
    load_LE : array of float64
        Non-negative, each layer with some load.
    num_ranks, slots_per_rank : int
    even : bool
        Replicas of an expert carry equal parts. Without it only the mean load and the hottest
        expert over as many ranks as it can have replicas count.
    reached_L : array of float64, optional
        Imbalance of a placement: no bound is looked for above it.

    Notes
    -----
    Empty slots are allowed for, and so are two replicas on one rank (which carry what one would).
    """
    num_experts = load_LE.shape[1]
    max_replicas = _max_replicas(num_experts, num_ranks, num_ranks * slots_per_rank)
    scale_L = load_LE.max(axis=1, keepdims=True)
    load_LE = load_LE / scale_L
    load_LE = load_LE * (num_ranks / load_LE.sum(axis=1, keepdims=True))
    low_L: FloatArray = np.maximum(1.0, load_LE.max(axis=1) / max_replicas)
    if not even:
        return low_L
    high_L = low_L * 4 if reached_L is None else np.maximum(reached_L, low_L)
    active = np.flatnonzero(high_L > low_L * (1 + _PRECISION))
    target = low_L[active] * (1 + _PRECISION)
    while len(active):
        refuted = _out_of_reach(load_LE[active], target, num_ranks, slots_per_rank)
        low_L[active[refuted]] = target[refuted]
        high_L[active[~refuted]] = target[~refuted]
        active = active[high_L[active] > low_L[active] * (1 + _PRECISION)]
        target = (low_L[active] + high_L[active]) / 2
    return low_L


def _max_replicas(num_experts: int, num_ranks: int, num_slots: int) -> int:
    """Return how many ranks one expert can be on while every other has a slot."""
    return min(num_ranks, num_slots - num_experts + 1)


def _out_of_reach(
    load_LE: FloatArray, target_L: FloatArray, num_ranks: int, slots_per_rank: int
) -> NDArray[np.bool_]:
    """Return for which layers no placement can have all rank loads at or below the target."""
    target_L1 = target_L[:, np.newaxis]
    limit = num_ranks * (1 + _SLACK)
    least_LE = np.maximum(np.ceil(load_LE / target_L1 * (1 - _SLACK)), 1.0)
    refuted_L = np.zeros(len(load_LE), bool)
    for threshold in _THRESHOLDS:
        small_L1 = threshold * target_L1
        large_L1 = target_L1 - small_L1
        # The fewest replicas, the fewest that are not large, the fewest that are small: between
        # these the value of an expert only rises with its number of replicas.
        middle_LE = np.maximum(least_LE, np.ceil(load_LE / large_L1 * (1 - _SLACK)))
        many_LE = np.maximum(least_LE, np.floor(load_LE / small_L1 * (1 - _SLACK)) + 1)
        is_large_LE = load_LE > least_LE * large_L1 * (1 + _SLACK)
        is_middle_LE = load_LE >= middle_LE * small_L1 * (1 + _SLACK)
        for price in _PRICES / slots_per_rank:
            blend = 1 - slots_per_rank * price
            if slots_per_rank == 2:
                middle_value = middle_LE / 2
            else:
                middle_value = load_LE / target_L1 * blend + middle_LE * price
            value_LE = np.minimum(
                np.where(is_middle_LE, middle_value, middle_LE * price), many_LE * price
            )
            large_value = np.where(is_large_LE, least_LE * (blend + price), np.inf)
            refuted_L |= np.minimum(value_LE, large_value).sum(axis=1) > limit
    return refuted_L
