"""The inner loop of ``repair`` and ``resize``: put experts into slots one by one, by numba.

An expert that no rank holds goes into the slot, empty or of a redundant replica, where it costs
least; empty slots that are left then get the replicas that gain most. What is lowered is, over
ranks r and windows w, the smooth stand-in for the largest rank load

    sum_w weight_w * (sum_r (load_rw / speed_r) ** P) ** (1 / P)

which has no plateaus. Replicas of an expert share its load evenly.

Shape letters: W windows, E logical experts, R ranks, K slots of a rank, X lost experts, F fills.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["refill_layer"]

# Objectives this close are equal up to rounding.
_ROUNDING = 1e-9


@njit(cache=True, nogil=True)
def _power(value: float, doublings: int) -> float:
    value = max(value, 0.0)
    for _ in range(doublings):
        value *= value
    return value


@njit(cache=True, nogil=True)
def _sums(
    load_EW: Any, speed_R: Any, held_RE: Any, count_E: Any, doublings: int, load_RW: Any, sum_W: Any
) -> None:
    """Set the rank loads and their power sums anew: rounding does not add up."""
    R, W = load_RW.shape
    load_RW[:] = 0.0
    sum_W[:] = 0.0
    for r in range(R):
        for e in range(len(count_E)):
            if held_RE[r, e]:
                for w in range(W):
                    load_RW[r, w] += held_RE[r, e] * load_EW[e, w] / count_E[e]
        for w in range(W):
            sum_W[w] += _power(load_RW[r, w] / speed_R[r], doublings)


@njit(cache=True, nogil=True)
def _after(
    load_EW: Any,
    weight_W: Any,
    speed_R: Any,
    held_RE: Any,
    count_E: Any,
    load_RW: Any,
    sum_W: Any,
    doublings: int,
    rank: int,
    out: int,
    into: int,
) -> float:
    """Return the objective once ``rank`` holds ``into`` in place of ``out`` (-1: of nothing)."""
    R, W = load_RW.shape
    new_W = sum_W.copy()
    more = 0.0 if out < 0 else 1.0 / (count_E[out] - 1) - 1.0 / count_E[out]
    less = 0.0 if count_E[into] == 0 else 1.0 / (count_E[into] + 1) - 1.0 / count_E[into]
    for r in range(R):
        of_out = 0.0 if out < 0 else held_RE[r, out] * more
        of_into = held_RE[r, into] * less
        if r == rank:
            if out >= 0:
                of_out -= 1.0 / (count_E[out] - 1)
            of_into += 1.0 / (count_E[into] + 1)
        if of_out == 0.0 and of_into == 0.0:
            continue
        for w in range(W):
            load = load_RW[r, w] + of_into * load_EW[into, w]
            if out >= 0:
                load += of_out * load_EW[out, w]
            new_W[w] += _power(load / speed_R[r], doublings)
            new_W[w] -= _power(load_RW[r, w] / speed_R[r], doublings)
    total = 0.0
    for w in range(W):
        total += weight_W[w] * max(new_W[w], 0.0) ** (1.0 / 2.0**doublings)
    return total


@njit(cache=True, nogil=True)
def refill_layer(  # noqa: PLR0912, PLR0915  (calls cost numba seconds each)
    load_EW: NDArray[np.float64],
    weight_W: NDArray[np.float64],
    speed_R: NDArray[np.float64],
    slots_RK: NDArray[np.int64],
    lost_X: NDArray[np.int64],
    max_fills: int,
    doublings: int,
    num_hot: int,
    sweeps: int,
) -> Any:
    """Restore experts, then fill empty slots.

    Parameters
    ----------
    load_EW : array of float64
        Loads of a mean load / speed of 1.
    weight_W, speed_R : array of float64
    slots_RK : array of int64
        -1 is an empty slot, -2 one that the rank does not have.
    lost_X : array of int64
        Experts that no slot holds, by falling load; there are as many slots as experts.
    max_fills : int
        Most empty slots to fill beyond that.
    doublings : int
        P is 2 to this power.
    num_hot : int
        Fills are replicas of experts on one of so many most loaded ranks.
    sweeps : int
        How often each restored expert is taken out and put where it then costs least.

    Returns
    -------
    slots_RK : array of int64
    place_X2 : array of int64
        Rank and slot of each restored expert.
    fill_F2 : array of int64
        Rank and slot of each fill, in order.
    objective_F : array of float64, one longer
        Before the fills, and after each.
    """
    R, K = slots_RK.shape
    E, W = load_EW.shape
    slots = slots_RK.copy()
    held = np.zeros((R, E), np.int64)
    count = np.zeros(E, np.int64)
    for r in range(R):
        for k in range(K):
            if slots[r, k] >= 0:
                held[r, slots[r, k]] += 1
                count[slots[r, k]] += 1
    load = np.zeros((R, W))
    sums = np.zeros(W)
    place = np.full((len(lost_X), 2), -1, np.int64)
    victim = np.full(len(lost_X), -1, np.int64)
    for sweep in range(1 + sweeps):
        changed = False
        for x in range(len(lost_X)):
            e = lost_X[x]
            old_r, old_k = place[x]
            if sweep:
                held[old_r, e] -= 1
                count[e] -= 1
                slots[old_r, old_k] = victim[x]
                if victim[x] >= 0:
                    held[old_r, victim[x]] += 1
                    count[victim[x]] += 1
            _sums(load_EW, speed_R, held, count, doublings, load, sums)
            best, best_r, best_k = np.inf, -1, -1
            if sweep:
                # Where it was comes first: others have to be better.
                best, best_r, best_k = (
                    _after(load_EW, weight_W, speed_R, held, count, load, sums, doublings,
                           old_r, victim[x], e) * (1 - _ROUNDING), old_r, old_k,
                )  # fmt: skip
            for r in range(R):
                for k in range(K):
                    f = slots[r, k]
                    if f == -2 or (f >= 0 and count[f] < 2):
                        continue
                    value = _after(load_EW, weight_W, speed_R, held, count, load, sums, doublings,
                                   r, f, e)  # fmt: skip
                    if value < best:
                        best, best_r, best_k = value, r, k
            f = slots[best_r, best_k]
            if f >= 0:
                held[best_r, f] -= 1
                count[f] -= 1
            changed |= best_r != old_r or best_k != old_k
            slots[best_r, best_k] = e
            held[best_r, e] += 1
            count[e] += 1
            place[x, 0], place[x, 1], victim[x] = best_r, best_k, f
        if not changed:
            break
    fills = np.full((max_fills, 2), -1, np.int64)
    objective = np.zeros(max_fills + 1)
    heat = np.zeros(R)
    hot = np.zeros(E, np.bool_)
    done = 0
    while True:
        _sums(load_EW, speed_R, held, count, doublings, load, sums)
        now = 0.0
        for w in range(W):
            now += weight_W[w] * sums[w] ** (1.0 / 2.0**doublings)
        objective[done] = now
        if done == max_fills:
            break
        for r in range(R):
            heat[r] = 0.0
            for w in range(W):
                if sums[w] > 0:
                    heat[r] += (
                        weight_W[w] * _power(load[r, w] / speed_R[r], doublings)
                        * sums[w] ** (1.0 / 2.0**doublings - 1.0)
                    )  # fmt: skip
        hot[:] = False
        for _ in range(min(num_hot, R)):
            top = heat.argmax()
            heat[top] = -1.0
            hot |= held[top] > 0
        best, best_r, best_k, best_e = now * (1 - _ROUNDING), -1, -1, -1
        for r in range(R):
            for k in range(K):
                if slots[r, k] != -1:
                    continue
                for e in range(E):
                    if hot[e] and held[r, e] == 0:
                        value = _after(load_EW, weight_W, speed_R, held, count, load, sums,
                                       doublings, r, -1, e)  # fmt: skip
                        if value < best:
                            best, best_r, best_k, best_e = value, r, k, e
                # Empty slots of a rank are alike.
                break
        if best_r < 0:
            break
        slots[best_r, best_k] = best_e
        held[best_r, best_e] += 1
        count[best_e] += 1
        fills[done, 0], fills[done, 1] = best_r, best_k
        done += 1
    return slots, place, fills[:done], objective[: done + 1]
