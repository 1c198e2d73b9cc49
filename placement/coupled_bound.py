"""A bound that sees that one placement serves all windows, by how few slots it has for them.

The largest rank load of window w is at least B_w, a bound of that window alone, and at least what
any one rank has. So if the weighted mean of the largest loads is at most D, every rank with loads
l_w satisfies ``sum_w p_w max(l_w, B_w) <= D``. An expert that is hot in one window, or in another,
has to have replicas enough for both (whatever the split: one of c replicas carries 1/c or more of a
window), and all of these have to have slots.

Under even split with two slots a rank, what may lie beside what is known as well: the prices of
:mod:`eplb.placement.pair_bound` in a more general form. Order replicas in any way. For a place x in
the order, those from x on are large, and those that may share a rank with a large one are small. A
replica that is large and not small has its rank to itself or with a small one: it needs two slots,
a small one that is not large none, any other one. Any mixture of such needs, over places x, has to
be within the slots.
Importing this module costs numba. Shape letters: W windows, E logical experts, X places in the
order, O options (an expert with a number of replicas).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from eplb.arrays import FloatArray, IntArray
from eplb.placement.pair_bound import prices_refute

__all__ = ["coupled_bound"]

_SLACK = 1e-9
_PRECISION = 1e-4


@njit(cache=True, nogil=True)
def coupled_bound(
    load_WE: FloatArray,
    weight_W: FloatArray,
    least_W: FloatArray,
    num_ranks: int,
    slots_per_rank: int,
    low: float,
    high: float,
    paired: bool,
    effort: tuple[int, int],
) -> float:
    """Return a bound on the weighted mean largest rank load, between ``low`` and ``high``.

    Parameters
    ----------
    load_WE, weight_W : arrays of float64
    least_W : array of float64
        Bound of each window alone.
    num_ranks, slots_per_rank : int
    low, high : float
        A bound known before, and what was reached: no bound is looked for above it.
    paired : bool
        The split is even, and a rank has two slots: search prices as well.
    effort : tuple of int
        Of the prices, as for :func:`eplb.placement.pair_bound.pair_bound`.
    """
    num_sizes, iterations = effort
    log_weight_X = np.zeros(num_sizes + 1)
    target = high
    while high > low * (1.0 + _PRECISION):
        least_E = _least_replicas(load_WE, weight_W, least_W, num_ranks, target)
        spare = num_ranks * slots_per_rank - least_E.sum()
        refuted = spare < 0 or least_E.max() > num_ranks
        if not refuted and paired:
            first_E, count_O, large_O, small_O = _options(
                load_WE, weight_W, least_W, least_E, spare, num_ranks, target, num_sizes
            )
            refuted = prices_refute(
                first_E, count_O, large_O, small_O, 2 * num_ranks, log_weight_X, iterations
            )
        if refuted:
            low = target
        else:
            high = target
        target = 0.5 * (low + high)
    return low


@njit(cache=True, nogil=True)
def _least_replicas(
    load_WE: FloatArray, weight_W: FloatArray, least_W: FloatArray, num_ranks: int, target: float
) -> IntArray:
    """Return how few replicas of each expert leave a rank within the target, R + 1 for none."""
    num_windows, num_experts = load_WE.shape
    least_E = np.ones(num_experts, np.int64)
    for e in range(num_experts):
        while least_E[e] <= num_ranks:
            cost = 0.0
            for w in range(num_windows):
                cost += weight_W[w] * max(load_WE[w, e] / least_E[e], least_W[w])
            if cost <= target * (1.0 + _SLACK):
                break
            least_E[e] += 1
    return least_E


@njit(cache=True, nogil=True)
def _options(
    load_WE: FloatArray,
    weight_W: FloatArray,
    least_W: FloatArray,
    least_E: IntArray,
    spare: int,
    num_ranks: int,
    target: float,
    num_sizes: int,
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Return where an expert's options begin, and of each: replicas, large places, small places.

    The order is that of weighted mean loads. A replica is large for all places up to the first
    number, and small for all up to the second.
    """
    num_windows, num_experts = load_WE.shape
    mean_E = np.zeros(num_experts)
    for w in range(num_windows):
        mean_E += weight_W[w] * load_WE[w]
    largest = (mean_E / least_E).max()
    first_E = np.zeros(num_experts + 1, np.int64)
    option_O3 = np.empty((num_experts * (spare + 1), 3), np.int64)
    by_load = np.argsort(-mean_E / least_E)
    o = 0
    for e in range(num_experts):
        for c in range(least_E[e], min(least_E[e] + spare, num_ranks) + 1):
            # The largest replica that may lie beside this one.
            reach = 0.0
            for other in by_load:
                most = min(least_E[other] + spare, num_ranks)
                if mean_E[other] / least_E[other] <= reach:
                    break
                for d in range(least_E[other], most + 1):
                    if mean_E[other] / d <= reach:
                        break
                    cost = 0.0
                    for w in range(num_windows):
                        cost += weight_W[w] * max(
                            load_WE[w, e] / c + load_WE[w, other] / d, least_W[w]
                        )
                    if cost <= target * (1.0 + _SLACK):
                        reach = mean_E[other] / d
                        break
            large = int(np.floor(mean_E[e] / c / largest * num_sizes * (1.0 - _SLACK)))
            small = int(np.floor(reach / largest * num_sizes * (1.0 + _SLACK)))
            option_O3[o] = c, min(large, num_sizes), min(small, num_sizes)
            o += 1
            if small >= num_sizes:
                # More replicas are no cheaper each.
                break
        first_E[e + 1] = o
    return first_E, option_O3[:o, 0], option_O3[:o, 1], option_O3[:o, 2]
