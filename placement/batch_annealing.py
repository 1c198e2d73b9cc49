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

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from eplb.arrays import FloatArray
from eplb.placement.anneal_kernel import (
    accepts,
    add_scaled,
    can_swap,
    copy_row,
    copy_rows,
    fill,
    index_slots,
    inner,
    random_below,
    random_unit,
    rank_cost,
    set_slopes,
)

__all__ = ["anneal_batch"]

_NOTHING, SWAP, REPLACE, EXCHANGE = 0, 1, 2, 3
# Of the proposals, those that change replica counts, and those in which two experts change all
# their places.
_REPLACE, _EXCHANGE = 0.2, 0.2
# Sweeps of relaxation before a proposal is priced, and before the objective is looked at; how far
# each step but the last overshoots.
_RELAX_SWEEPS, _SETTLE_SWEEPS, _OVERSHOOT = 2, 8, 1.3


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


class _Saved(NamedTuple):
    """What is needed to take a proposal back."""

    row_ER: NDArray[np.int64]  # [2, 3, R] two experts' rows of the tables above
    number: NDArray[np.int64]  # [3] their counts, and the number of free rows
    free_X: NDArray[np.int64]


@inner()
def _new_state(layer):  # type: ignore[no-untyped-def]
    """Return a state of zeros of a layer's size, and room to save it in."""
    num_ranks, slots_per_rank = layer.slot_RK.shape
    num_experts, num_windows = layer.load_EW.shape
    num_parts = 2 * max(num_ranks * slots_per_rank - num_experts, 0) + 2
    state = _State(
        np.zeros(num_experts, np.int64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros(num_parts, np.int64),
        np.zeros(1, np.int64),
        np.zeros((2, num_parts, num_windows)),
        np.zeros((2, num_ranks, num_windows)),
        np.zeros(num_windows),
    )
    saved = _Saved(
        np.zeros((2, 3, num_ranks), np.int64), np.zeros(3, np.int64), np.zeros(num_parts, np.int64)
    )
    return state, saved


@inner()
def _derive(layer, state):  # type: ignore[no-untyped-def]
    """Fill in the state, with even splits."""
    num_ranks = len(layer.slot_RK)
    index_slots(layer.slot_RK, state.count_E, state.holder_ER, state.place_ER)
    for e in range(len(state.count_E)):
        fill(state.part_ER[e], -1)
    num_parts = len(state.free_X)
    for x in range(num_parts):
        state.free_X[x] = num_parts - 1 - x
    state.num_free[0] = num_parts
    for r in range(num_ranks):
        fill(state.load_RW[0, r], 0.0)
    for e in range(len(state.count_E)):
        n = state.count_E[e]
        for i in range(n):
            r = state.holder_ER[e, i]
            if n > 1:
                x = _take(state)
                state.part_ER[e, r] = x
                fill(state.part_XW[0, x], 0.0)
                add_scaled(state.part_XW[0, x], 1.0 / n, layer.load_EW[e])
            add_scaled(state.load_RW[0, r], 1.0 / n, layer.load_EW[e])


@inner()
def _take(state):  # type: ignore[no-untyped-def]
    state.num_free[0] -= 1
    return state.free_X[state.num_free[0]]


@inner()
def _give(state, x):  # type: ignore[no-untyped-def]
    state.free_X[state.num_free[0]] = x
    state.num_free[0] += 1


@inner(fastmath=True)
def _flow(load_a_W, load_b_W, part_a_W, part_b_W, step):  # type: ignore[no-untyped-def]
    """Let load flow between two replicas' ranks."""
    for w in range(len(load_a_W)):
        flow = step * (load_a_W[w] - load_b_W[w])
        flow = min(max(flow, -part_b_W[w]), part_a_W[w])
        load_a_W[w] -= flow
        load_b_W[w] += flow
        part_a_W[w] -= flow
        part_b_W[w] += flow


@inner()
def _relax_expert(state, buffer, e, step):  # type: ignore[no-untyped-def]
    n = state.count_E[e]
    load_RW, part_XW = state.load_RW[buffer], state.part_XW[buffer]
    for i in range(n if n > 2 else n - 1):
        a, b = state.holder_ER[e, i], state.holder_ER[e, (i + 1) % n]
        x, y = state.part_ER[e, a], state.part_ER[e, b]
        _flow(load_RW[a], load_RW[b], part_XW[x], part_XW[y], step)


@inner()
def _relax(state, buffer, num_sweeps, overshoot):  # type: ignore[no-untyped-def]
    for sweep in range(num_sweeps):
        step = 0.5 if sweep == num_sweeps - 1 else 0.5 * overshoot
        for e in range(len(state.count_E)):
            if state.count_E[e] > 1:
                _relax_expert(state, buffer, e, step)


@inner()
def _value(layer, load_RW):  # type: ignore[no-untyped-def]
    total = 0.0
    for w in range(len(layer.weight_W)):
        largest = 0.0
        for r in range(load_RW.shape[0]):
            largest = max(largest, load_RW[r, w])
        total += layer.weight_W[w] * largest
    return total


@inner()
def _move_replica(layer, state, e, r, s):  # type: ignore[no-untyped-def]
    """Take a replica with its part from rank r to rank s, in the proposed loads."""
    x = state.part_ER[e, r]
    if x >= 0:
        add_scaled(state.load_RW[1, r], -1.0, state.part_XW[1, x])
        add_scaled(state.load_RW[1, s], 1.0, state.part_XW[1, x])
    else:
        add_scaled(state.load_RW[1, r], -1.0, layer.load_EW[e])
        add_scaled(state.load_RW[1, s], 1.0, layer.load_EW[e])
    state.part_ER[e, s] = x
    state.part_ER[e, r] = -1
    for i in range(state.count_E[e]):
        if state.holder_ER[e, i] == r:
            state.holder_ER[e, i] = s


@inner()
def _swap(layer, state, r, k, s, j):  # type: ignore[no-untyped-def]
    e, f = layer.slot_RK[r, k], layer.slot_RK[s, j]
    layer.slot_RK[r, k], layer.slot_RK[s, j] = f, e
    if e >= 0:
        _move_replica(layer, state, e, r, s)
        state.place_ER[e, r], state.place_ER[e, s] = -1, j
    if f >= 0:
        _move_replica(layer, state, f, s, r)
        state.place_ER[f, s], state.place_ER[f, r] = -1, k


@inner()
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
            add_scaled(state.load_RW[1, q], 1.0 / n, state.part_XW[1, x])
            add_scaled(state.part_XW[1, y], 1.0 / n, state.part_XW[1, x])
            if n == 1:
                state.part_ER[e, q] = -1
                _give(state, y)
    add_scaled(state.load_RW[1, r], -1.0, state.part_XW[1, x])
    state.part_ER[e, r] = -1
    state.place_ER[e, r] = -1
    state.count_E[e] = n
    _give(state, x)


@inner()
def _place(layer, state, f, r, k):  # type: ignore[no-untyped-def]
    """Put a replica that receives nothing yet into slot k of rank r."""
    n = state.count_E[f]
    if n == 1:
        y = _take(state)
        state.part_ER[f, state.holder_ER[f, 0]] = y
        copy_row(state.part_XW[1, y], layer.load_EW[f])
    x = _take(state)
    state.part_ER[f, r] = x
    fill(state.part_XW[1, x], 0.0)
    state.holder_ER[f, n] = r
    state.place_ER[f, r] = k
    state.count_E[f] = n + 1
    layer.slot_RK[r, k] = f


@inner()
def _exchange(layer, state, e, f):  # type: ignore[no-untyped-def]
    """Let two experts take each other's slots, and divide as the other did."""
    for g, h in ((e, f), (f, e)):
        for i in range(state.count_E[g]):
            r = state.holder_ER[g, i]
            x = state.part_ER[g, r]
            layer.slot_RK[r, state.place_ER[g, r]] = h
            if x < 0:
                add_scaled(state.load_RW[1, r], 1.0, layer.load_EW[h])
                add_scaled(state.load_RW[1, r], -1.0, layer.load_EW[g])
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


@inner()
def _choose(layer, state, cost_R, fixed):  # type: ignore[no-untyped-def]
    """Return what kind of proposal is made, of which slots, and the experts it concerns."""
    num_ranks, slots_per_rank = layer.slot_RK.shape
    random, slot_RK = layer.random, layer.slot_RK
    r, k = random_below(random, num_ranks), random_below(random, slots_per_rank)
    s, j = random_below(random, num_ranks), random_below(random, slots_per_rank)
    if cost_R[s] > cost_R[r]:
        r, s = s, r
    e, f = slot_RK[r, k], slot_RK[s, j]
    kind = random_unit(random)
    if kind < _EXCHANGE:
        if min(e, f) < 0 or e == f or (state.count_E[e] == 1 and state.count_E[f] == 1):
            return _NOTHING, r, k, s, j, e, f
        if layer.node_E[e] != layer.node_E[f]:
            return _NOTHING, r, k, s, j, e, f
        return EXCHANGE, r, k, s, j, e, f
    if kind < _EXCHANGE + _REPLACE and not fixed:
        f = e
        if f < 0 or kind < _EXCHANGE + 0.5 * _REPLACE:
            f = random_below(random, len(layer.load_EW))
        for _ in range(4):
            r, k = random_below(random, num_ranks), random_below(random, slots_per_rank)
            e = slot_RK[r, k]
            if e < 0 or state.count_E[e] > 1:
                break
        allowed = e != f and state.place_ER[f, r] < 0 and (e < 0 or state.count_E[e] > 1)
        if layer.node_E[f] >= 0 and layer.node_E[f] != r // layer.ranks_per_node:
            allowed = False
        return (REPLACE if allowed else _NOTHING), r, k, s, j, e, f
    allowed = r != s and e != f
    if fixed and ((e >= 0 and state.count_E[e] > 1) or (f >= 0 and state.count_E[f] > 1)):
        allowed = False
    if not can_swap(state.place_ER, layer.node_E, layer.ranks_per_node, r, s, e, f):
        allowed = False
    return (SWAP if allowed else _NOTHING), r, k, s, j, e, f


@inner()
def _remember(state, saved, e, f):  # type: ignore[no-untyped-def]
    """Keep what a proposal about two experts may change, besides loads, parts and slots."""
    for which, g in ((0, e), (1, f)):
        if g >= 0:
            copy_row(saved.row_ER[which, 0], state.holder_ER[g])
            copy_row(saved.row_ER[which, 1], state.place_ER[g])
            copy_row(saved.row_ER[which, 2], state.part_ER[g])
            saved.number[which] = state.count_E[g]
    saved.number[2] = state.num_free[0]
    copy_row(saved.free_X, state.free_X)


@inner()
def _undo(layer, state, saved, kind, r, k, s, j, e, f):  # type: ignore[no-untyped-def]
    if kind == REPLACE:
        layer.slot_RK[r, k] = e
    elif kind == SWAP:
        layer.slot_RK[r, k], layer.slot_RK[s, j] = e, f
    for which, g in ((0, e), (1, f)):
        if g >= 0:
            copy_row(state.holder_ER[g], saved.row_ER[which, 0])
            copy_row(state.place_ER[g], saved.row_ER[which, 1])
            copy_row(state.part_ER[g], saved.row_ER[which, 2])
            state.count_E[g] = saved.number[which]
            if kind == EXCHANGE:
                for i in range(state.count_E[g]):
                    q = state.holder_ER[g, i]
                    layer.slot_RK[q, state.place_ER[g, q]] = g
    state.num_free[0] = saved.number[2]
    copy_row(state.free_X, saved.free_X)


@inner()
def _propose(layer, state, kind, r, k, s, j, e, f):  # type: ignore[no-untyped-def]
    """Change the slots, and the proposed loads from the current ones, and relax these."""
    copy_rows(state.load_RW[1], state.load_RW[0])
    copy_rows(state.part_XW[1], state.part_XW[0])
    if kind == EXCHANGE:
        _exchange(layer, state, e, f)
    elif kind == REPLACE:
        if e >= 0:
            _drop(layer, state, e, r)
        _place(layer, state, f, r, k)
    else:
        _swap(layer, state, r, k, s, j)
    for g in (f, e):
        if g >= 0 and state.count_E[g] > 1:
            _relax_expert(state, 1, g, 0.5)
    _relax(state, 1, _RELAX_SWEEPS, _OVERSHOOT)


@inner()
def _sweep(layer, state, saved, temperature, doublings, fixed):  # type: ignore[no-untyped-def]
    """Make as many proposals as there are slots."""
    num_ranks, slots_per_rank = layer.slot_RK.shape
    cost_R = np.zeros(num_ranks)
    cost = 0.0
    for r in range(num_ranks):
        cost_R[r] = rank_cost(state.load_RW[0, r], state.slope_W, doublings)
        cost += cost_R[r]
    for _ in range(num_ranks * slots_per_rank):
        kind, r, k, s, j, e, f = _choose(layer, state, cost_R, fixed)
        if kind == _NOTHING:
            continue
        _remember(state, saved, e, f)
        _propose(layer, state, kind, r, k, s, j, e, f)
        new_cost = 0.0
        for q in range(num_ranks):
            new_cost += rank_cost(state.load_RW[1, q], state.slope_W, doublings)
        if accepts(layer.random, new_cost - cost, temperature):
            copy_rows(state.load_RW[0], state.load_RW[1])
            copy_rows(state.part_XW[0], state.part_XW[1])
            cost = new_cost
        else:
            _undo(layer, state, saved, kind, r, k, s, j, e, f)


@njit(cache=True, nogil=True)
def anneal_batch(  # type: ignore[no-untyped-def]
    layer,
    first_temperature,
    last_temperature,
    doublings,
    num_sweeps,
    best_slot_RK,
    best_value,
    fixed,
):
    """Run sweeps of as many proposals as there are slots, from hot to cold.

    Takes what :func:`eplb.placement.annealing.anneal` takes, but for shares, which are not used.

    Parameters
    ----------
    fixed : bool
        Keep which slots share an expert: only experts move.

    Returns
    -------
    float
        An upper bound of the objective of ``best_slot_RK``.
    """
    state, saved = _new_state(layer)
    _derive(layer, state)
    fall = (last_temperature / first_temperature) ** (1.0 / max(num_sweeps - 1, 1))
    temperature = first_temperature
    for sweep in range(num_sweeps + 1):
        _relax(state, 0, _SETTLE_SWEEPS, _OVERSHOOT)
        value = _value(layer, state.load_RW[0])
        if value < best_value:
            best_value = value
            copy_rows(best_slot_RK, layer.slot_RK)
        if sweep < num_sweeps:
            set_slopes(state.slope_W, layer.weight_W, state.load_RW[0], doublings)
            _sweep(layer, state, saved, temperature, doublings, fixed)
            temperature *= fall
    return best_value
