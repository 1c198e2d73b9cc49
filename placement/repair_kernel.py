"""The inner loop of ``replan``: the best moves of one layer, one after the other, by numba.

From the placement in force the swap of two slots, or the replacement of a replica by one of another
expert, is made that gains most for each expert that has to be fetched. What is lowered is the sum
over ranks and windows of :mod:`eplb.placement.annealing`, whose helpers are used here. An expert is
fetched when a rank holds it that did not hold it at first: taking it back is free, and gives the
move back. Of the candidates of :mod:`eplb.placement.repair_moves` the most promising are priced
window by window, as long as their bounds are above the best gain found.

Shape letters: W windows, E logical experts, R ranks, K slots of a rank, M moves, C candidates.
"""

from __future__ import annotations

from math import inf

import numpy as np
from numba import njit

from eplb.placement.anneal_kernel import WEIGHTED, inner
from eplb.placement.anneal_moves import apply, keep, new_move, new_state, price
from eplb.placement.annealing import derive, objective, set_costs, sum_loads
from eplb.placement.repair_moves import (
    FREE,
    LEAST_GAIN,
    candidate_of,
    find_candidates,
    held_experts,
    new_candidates,
    price_of,
    propose,
)

__all__ = ["repair_layer"]

# Candidates that are priced window by window before each move.
_PRICED = 256
# Parts of two replicas' fractions that are shifted between them, largest first.
_SHIFTS = (0.2, 0.05, 0.01)


@inner()
def _best(found, count, move, layer, state, first_ER, doublings):  # type: ignore[no-untyped-def]
    """Return the candidate of the highest worth, or -1; of those with the highest bounds."""
    best, best_worth = -1, 0.0
    least = LEAST_GAIN * state.cost_R.sum()
    cut = 0.0
    if count > _PRICED:
        cut = np.partition(found.bound_C[:count], count - _PRICED)[count - _PRICED]
    # The one with the highest bound first: its worth rules most of the others out.
    top = 0
    for c in range(count):
        if found.bound_C[c] > found.bound_C[top]:
            top = c
    for number in range(count + 1):
        c = top if number == 0 else number - 1
        if count == 0 or found.bound_C[c] <= best_worth or found.bound_C[c] < cut:
            continue
        candidate = candidate_of(found, c)
        propose(candidate, move, layer, state)
        change, _ = price(move, layer, state, doublings)
        if -change <= least:
            continue
        fetched = price_of(candidate, layer, first_ER)
        worth = -change / fetched if fetched > 0 else -change * FREE
        if worth > best_worth:
            best, best_worth = c, worth
    return best


@inner()
def _settle(move, layer, state, doublings):  # type: ignore[no-untyped-def]
    """Shift fractions between replicas as long as that gains (``weighted``)."""
    for step in _SHIFTS:
        for e in range(len(state.count_E)):
            n = state.count_E[e]
            for i in range(n - 1 if n == 2 else n):
                if n < 2:
                    break
                for sign in (-1.0, 1.0):
                    a, b = state.holder_ER[e, i], state.holder_ER[e, (i + 1) % n]
                    k, j = state.place_ER[e, a], state.place_ER[e, b]
                    total = layer.share_RK[a, k] + layer.share_RK[b, j]
                    change = sign * step * total
                    change = min(max(change, -layer.share_RK[a, k]), layer.share_RK[b, j])
                    keep(move, 0, layer, state, e, -1)
                    move.share[0, i] += change
                    move.share[0, (i + 1) % n] -= change
                    move.expert[1] = -1
                    gain, touched = price(move, layer, state, doublings)
                    if gain < 0.0:
                        apply(move, touched, layer, state, a, k, -1, -1)


@njit(cache=True, nogil=True)
def repair_layer(layer, max_moves, doublings, num_hot):  # type: ignore[no-untyped-def]
    """Return the best placement and objective within each number of moves.

    Parameters
    ----------
    layer : Layer
        Of :mod:`eplb.placement.annealing`; slots and shares change in place. No expert twice on a
        rank; an empty slot stays empty.
    max_moves : int
    doublings : int
        P is 2 to this power.
    num_hot : int
        Moves touch one of so many most loaded ranks.

    Returns
    -------
    best_MRK : array of int64, shape [max_moves + 1, R, K]
    share_MRK : array of float64, shape [max_moves + 1, R, K]
    objective_M : array of float64
        Weighted mean over windows of the largest rank load, never increasing.
    """
    num_ranks, slots_per_rank = layer.slot_RK.shape
    state = new_state(layer)
    move = new_move(num_ranks)
    derive(layer, state)
    first_ER = held_experts(state.place_ER)
    found = new_candidates(layer, num_hot)
    best_MRK = np.zeros((max_moves + 1, num_ranks, slots_per_rank), np.int64)
    share_MRK = np.zeros((max_moves + 1, num_ranks, slots_per_rank))
    objective_M = np.full(max_moves + 1, inf)
    moved = 0
    for _ in range(4 * max_moves + 16):
        # Loads anew: rounding does not add up.
        sum_loads(layer, state)
        set_costs(layer, state, doublings)
        if layer.rule == WEIGHTED:
            _settle(move, layer, state, doublings)
            sum_loads(layer, state)
            set_costs(layer, state, doublings)
        value = objective(layer, state)
        if value < objective_M[moved]:
            objective_M[moved] = value
            best_MRK[moved] = layer.slot_RK
            share_MRK[moved] = layer.share_RK
        room = max_moves - moved
        count = find_candidates(found, layer, state, move, first_ER, num_hot, room, doublings)
        best = _best(found, count, move, layer, state, first_ER, doublings)
        if best < 0:
            break
        candidate = candidate_of(found, best)
        moved += price_of(candidate, layer, first_ER)
        propose(candidate, move, layer, state)
        _, touched = price(move, layer, state, doublings)
        a, i, b, j = candidate
        if b < 0:
            apply(move, touched, layer, state, a, i, -1, -1)
        else:
            apply(move, touched, layer, state, a, i, b, j)
    for m in range(1, max_moves + 1):
        if not objective_M[m] < objective_M[m - 1]:
            objective_M[m] = objective_M[m - 1]
            best_MRK[m] = best_MRK[m - 1]
            share_MRK[m] = share_MRK[m - 1]
    return best_MRK, share_MRK, objective_M
