"""The inner loop of ``replan``: the best moves of one layer, one after the other, by numba.

From the current placement the swap of two slots, or the replacement of a replica by one of another
expert, is made that gains most for each expert that has to be moved. What is lowered is the sum of
:mod:`eplb.placement.annealing`, over ranks r and windows w,

    slope_w * load_rw ** P,    slope_w = weight_w / P * (sum_r load_rw ** P) ** (1 / P - 1)

which has no plateaus, as the largest load has. An expert is moved when a rank holds it that did not
hold it at first: taking it back is free, and gives the move back.

Shape letters: W windows, E logical experts, R ranks, K slots of a rank, M moves.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["repair_layer"]


@njit(cache=True, nogil=True)
def repair_layer(  # noqa: PLR0912, PLR0915  (calls cost numba seconds each)
    load_EW: NDArray[np.float64],
    weight_W: NDArray[np.float64],
    slots_RK: NDArray[np.int64],
    max_moves: int,
    doublings: int,
    num_hot: int,
) -> Any:
    """Return the best placement and objective within each number of moves.

    Parameters
    ----------
    load_EW : array of float64
        Loads of a mean rank load of 1.
    weight_W : array of float64
    slots_RK : array of int64
        No expert twice on a rank; -1 is an empty slot, which stays empty.
    max_moves : int
    doublings : int
        P is 2 to this power.
    num_hot : int
        Moves touch one of so many most loaded ranks.

    Returns
    -------
    best_MRK : array of int64, shape [max_moves + 1, R, K]
    objective_M : array of float64
        Weighted mean over windows of the largest rank load, never increasing.
    """
    R, K = slots_RK.shape
    E, W = load_EW.shape
    power = 2.0**doublings
    slots = slots_RK.copy()
    held = np.zeros((R, E), np.bool_)
    count = np.zeros(E, np.int64)
    for r in range(R):
        for k in range(K):
            if slots[r, k] >= 0:
                held[r, slots[r, k]] = True
                count[slots[r, k]] += 1
    first = held.copy()
    best = np.empty((max_moves + 1, R, K), np.int64)
    objective = np.full(max_moves + 1, inf)
    load = np.zeros((R, W))
    slope = np.zeros(W)
    cost = np.zeros(R)
    hot = np.zeros(R, np.bool_)
    moved = 0
    for _ in range(4 * max_moves + 16):
        # Loads anew: rounding does not add up, and it costs less than one candidate in a hundred.
        for r in range(R):
            for w in range(W):
                load[r, w] = 0.0
            for k in range(K):
                e = slots[r, k]
                if e >= 0:
                    for w in range(W):
                        load[r, w] += load_EW[e, w] / count[e]
            cost[r] = 0.0
            hot[r] = False
        true = 0.0
        for w in range(W):
            total, largest = 0.0, 0.0
            for r in range(R):
                largest = max(largest, load[r, w])
                total += load[r, w] ** power
            true += weight_W[w] * largest
            slope[w] = weight_W[w] / power * total ** (1.0 / power - 1.0) if total > 0 else 0.0
        for r in range(R):
            for w in range(W):
                cost[r] += slope[w] * load[r, w] ** power
        if true < objective[moved]:
            objective[moved] = true
            for r in range(R):
                for k in range(K):
                    best[moved, r, k] = slots[r, k]
        for _h in range(min(num_hot, R)):
            top = -1
            for r in range(R):
                if not hot[r] and (top < 0 or cost[r] > cost[top]):
                    top = r
            hot[top] = True
        # Swaps (kind 0: b, j is a slot) and replacements (kind 1: j is an expert).
        best_worth, kind, ba, bi, bb, bj = 0.0, -1, 0, 0, 0, 0
        least = 1e-9 * cost.sum()
        for a in range(R):
            for i in range(K):
                e = slots[a, i]
                if e < 0:
                    continue
                out = 0 if first[a, e] else 1
                if hot[a]:
                    for b in range(R):
                        if b == a or (hot[b] and b < a):
                            continue
                        if held[b, e]:
                            continue
                        for j in range(K):
                            f = slots[b, j]
                            if f < 0 or held[a, f]:
                                continue
                            price = (0 if first[b, e] else 1) + (0 if first[a, f] else 1)
                            price -= out + (0 if first[b, f] else 1)
                            if moved + price > max_moves:
                                continue
                            gain = cost[a] + cost[b]
                            for w in range(W):
                                change = load_EW[f, w] / count[f] - load_EW[e, w] / count[e]
                                x = max(load[a, w] + change, 0.0)
                                y = max(load[b, w] - change, 0.0)
                                for _d in range(doublings):
                                    x *= x
                                    y *= y
                                gain -= slope[w] * (x + y)
                            worth = gain / price if price > 0 else gain * 1e6
                            if gain > least and worth > best_worth:
                                best_worth, kind, ba, bi, bb, bj = worth, 0, a, i, b, j
                if count[e] < 2:
                    continue
                for f in range(E):
                    if held[a, f] or count[f] == 0:
                        continue
                    price = (0 if first[a, f] else 1) - out
                    if moved + price > max_moves:
                        continue
                    relieves = hot[a]
                    if not relieves:
                        for r in range(R):
                            if hot[r] and held[r, f]:
                                relieves = True
                    if not relieves:
                        continue
                    more_e = 1.0 / (count[e] - 1) - 1.0 / count[e]
                    less_f = 1.0 / (count[f] + 1) - 1.0 / count[f]
                    gain = 0.0
                    for r in range(R):
                        of_e, of_f = 0.0, 0.0
                        if r == a:
                            of_e, of_f = -1.0 / count[e], 1.0 / (count[f] + 1)
                        else:
                            if held[r, e]:
                                of_e = more_e
                            if held[r, f]:
                                of_f = less_f
                        if of_e == 0.0 and of_f == 0.0:
                            continue
                        gain += cost[r]
                        for w in range(W):
                            x = max(load[r, w] + of_e * load_EW[e, w] + of_f * load_EW[f, w], 0.0)
                            for _d in range(doublings):
                                x *= x
                            gain -= slope[w] * x
                    worth = gain / price if price > 0 else gain * 1e6
                    if gain > least and worth > best_worth:
                        best_worth, kind, ba, bi, bb, bj = worth, 1, a, i, 0, f
        if kind < 0:
            break
        e = slots[ba, bi]
        f = slots[bb, bj] if kind == 0 else bj
        moved += (0 if first[ba, f] else 1) - (0 if first[ba, e] else 1)
        slots[ba, bi] = f
        held[ba, e], held[ba, f] = False, True
        if kind == 0:
            moved += (0 if first[bb, e] else 1) - (0 if first[bb, f] else 1)
            slots[bb, bj] = e
            held[bb, f], held[bb, e] = False, True
        else:
            count[e] -= 1
            count[f] += 1
    for m in range(1, max_moves + 1):
        if not objective[m] < objective[m - 1]:
            objective[m] = objective[m - 1]
            for r in range(R):
                for k in range(K):
                    best[m, r, k] = best[m - 1, r, k]
    return best, objective
