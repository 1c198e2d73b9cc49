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

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray

__all__ = ["layer_bounds", "load_bound", "weighted_bounds"]

# Values are compared with this relative slack, always in favour of "T can be reached".
_SLACK = 1e-9
_PRECISION = 1e-4
_THRESHOLDS = np.linspace(0.04, 0.5, 12)
_PRICES = np.linspace(0.0, 1.0, 6)
# Windows up to which each has its own search for a bound; more of them take the quick part only.
_SEARCHED_WINDOWS = 16
# And up to which the prices of pairs are searched (about 10 ms a window and layer).
_PAIRED_WINDOWS = 4


def layer_bounds(
    load_WLE: FloatArray,
    weight_WL: FloatArray,
    *,
    num_ranks: int,
    slots_per_rank: int,
    split: str,
    reached_L: FloatArray | None = None,
    thorough: bool = True,
) -> FloatArray:
    """Return :func:`weighted_bounds` where layers weigh windows each in its own way, shape [L].

    It holds for every placement on the topology's slots, with or without policies, and wherever
    the replicas of an expert lie.

    Parameters
    ----------
    load_WLE, num_ranks, slots_per_rank, split, thorough
        As there.
    weight_WL : array of float64
        Non-negative.
    reached_L : array of float64, optional
        The weighted means that were reached, which end the search where they are met.
    """
    bound_L = np.zeros(load_WLE.shape[1])
    # As a rule all layers have load in all windows, and weigh alike.
    patterns, of_layer = np.unique(weight_WL, axis=1, return_inverse=True)
    for number, weight_W in enumerate(patterns.T):
        layers = np.flatnonzero(of_layer.reshape(-1) == number)
        bound_L[layers] = weighted_bounds(
            load_WLE[:, layers],
            weight_W,
            num_ranks=num_ranks,
            slots_per_rank=slots_per_rank,
            split=split,
            reached_L=None if reached_L is None else reached_L[layers],
            thorough=thorough,
        )
    return bound_L


def weighted_bounds(
    load_WLE: FloatArray,
    weight_W: FloatArray,
    *,
    num_ranks: int,
    slots_per_rank: int,
    split: str,
    reached_L: FloatArray | None = None,
    thorough: bool = True,
) -> FloatArray:
    """Return a lower bound on each layer's weighted mean of the largest rank load, shape [L].

    Parameters
    ----------
    load_WLE : array of float64
        Non-negative, in the unit of the result (each window scaled to its mean rank load, as a
        rule). Windows without load are allowed.
    weight_W : array of float64
        Non-negative weights of the windows.
    num_ranks, slots_per_rank : int
    split : str
        Any rule. Under ``even`` all of :func:`load_bound` holds; under others what it says of
        uneven splits: a rank takes at most T of an expert whatever the rule, so the mean, the
        hottest expert and the slots count, and what fits beside a replica does not.
    reached_L : array of float64, optional
        Objective of a placement: the bound is at most that.
    thorough : bool
        Prices of pairs with two slots a rank, and what couples windows. Needs numba's compiler,
        once a machine.

    Notes
    -----
    One placement serves all windows, so the weighted mean of their largest loads is at least the
    largest of the weighted mean load (maxima are convex), at least the weighted mean of what is a
    bound for each window alone, and at least what :mod:`eplb.placement.coupled_bound` says: the
    largest of the three.
    """
    num_windows, num_layers, num_experts = load_WLE.shape
    mean_LE = np.tensordot(weight_W, load_WLE, axes=1)
    bounds = partial(
        _bounds_in_unit,
        num_ranks=num_ranks,
        slots_per_rank=slots_per_rank,
        even=split == "even",
        paired=thorough and num_windows <= _PAIRED_WINDOWS,
    )
    best_L = bounds(mean_LE, reached_X=reached_L)
    if num_windows > 1:
        load_XE = load_WLE.reshape(-1, num_experts)
        if num_windows <= _SEARCHED_WINDOWS:
            own_X = bounds(load_XE)
        else:
            most = _max_replicas(num_experts, num_ranks, num_ranks * slots_per_rank)
            own_X = np.maximum(load_XE.sum(axis=1) / num_ranks, load_XE.max(axis=1) / most)
        own_WL = own_X.reshape(num_windows, num_layers)
        best_L = np.maximum(best_L, weight_W @ own_WL)
        if thorough:
            high_L = 2 * best_L if reached_L is None else reached_L
            best_L = _coupled(
                load_WLE, weight_W, own_WL, num_ranks, slots_per_rank, split, best_L, high_L
            )
    return best_L if reached_L is None else np.minimum(best_L, reached_L)


def _coupled(
    load_WLE: FloatArray,
    weight_W: FloatArray,
    own_WL: FloatArray,
    num_ranks: int,
    slots_per_rank: int,
    split: str,
    low_L: FloatArray,
    high_L: FloatArray,
) -> FloatArray:
    """Return the bounds that see all windows at once, at least ``low_L``."""
    # Numba takes a second to import.
    from eplb.placement.coupled_bound import coupled_bound  # noqa: PLC0415
    from eplb.placement.pair_bound import QUICK  # noqa: PLC0415

    paired = split == "even" and slots_per_rank == 2 and len(load_WLE) <= _PAIRED_WINDOWS
    bound_L = low_L.copy()
    for layer in np.flatnonzero(low_L > 0):
        bound_L[layer] = coupled_bound(
            np.ascontiguousarray(load_WLE[:, layer]),
            weight_W,
            np.ascontiguousarray(own_WL[:, layer]),
            num_ranks,
            slots_per_rank,
            low_L[layer],
            max(low_L[layer], high_L[layer]),
            paired,
            QUICK,
        )
    return bound_L


def _bounds_in_unit(
    load_XE: FloatArray,
    *,
    num_ranks: int,
    slots_per_rank: int,
    even: bool,
    paired: bool,
    reached_X: FloatArray | None = None,
) -> FloatArray:
    """Return bounds on the largest rank load of each row, 0 for rows without load, shape [X]."""
    bound_X = np.zeros(len(load_XE))
    used = load_XE.any(axis=1)
    if not used.any():
        return bound_X
    mean_X = load_XE[used].sum(axis=1) / num_ranks
    relative_X = load_bound(
        load_XE[used],
        num_ranks=num_ranks,
        slots_per_rank=slots_per_rank,
        even=even,
        reached_L=None if reached_X is None else reached_X[used] / mean_X,
    )
    if paired and slots_per_rank == 2 and (even or reached_X is not None):
        scaled_XE = load_XE[used] / mean_X[:, np.newaxis]
        high_X = relative_X * 1.5 if reached_X is None else reached_X[used] / mean_X
        relative_X = _paired(scaled_XE, num_ranks, even, relative_X, high_X, reached_X is None)
    bound_X[used] = relative_X * mean_X
    return bound_X


def _paired(
    load_XE: FloatArray,
    num_ranks: int,
    even: bool,
    low_X: FloatArray,
    high_X: FloatArray,
    quick: bool,
) -> FloatArray:
    """Return the bounds by prices for two slots a rank, of each row."""
    # Numba takes a second to import, and only pairs need it.
    from eplb.placement.pair_bound import QUICK, THOROUGH, pair_bound  # noqa: PLC0415
    from eplb.placement.piece_bound import piece_bound  # noqa: PLC0415

    def one(load_E: FloatArray, low: float, high: float) -> float:
        if even:
            return float(pair_bound(load_E, num_ranks, low, high, QUICK if quick else THOROUGH))
        return float(piece_bound(load_E, num_ranks, low, high))

    # The kernels leave the interpreter's lock.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return np.array(list(threads.map(one, load_XE, low_X, high_X)))


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
        Replicas of an expert carry equal parts. Without it only the mean load, the hottest
        expert over as many ranks as it can have replicas, and the slots that experts of more than
        T need count.
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
    prices = _PRICES if even else _PRICES[-1:]
    high_L = low_L * 4 if reached_L is None else np.maximum(reached_L, low_L)
    active = np.flatnonzero(high_L > low_L * (1 + _PRECISION))
    target = low_L[active] * (1 + _PRECISION)
    while len(active):
        refuted = _out_of_reach(load_LE[active], target, num_ranks, slots_per_rank, prices)
        low_L[active[refuted]] = target[refuted]
        high_L[active[~refuted]] = target[~refuted]
        active = active[high_L[active] > low_L[active] * (1 + _PRECISION)]
        target = (low_L[active] + high_L[active]) / 2
    return low_L


def _max_replicas(num_experts: int, num_ranks: int, num_slots: int) -> int:
    """Return how many ranks one expert can be on while every other has a slot."""
    return min(num_ranks, num_slots - num_experts + 1)


def _out_of_reach(
    load_LE: FloatArray,
    target_L: FloatArray,
    num_ranks: int,
    slots_per_rank: int,
    prices: FloatArray,
) -> NDArray[np.bool_]:
    """Return for which layers no placement can have all rank loads at or below the target."""
    target_L1 = target_L[:, np.newaxis]
    limit = num_ranks * (1 + _SLACK)
    least_LE = np.maximum(np.ceil(load_LE / target_L1 * (1 - _SLACK)), 1.0)
    refuted_L = np.zeros(len(load_LE), bool)
    # The price of a slot alone asks for no threshold.
    for threshold in _THRESHOLDS if len(prices) > 1 else _THRESHOLDS[-1:]:
        small_L1 = threshold * target_L1
        large_L1 = target_L1 - small_L1
        # The fewest replicas, the fewest that are not large, the fewest that are small: between
        # these the value of an expert only rises with its number of replicas.
        middle_LE = np.maximum(least_LE, np.ceil(load_LE / large_L1 * (1 - _SLACK)))
        many_LE = np.maximum(least_LE, np.floor(load_LE / small_L1 * (1 - _SLACK)) + 1)
        is_large_LE = load_LE > least_LE * large_L1 * (1 + _SLACK)
        is_middle_LE = load_LE >= middle_LE * small_L1 * (1 + _SLACK)
        for price in prices / slots_per_rank:
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
