"""The inner loop of the ``search`` solver: simulated annealing of one layer, compiled by numba.

What is minimised is the weighted mean over windows of the largest rank load. It is approached from
above: the largest of a window's loads by their norm of power P, and the norm, which is concave in
the sum of powers, by its tangent. That leaves a sum over ranks,

    sum_r sum_w slope_w * load_rw ** P
    slope_w = weight_w / P * (sum_r load_rw ** P) ** (1 / P - 1)

so a move costs what the few ranks that it touches cost, and to go down in the sum is to go down in
the mean of norms. Slopes are taken anew every sweep, in which also the true objective is looked at
and the best placement kept; P rises while the temperature falls.

Moves: swap two slots; let a slot drop its replica and take one of another expert; with fixed
fractions (``weighted``), shift a part between two replicas.

Shape letters: W windows, E logical experts, R ranks, K slots of a rank.
"""

from __future__ import annotations

from math import inf

import numpy as np
from numba import njit

from eplb.placement.anneal_kernel import (
    NEAREST,
    WEIGHTED,
    accepts,
    add_scaled,
    can_swap,
    copy_rows,
    fill,
    index_slots,
    inner,
    random_below,
    random_unit,
    rank_cost,
    set_slopes,
)
from eplb.placement.anneal_moves import (
    new_move,
    new_state,
    offer,
    propose_replace,
    propose_shift,
    propose_swap,
    rank_cost_with_both,
    rule_shares,
)

__all__ = ["anneal", "derive", "objective", "set_costs", "sum_loads"]

# Loads are summed anew from the slots after this many sweeps, which rounding does not survive.
_RESUM_SWEEPS = 16
# Of the proposals, those that change replica counts and those that shift fractions.
_REPLACE, _SHIFT = 0.1, 0.3


@inner()
def derive(layer, state):  # type: ignore[no-untyped-def]
    """Fill in counts, holders and places, and shares where the rule gives them."""
    num_ranks = len(layer.slot_RK)
    index_slots(layer.slot_RK, state.count_E, state.holder_ER, state.place_ER)
    if layer.rule != WEIGHTED:
        share = np.empty(num_ranks)
        for e in range(len(state.count_E)):
            n = state.count_E[e]
            rule_shares(layer, num_ranks, state.holder_ER[e], n, share)
            for i in range(n):
                r = state.holder_ER[e, i]
                layer.share_RK[r, state.place_ER[e, r]] = share[i]


@inner()
def sum_loads(layer, state):  # type: ignore[no-untyped-def]
    """Fill in rank loads from slots and shares."""
    for r in range(layer.slot_RK.shape[0]):
        fill(state.load_RW[r], 0.0)
        for k in range(layer.slot_RK.shape[1]):
            e = layer.slot_RK[r, k]
            if e >= 0:
                add_scaled(state.load_RW[r], layer.share_RK[r, k], layer.load_EW[e])


@inner()
def objective(layer, state):  # type: ignore[no-untyped-def]
    """Return the weighted mean over windows of the largest rank load."""
    total = 0.0
    for w in range(len(layer.weight_W)):
        largest = 0.0
        for r in range(state.load_RW.shape[0]):
            largest = max(largest, state.load_RW[r, w])
        total += layer.weight_W[w] * largest
    return total


@inner()
def set_costs(layer, state, doublings):  # type: ignore[no-untyped-def]
    """Fill in the slopes of windows and the costs of ranks."""
    set_slopes(state.slope_W, layer.weight_W, state.load_RW, doublings)
    for r in range(len(state.cost_R)):
        state.cost_R[r] = rank_cost(state.load_RW[r], state.slope_W, doublings)


@inner()
def _hot_rank(cost_R, random):  # type: ignore[no-untyped-def]
    """Return a random rank, half the time the costlier of two."""
    r = random_below(random, len(cost_R))
    other = random_below(random, len(cost_R))
    if cost_R[other] > cost_R[r] and random_unit(random) < 0.5:
        return other
    return r


@inner()
def _try_replace(move, layer, state, r, f, temperature, doublings):  # type: ignore[no-untyped-def]
    """Propose that a slot that can be given up takes a replica of expert f."""
    num_ranks, slots_per_rank = layer.slot_RK.shape
    k = 0
    for _ in range(4):
        r, k = random_below(layer.random, num_ranks), random_below(layer.random, slots_per_rank)
        e = layer.slot_RK[r, k]
        if e < 0 or state.count_E[e] > 1:
            break
    if propose_replace(move, layer, state, r, k, f):
        offer(move, layer, state, r, k, -1, -1, temperature, doublings)


@inner()
def _sweep(move, layer, state, temperature, doublings):  # type: ignore[no-untyped-def]
    """Make as many proposals as there are slots.

    Most of them are swaps, and most swaps are refused: these are priced right here, on arrays
    taken out of the tuples, which cost to be handed on.
    """
    random, slot_RK, share_RK, load_EW = layer.random, layer.slot_RK, layer.share_RK, layer.load_EW
    load_RW, slope_W, cost_R = state.load_RW, state.slope_W, state.cost_R
    count_E, place_ER = state.count_E, state.place_ER
    num_ranks, slots_per_rank = slot_RK.shape
    for _ in range(num_ranks * slots_per_rank):
        r, k = _hot_rank(cost_R, random), random_below(random, slots_per_rank)
        kind = random_unit(random)
        if kind < _REPLACE:
            # Of an expert at random, or one that a hot rank would like to share.
            f = slot_RK[r, k]
            if f < 0 or kind < 0.5 * _REPLACE:
                f = random_below(random, len(load_EW))
            _try_replace(move, layer, state, r, f, temperature, doublings)
            continue
        if layer.rule == WEIGHTED and kind < _REPLACE + _SHIFT:
            if propose_shift(move, layer, state, r, k):
                offer(move, layer, state, r, k, -1, -1, temperature, doublings)
            continue
        s, j = random_below(random, num_ranks), random_below(random, slots_per_rank)
        e, f = slot_RK[r, k], slot_RK[s, j]
        if r == s or e == f:
            continue
        if not can_swap(place_ER, layer.node_E, layer.ranks_per_node, r, s, e, f):
            continue
        if e >= 0 and f >= 0 and (layer.rule != NEAREST or (count_E[e] == 1 and count_E[f] == 1)):
            # Shares travel along, so two ranks tell.
            a, b = share_RK[r, k], share_RK[s, j]
            change = (
                rank_cost_with_both(load_RW[r], load_EW[e], -a, load_EW[f], b, slope_W, doublings)
                + rank_cost_with_both(load_RW[s], load_EW[e], a, load_EW[f], -b, slope_W, doublings)
                - cost_R[r]
                - cost_R[s]
            )
            if not accepts(random, change, temperature):
                continue
            limit = inf
        else:
            limit = temperature
        propose_swap(move, layer, state, r, k, s, j)
        offer(move, layer, state, r, k, s, j, limit, doublings)


@njit(cache=True, nogil=True)
def anneal(  # type: ignore[no-untyped-def]
    layer,
    first_temperature,
    last_temperature,
    doublings,
    num_sweeps,
    best_slot_RK,
    best_share_RK,
    best_value,
):
    """Run sweeps of as many proposals as there are slots, from hot to cold.

    Parameters
    ----------
    layer : Layer
    first_temperature, last_temperature : float
        In units of the objective.
    doublings : int
        P = 2 ** doublings.
    num_sweeps : int
    best_slot_RK, best_share_RK : array
        Filled with the best placement that a sweep ended with, if it is below ``best_value``.
    best_value : float

    Returns
    -------
    float
        The objective of ``best_slot_RK``.
    """
    state = new_state(layer)
    move = new_move(len(layer.slot_RK))
    derive(layer, state)
    fall = (last_temperature / first_temperature) ** (1.0 / max(num_sweeps - 1, 1))
    temperature = first_temperature
    for sweep in range(num_sweeps + 1):
        if sweep % _RESUM_SWEEPS == 0 or sweep == num_sweeps:
            sum_loads(layer, state)
        value = objective(layer, state)
        if value < best_value:
            best_value = value
            copy_rows(best_slot_RK, layer.slot_RK)
            copy_rows(best_share_RK, layer.share_RK)
        if sweep < num_sweeps:
            set_costs(layer, state, doublings)
            _sweep(move, layer, state, temperature, doublings)
            temperature *= fall
    return best_value
