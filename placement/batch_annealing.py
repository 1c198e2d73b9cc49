"""Simulated annealing of one layer for the ``batch`` rule, compiled by numba.

Under ``batch`` every window divides its tokens over the replicas as is best for it, so replicas are
connections: what a rank has too much of flows to the ranks that it shares experts with, and on
from there. The search carries a split of every window along. A proposal is priced after the split
was relaxed: for each pair of replicas in turn, load flows from the fuller rank to the emptier, as
far as the replica has some (Gauss-Seidel on the sum of squared rank loads, whose minimum is also
the min-max split). Splits stay feasible, so the largest load seen is never below the optimum that
:func:`eplb.batch_split.batch_max_load` finds for the placement.

The objective is approached as in :mod:`eplb.placement.annealing`, whose helpers are used here.
Shape letters: W windows, E logical experts, R ranks, K slots of a rank, X parts (slots of experts
with several replicas).
"""

from __future__ import annotations

from math import exp
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from eplb.arrays import FloatArray
from eplb.placement.annealing import _below, _cost, _random

__all__ = ["anneal_batch"]

_REPLACE, _EXCHANGE = 0.2, 0.2
# Sweeps of relaxation before a proposal is priced, and how far each step overshoots.
_RELAX_SWEEPS, _OVERSHOOT = 2, 1.3


class _State(NamedTuple):
    count_E: NDArray[np.int64]
    holder_ER: NDArray[np.int64]  # ranks that hold an expert, the first count_E of a row
    place_ER: NDArray[np.int64]  # the slot of an expert on a rank, or -1
    part_ER: NDArray[np.int64]  # the row of part_XW of a replica, or -1 for an expert's only one
    free_X: NDArray[np.int64]  # unused rows, the first num_free
    num_free: NDArray[np.int64]  # [1]
    part_XW: FloatArray  # [2, X, W] what a replica receives; the current and the proposed
    load_RW: FloatArray  # [2, R, W]
    slope_W: FloatArray


@njit(cache=True, nogil=True)
def _derive(layer, state):  # type: ignore[no-untyped-def]
    """Fill in the state, with even splits."""
    num_ranks, slots_per_rank = layer.slot_RK.shape
    state.count_E[:] = 0
    state.place_ER[:] = -1
    state.part_ER[:] = -1
    for r in range(num_ranks):
        for k in range(slots_per_rank):
            e = layer.slot_RK[r, k]
            if e >= 0:
                state.holder_ER[e, state.count_E[e]] = r
                state.count_E[e] += 1
                state.place_ER[e, r] = k
    num_parts = len(state.free_X)
    for x in range(num_parts):
        state.free_X[x] = num_parts - 1 - x
    state.num_free[0] = num_parts
    state.load_RW[0] = 0.0
    for e in range(len(state.count_E)):
        n = state.count_E[e]
        for i in range(n):
            r = state.holder_ER[e, i]
            if n > 1:
                x = _take(state)
                state.part_ER[e, r] = x
                state.part_XW[0, x] = layer.load_EW[e] / n
                state.load_RW[0, r] += state.part_XW[0, x]
            else:
                state.load_RW[0, r] += layer.load_EW[e]


@njit(cache=True, nogil=True)
def _take(state):  # type: ignore[no-untyped-def]
    state.num_free[0] -= 1
    return state.free_X[state.num_free[0]]


@njit(cache=True, nogil=True)
def _give(state, x):  # type: ignore[no-untyped-def]
    state.free_X[state.num_free[0]] = x
    state.num_free[0] += 1


@njit(cache=True, nogil=True, fastmath=True)
def _flow(load_a_W, load_b_W, part_a_W, part_b_W, step):  # type: ignore[no-untyped-def]
    """Let load flow between two replicas' ranks."""
    for w in range(len(load_a_W)):
        flow = step * (load_a_W[w] - load_b_W[w])
        flow = min(max(flow, -part_b_W[w]), part_a_W[w])
        load_a_W[w] -= flow
        load_b_W[w] += flow
        part_a_W[w] -= flow
        part_b_W[w] += flow


@njit(cache=True, nogil=True)
def _relax_expert(state, buffer, e, step):  # type: ignore[no-untyped-def]
    n = state.count_E[e]
    load_RW, part_XW = state.load_RW[buffer], state.part_XW[buffer]
    for i in range(n if n > 2 else n - 1):
        a, b = state.holder_ER[e, i], state.holder_ER[e, (i + 1) % n]
        x, y = state.part_ER[e, a], state.part_ER[e, b]
        _flow(load_RW[a], load_RW[b], part_XW[x], part_XW[y], step)


@njit(cache=True, nogil=True)
def _relax(state, buffer, num_sweeps, overshoot):  # type: ignore[no-untyped-def]
    for sweep in range(num_sweeps):
        step = 0.5 if sweep == num_sweeps - 1 else 0.5 * overshoot
        for e in range(len(state.count_E)):
            if state.count_E[e] > 1:
                _relax_expert(state, buffer, e, step)


@njit(cache=True, nogil=True)
def _value(layer, load_RW):  # type: ignore[no-untyped-def]
    total = 0.0
    for w in range(len(layer.weight_W)):
        largest = 0.0
        for r in range(load_RW.shape[0]):
            largest = max(largest, load_RW[r, w])
        total += layer.weight_W[w] * largest
    return total


@njit(cache=True, nogil=True)
def _total_cost(load_RW, slope_W, doublings):  # type: ignore[no-untyped-def]
    total = 0.0
    for r in range(load_RW.shape[0]):
        total += _cost(load_RW[r], slope_W, doublings)
    return total


@njit(cache=True, nogil=True, fastmath=True)
def _set_slopes(layer, state, doublings):  # type: ignore[no-untyped-def]
    power = 2.0**doublings
    load_RW = state.load_RW[0]
    for w in range(load_RW.shape[1]):
        total = 0.0
        for r in range(load_RW.shape[0]):
            v = load_RW[r, w]
            for _ in range(doublings):
                v *= v
            total += v
        state.slope_W[w] = layer.weight_W[w] / power * total ** (1.0 / power - 1.0)


@njit(cache=True, nogil=True)
def _move_replica(layer, state, e, r, s):  # type: ignore[no-untyped-def]
    """Take a replica with its part from rank r to rank s, in the proposed loads."""
    x = state.part_ER[e, r]
    if x >= 0:
        state.load_RW[1, r] -= state.part_XW[1, x]
        state.load_RW[1, s] += state.part_XW[1, x]
    else:
        state.load_RW[1, r] -= layer.load_EW[e]
        state.load_RW[1, s] += layer.load_EW[e]
    state.part_ER[e, s] = x
    state.part_ER[e, r] = -1
    for i in range(state.count_E[e]):
        if state.holder_ER[e, i] == r:
            state.holder_ER[e, i] = s


@njit(cache=True, nogil=True)
def _swap(layer, state, r, k, s, j):  # type: ignore[no-untyped-def]
    e, f = layer.slot_RK[r, k], layer.slot_RK[s, j]
    layer.slot_RK[r, k], layer.slot_RK[s, j] = f, e
    if e >= 0:
        _move_replica(layer, state, e, r, s)
        state.place_ER[e, r], state.place_ER[e, s] = -1, j
    if f >= 0:
        _move_replica(layer, state, f, s, r)
        state.place_ER[f, s], state.place_ER[f, r] = -1, k


@njit(cache=True, nogil=True)
def _drop(layer, state, e, r):  # type: ignore[no-untyped-def]
    """Take the replica on rank r away; the others receive its part, in equal pieces."""
    x = state.part_ER[e, r]
    n = state.count_E[e] - 1
    at = 0
    for i in range(n + 1):
        q = state.holder_ER[e, i]
        if q != r:
            state.holder_ER[e, at] = q
            at += 1
            y = state.part_ER[e, q]
            state.load_RW[1, q] += state.part_XW[1, x] / n
            state.part_XW[1, y] += state.part_XW[1, x] / n
            if n == 1:
                state.part_ER[e, q] = -1
                _give(state, y)
    state.load_RW[1, r] -= state.part_XW[1, x]
    state.part_ER[e, r] = -1
    state.place_ER[e, r] = -1
    state.count_E[e] = n
    _give(state, x)


@njit(cache=True, nogil=True)
def _add(layer, state, f, r, k):  # type: ignore[no-untyped-def]
    """Put a replica that receives nothing yet into slot k of rank r."""
    n = state.count_E[f]
    if n == 1:
        y = _take(state)
        state.part_ER[f, state.holder_ER[f, 0]] = y
        state.part_XW[1, y] = layer.load_EW[f]
    x = _take(state)
    state.part_ER[f, r] = x
    state.part_XW[1, x] = 0.0
    state.holder_ER[f, n] = r
    state.place_ER[f, r] = k
    state.count_E[f] = n + 1
    layer.slot_RK[r, k] = f


@njit(cache=True, nogil=True)
def _exchange(layer, state, e, f):  # type: ignore[no-untyped-def]
    """Let two experts take each other's slots, and divide as the other did."""
    for g, h in ((e, f), (f, e)):
        for i in range(state.count_E[g]):
            r = state.holder_ER[g, i]
            x = state.part_ER[g, r]
            layer.slot_RK[r, state.place_ER[g, r]] = h
            if x < 0:
                state.load_RW[1, r] += layer.load_EW[h] - layer.load_EW[g]
            else:
                for w in range(layer.load_EW.shape[1]):
                    old = state.part_XW[1, x, w]
                    whole = layer.load_EW[g, w]
                    part = old / whole if whole > 0.0 else 1.0 / state.count_E[g]
                    state.part_XW[1, x, w] = part * layer.load_EW[h, w]
                    state.load_RW[1, r, w] += state.part_XW[1, x, w] - old
    for r in range(state.holder_ER.shape[1]):
        for table in (state.holder_ER, state.place_ER, state.part_ER):
            table[e, r], table[f, r] = table[f, r], table[e, r]
    state.count_E[e], state.count_E[f] = state.count_E[f], state.count_E[e]


@njit(cache=True, nogil=True)
def anneal_batch(  # type: ignore[no-untyped-def]
    layer, first_temperature, last_temperature, doublings, num_sweeps, best_slot_RK, best_value, fixed=False
):
    """Run sweeps of as many proposals as there are slots, from hot to cold.

    Takes what :func:`eplb.placement.annealing.anneal` takes; shares are not used.

    Returns
    -------
    float
        An upper bound of the objective of ``best_slot_RK``.
    """
    num_ranks, slots_per_rank = layer.slot_RK.shape
    num_experts, num_windows = layer.load_EW.shape
    num_extra = max(num_ranks * slots_per_rank - num_experts, 0)
    state = _State(
        np.zeros(num_experts, np.int64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros(2 * num_extra + 2, np.int64),
        np.zeros(1, np.int64),
        np.zeros((2, 2 * num_extra + 2, num_windows)),
        np.zeros((2, num_ranks, num_windows)),
        np.zeros(num_windows),
    )
    random, slot_RK = layer.random, layer.slot_RK
    _derive(layer, state)
    saved_ER = np.zeros((6, num_ranks), np.int64)
    saved_free_X = np.zeros_like(state.free_X)
    rank_cost_R = np.zeros(num_ranks)
    fall = (last_temperature / first_temperature) ** (1.0 / max(num_sweeps - 1, 1))
    temperature = first_temperature
    for sweep in range(num_sweeps + 1):
        _relax(state, 0, 8, _OVERSHOOT)
        value = _value(layer, state.load_RW[0])
        if value < best_value:
            best_value = value
            best_slot_RK[:] = slot_RK
        if sweep == num_sweeps:
            break
        _set_slopes(layer, state, doublings)
        for r in range(num_ranks):
            rank_cost_R[r] = _cost(state.load_RW[0, r], state.slope_W, doublings)
        cost = _total_cost(state.load_RW[0], state.slope_W, doublings)
        for _ in range(num_ranks * slots_per_rank):
            r, k = _below(random, num_ranks), _below(random, slots_per_rank)
            s, j = _below(random, num_ranks), _below(random, slots_per_rank)
            if rank_cost_R[s] > rank_cost_R[r]:
                r, s = s, r
            kind = _random(random)
            replace = kind < _REPLACE and not fixed
            exchange = not replace and kind < _REPLACE + _EXCHANGE
            if exchange:
                e, f = slot_RK[r, k], slot_RK[s, j]
                if e < 0 or f < 0 or e == f or (state.count_E[e] == 1 and state.count_E[f] == 1):
                    continue
            elif replace:
                f = slot_RK[s, j]
                if _random(random) < 0.5:
                    f = _below(random, num_experts)
                for _ in range(4):
                    r, k = _below(random, num_ranks), _below(random, slots_per_rank)
                    e = slot_RK[r, k]
                    if e < 0 or state.count_E[e] > 1:
                        break
                if f < 0 or e == f or state.place_ER[f, r] >= 0:
                    continue
                if e >= 0 and state.count_E[e] < 2:
                    continue
                if layer.node_E[f] >= 0 and layer.node_E[f] != r // layer.ranks_per_node:
                    continue
            else:
                e, f = slot_RK[r, k], slot_RK[s, j]
                if r == s or e == f:
                    continue
                if fixed and (state.count_E[e]>1 or state.count_E[f]>1): continue
                if (e >= 0 and state.place_ER[e, s] >= 0) or (f >= 0 and state.place_ER[f, r] >= 0):
                    continue
                if r // layer.ranks_per_node != s // layer.ranks_per_node and (
                    (e >= 0 and layer.node_E[e] >= 0) or (f >= 0 and layer.node_E[f] >= 0)
                ):
                    continue
            count_e, count_f = (state.count_E[e] if e >= 0 else 0), (
                state.count_E[f] if f >= 0 else 0
            )
            for which, g in ((0, e), (1, f)):
                if g >= 0:
                    saved_ER[3 * which] = state.holder_ER[g]
                    saved_ER[3 * which + 1] = state.place_ER[g]
                    saved_ER[3 * which + 2] = state.part_ER[g]
            num_free = state.num_free[0]
            saved_free_X[:] = state.free_X
            state.load_RW[1] = state.load_RW[0]
            state.part_XW[1] = state.part_XW[0]
            if replace:
                if e >= 0:
                    _drop(layer, state, e, r)
                _add(layer, state, f, r, k)
            elif exchange:
                _exchange(layer, state, e, f)
            else:
                _swap(layer, state, r, k, s, j)
            if f >= 0 and state.count_E[f] > 1:
                _relax_expert(state, 1, f, 0.5)
            if e >= 0 and state.count_E[e] > 1:
                _relax_expert(state, 1, e, 0.5)
            _relax(state, 1, _RELAX_SWEEPS, _OVERSHOOT)
            new_cost = _total_cost(state.load_RW[1], state.slope_W, doublings)
            change = new_cost - cost
            if change <= 0.0 or _random(random) < exp(-change / temperature):
                state.load_RW[0] = state.load_RW[1]
                state.part_XW[0] = state.part_XW[1]
                cost = new_cost
                continue
            if replace:
                slot_RK[r, k] = e
            elif exchange:
                for g, h in ((e, f), (f, e)):
                    for i in range(state.count_E[g]):
                        q = state.holder_ER[g, i]
                        slot_RK[q, state.place_ER[g, q]] = -2 - h
                for q in range(num_ranks):
                    for i in range(slots_per_rank):
                        if slot_RK[q, i] < -1:
                            slot_RK[q, i] = -2 - slot_RK[q, i]
            else:
                slot_RK[r, k], slot_RK[s, j] = e, f
            for which, g, count in ((0, e, count_e), (1, f, count_f)):
                if g >= 0:
                    state.holder_ER[g] = saved_ER[3 * which]
                    state.place_ER[g] = saved_ER[3 * which + 1]
                    state.part_ER[g] = saved_ER[3 * which + 2]
                    state.count_E[g] = count
            state.num_free[0] = num_free
            state.free_X[:] = saved_free_X
        temperature *= fall
    return best_value
