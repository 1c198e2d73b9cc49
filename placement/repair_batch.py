"""The inner loop of ``replan`` for the ``batch`` rule, compiled by numba.

As :mod:`eplb.placement.repair_kernel`, with a split of every window carried along as
:mod:`eplb.placement.batch_annealing` does. What a candidate is worth shows only once the splits
have flowed anew, which is dear: candidates are listed as for fixed fractions, those that the splits
have in the mean, and the most promising of them are tried.

Shape letters: W windows, E logical experts, R ranks, K slots of a rank, M moves.
"""

from __future__ import annotations

from math import inf

import numpy as np
from numba import njit

from eplb.placement.anneal_kernel import inner, rank_cost, set_slopes
from eplb.placement.anneal_moves import State, new_move
from eplb.placement.batch_annealing import (
    _OVERSHOOT,
    _SETTLE_SWEEPS,
    REPLACE,
    SWAP,
    _derive,
    _new_state,
    _propose,
    _relax,
    _remember,
    _undo,
    _value,
)
from eplb.placement.repair_moves import (
    FREE,
    LEAST_GAIN,
    candidate_of,
    find_candidates,
    held_experts,
    new_candidates,
    price_of,
)

__all__ = ["repair_batch_layer"]

# Candidates that are tried before each move.
_TRIED = 64


@inner(fastmath=True)
def _mean_shares(layer, state):  # type: ignore[no-untyped-def]
    """Fill in the fraction of its expert's tokens that each slot has over all windows."""
    for e in range(len(state.count_E)):
        total = 0.0
        for w in range(len(layer.weight_W)):
            total += layer.weight_W[w] * layer.load_EW[e, w]
        for i in range(state.count_E[e]):
            r = state.holder_ER[e, i]
            x = state.part_ER[e, r]
            share = 1.0
            if x >= 0:
                part = 0.0
                for w in range(len(layer.weight_W)):
                    part += layer.weight_W[w] * state.part_XW[0, x, w]
                share = part / total if total > 0.0 else 1.0 / state.count_E[e]
            layer.share_RK[r, state.place_ER[e, r]] = share


@inner()
def _copy_current(state):  # type: ignore[no-untyped-def]
    for r in range(state.load_RW.shape[1]):
        state.load_RW[0, r] = state.load_RW[1, r]
    for x in range(state.part_XW.shape[1]):
        state.part_XW[0, x] = state.part_XW[1, x]


@inner()
def _try(layer, state, saved, candidate, doublings):  # type: ignore[no-untyped-def]
    """Propose a candidate; return the kind and slots to take it back by, and its cost."""
    a, i, b, j = candidate
    e = layer.slot_RK[a, i]
    kind = REPLACE if b < 0 else SWAP
    f = j if b < 0 else layer.slot_RK[b, j]
    _remember(state, saved, e, f)
    _propose(layer, state, kind, a, i, b, j, e, f)
    cost = 0.0
    for r in range(state.load_RW.shape[1]):
        cost += rank_cost(state.load_RW[1, r], state.slope_W, doublings)
    return kind, e, f, cost


@inner()
def _best(found, count, layer, state, saved, first_ER, cost, doublings):  # type: ignore[no-untyped-def]
    """Return the best of the most promising candidates, or -1."""
    best, best_worth = -1, 0.0
    for _ in range(min(_TRIED, count)):
        c = 0
        for other in range(count):
            if found.bound_C[other] > found.bound_C[c]:
                c = other
        found.bound_C[c] = -inf
        candidate = candidate_of(found, c)
        price = price_of(candidate, layer, first_ER)
        kind, e, f, new_cost = _try(layer, state, saved, candidate, doublings)
        a, i, b, j = candidate
        _undo(layer, state, saved, kind, a, i, b, j, e, f)
        gain = cost - new_cost
        worth = gain / price if price > 0 else gain * FREE
        if gain > LEAST_GAIN * cost and worth > best_worth:
            best, best_worth = c, worth
    return best


@njit(cache=True, nogil=True)
def repair_batch_layer(layer, max_moves, doublings, num_hot):  # type: ignore[no-untyped-def]
    """Return what :func:`eplb.placement.repair_kernel.repair_layer` does, for ``batch``.

    The objective is that of the splits carried along, and so an upper bound.
    """
    num_ranks, slots_per_rank = layer.slot_RK.shape
    state, saved = _new_state(layer)
    shares = State(
        state.count_E,
        state.holder_ER,
        state.place_ER,
        state.load_RW[0],
        state.slope_W,
        np.zeros(num_ranks),
    )
    move = new_move(num_ranks)
    _derive(layer, state)
    first_ER = held_experts(state.place_ER)
    found = new_candidates(layer, num_hot)
    best_MRK = np.zeros((max_moves + 1, num_ranks, slots_per_rank), np.int64)
    objective_M = np.full(max_moves + 1, inf)
    moved = 0
    for _ in range(4 * max_moves + 16):
        _relax(state, 0, _SETTLE_SWEEPS, _OVERSHOOT)
        value = _value(layer, state.load_RW[0])
        if value < objective_M[moved]:
            objective_M[moved] = value
            best_MRK[moved] = layer.slot_RK
        set_slopes(state.slope_W, layer.weight_W, state.load_RW[0], doublings)
        cost = 0.0
        for r in range(num_ranks):
            shares.cost_R[r] = rank_cost(state.load_RW[0, r], state.slope_W, doublings)
            cost += shares.cost_R[r]
        _mean_shares(layer, state)
        room = max_moves - moved
        count = find_candidates(found, layer, shares, move, first_ER, num_hot, room, doublings)
        best = _best(found, count, layer, state, saved, first_ER, cost, doublings)
        if best < 0:
            break
        candidate = candidate_of(found, best)
        moved += price_of(candidate, layer, first_ER)
        _try(layer, state, saved, candidate, doublings)
        _copy_current(state)
    for m in range(1, max_moves + 1):
        if not objective_M[m] < objective_M[m - 1]:
            objective_M[m] = objective_M[m - 1]
            best_MRK[m] = best_MRK[m - 1]
    return best_MRK, objective_M
