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
from eplb.placement.anneal_moves import Move
from eplb.placement.anneal_moves import State as _Shares
from eplb.placement.batch_annealing import (
    _OVERSHOOT,
    _SETTLE_SWEEPS,
    REPLACE,
    SWAP,
    _derive,
    _propose,
    _relax,
    _remember,
    _Saved,
    _State,
    _undo,
    _value,
)
from eplb.placement.repair_kernel import _mark_hot
from eplb.placement.repair_moves import (
    FREE,
    LEAST_GAIN,
    _Candidates,
    _find_replicas,
    _find_swaps,
    _price_of,
    _ReplicaGains,
    _set_pulls,
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
        a, i, b, j = (
            found.move_C4[c, 0], found.move_C4[c, 1], found.move_C4[c, 2], found.move_C4[c, 3]
        )  # fmt: skip
        price = _price_of((a, i, b, j), layer, first_ER)
        kind, e, f, new_cost = _try(layer, state, saved, (a, i, b, j), doublings)
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
    num_experts, num_windows = layer.load_EW.shape
    num_slots = num_ranks * slots_per_rank
    num_parts = 2 * max(num_slots - num_experts, 0) + 2
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
    shares = _Shares(
        state.count_E,
        state.holder_ER,
        state.place_ER,
        state.load_RW[0],
        state.slope_W,
        np.zeros(num_ranks),
    )
    move = Move(
        np.zeros(2, np.int64),
        np.zeros(2, np.int64),
        np.zeros((2, num_ranks + 1), np.int64),
        np.zeros((2, num_ranks + 1)),
        np.zeros(num_ranks, np.int64),
        np.zeros((2, num_ranks)),
        np.zeros(num_ranks),
        np.zeros(num_ranks, np.bool_),
    )
    _derive(layer, state)
    first_ER = np.zeros((num_experts, num_ranks), np.int64)
    for e in range(num_experts):
        for r in range(num_ranks):
            first_ER[e, r] = state.place_ER[e, r] >= 0
    size = min(num_hot, num_ranks) * slots_per_rank * num_slots + num_slots * num_experts
    found = _Candidates(np.zeros(size), np.zeros((size, 4), np.int64))
    gains = _ReplicaGains(
        np.zeros((num_ranks, slots_per_rank)),
        np.zeros((num_experts, 1)),
        np.zeros((num_experts, 1)),
    )
    pull_RE = np.zeros((num_ranks, num_experts))
    buffer_W = np.zeros(num_windows)
    hot_R = np.zeros(num_ranks, np.bool_)
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
        _set_pulls(layer, shares, pull_RE, buffer_W, doublings)
        _mark_hot(hot_R, shares.cost_R, num_hot)
        room = max_moves - moved
        count = _find_swaps(
            found, 0, layer, shares, move, pull_RE, hot_R, first_ER, room, doublings
        )
        count = _find_replicas(
            found, count, gains, layer, shares, move, pull_RE, hot_R, first_ER, room, doublings
        )
        best = _best(found, count, layer, state, saved, first_ER, cost, doublings)
        if best < 0:
            break
        a, i, b, j = (
            found.move_C4[best, 0],
            found.move_C4[best, 1],
            found.move_C4[best, 2],
            found.move_C4[best, 3],
        )
        moved += _price_of((a, i, b, j), layer, first_ER)
        _try(layer, state, saved, (a, i, b, j), doublings)
        _copy_current(state)
    for m in range(1, max_moves + 1):
        if not objective_M[m] < objective_M[m - 1]:
            objective_M[m] = objective_M[m - 1]
            best_MRK[m] = best_MRK[m - 1]
    return best_MRK, objective_M
