"""The inner loop of ``replan``: the best moves of one layer, one after the other, by numba.

From the current placement the swap of two slots, or the replacement of a replica by one of another
expert, is made that gains most for each expert that has to be moved. What is lowered is the sum of
:mod:`eplb.placement.annealing`, over ranks r and windows w,

    slope_w * load_rw ** P,    slope_w = weight_w / P * (sum_r load_rw ** P) ** (1 / P - 1)

which has no plateaus, as the largest load has. An expert is moved when a rank holds it that did not
hold it at first: taking it back is free, and gives the move back.

by Jensen's inequality, and the sum on the right is a number for each rank and expert (``pull_RE``).
So every candidate has a bound on what it gains in a handful of operations. Of the most promising
ones those are priced whose bound is above the best gain found.

Shape letters: W windows, E logical experts, R ranks, K slots of a rank, M moves, C candidates.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["repair_layer"]

# A candidate that gains less than this part of the cost is rounding.
LEAST_GAIN = 1e-9
# What a candidate that fetches nothing is worth beside one that does.
FREE = 1e6
# Candidates that are priced window by window before each move.
_PRICED = 256
# Parts of two replicas' fractions that are shifted between them, largest first.
_SHIFTS = (0.2, 0.05, 0.01)


class _Candidates(NamedTuple):
    """Moves that may gain, and bounds on what they gain for each expert fetched."""

    bound_C: FloatArray
    move_C4: NDArray[np.int64]  # rank, slot; rank and slot it is swapped with, or -1 and an expert


class _ReplicaGains(NamedTuple):
    """What ranks other than the one in question gain by a replica that goes or comes."""

    drop_RK: FloatArray  # the replica in a slot goes
    join_EN: FloatArray  # one comes to a node (to any, with one column)
    share_EN: FloatArray  # and the share that it then receives


@_inner(fastmath=True)
def _set_pulls(layer, state, pull_RE, buffer_W, doublings):  # type: ignore[no-untyped-def]
    """Fill in the part by which an expert changes a rank's cost, to first order and over P."""
    for r in range(len(pull_RE)):
        for w in range(len(buffer_W)):
            load = state.load_RW[r, w]
            power = _power(load, doublings)
            buffer_W[w] = state.slope_W[w] * power / load if load > 0.0 else 0.0
        for e in range(pull_RE.shape[1]):
            load_W = layer.load_EW[e]
            total = 0.0
            for w in range(len(buffer_W)):
                total += buffer_W[w] * load_W[w]
            pull_RE[r, e] = total / state.cost_R[r] if state.cost_R[r] > 0.0 else 0.0


@_inner()
def _least_cost(cost, pull, doublings):  # type: ignore[no-untyped-def]
    """Return a bound from below on a rank's cost after changes of a pull."""
    return cost * _power(max(1.0 + pull, 0.0), doublings)


@_inner()
def _most_gain(move, layer, state, pull_RE, doublings):  # type: ignore[no-untyped-def]
    """Return a bound from above on what a proposal gains."""
    e, f = move.expert[0], max(move.expert[1], 0)
    gain = 0.0
    for i in range(_touch(move, layer, state)):
        r = move.rank[i]
        pull = move.change[0, r] * pull_RE[r, e] + move.change[1, r] * pull_RE[r, f]
        gain += state.cost_R[r] - _least_cost(state.cost_R[r], pull, doublings)
    return gain


@_inner()
def _enter(move, which, layer, state, f, r):  # type: ignore[no-untyped-def]
    """Propose a replica of expert f on rank r."""
    _keep(move, which, layer, state, f, -1)
    n = move.size[which]
    if layer.rule == WEIGHTED:
        for i in range(n):
            move.share[which, i] *= n / (n + 1.0)
    _join(move, which, r, 1.0 / (n + 1.0))
    if layer.rule != WEIGHTED:
        _rule_shares(layer, len(state.cost_R), move.holder[which], n + 1, move.share[which])


@_inner()
def _leave(move, which, layer, state, e, r):  # type: ignore[no-untyped-def]
    """Propose that expert e has no replica on rank r."""
    _keep(move, which, layer, state, e, r)
    n = move.size[which]
    if layer.rule != WEIGHTED:
        _rule_shares(layer, len(state.cost_R), move.holder[which], n, move.share[which])
        return
    # The others take over what it had, in proportion to what they have.
    left = 0.0
    for i in range(n):
        left += move.share[which, i]
    for i in range(n):
        move.share[which, i] = move.share[which, i] / left if left > 0.0 else 1.0 / n


@_inner()
def _propose_replica(move, layer, state, r, k, f):  # type: ignore[no-untyped-def]
    """Let slot k of rank r drop its replica for one of expert f, without chance."""
    _enter(move, 0, layer, state, f, r)
    e = layer.slot_RK[r, k]
    move.expert[0], move.expert[1] = f, e
    _leave(move, 1, layer, state, e, r)


@_inner(fastmath=True)
def _find_swaps(found, start, layer, state, move, pull_RE, hot_R, first_ER, room, doublings):  # type: ignore[no-untyped-def]  # noqa: PLR0913, E501
    """List the swaps of a slot of a hot rank that may gain; return how many candidates there are.

    Almost all swaps lose, so gains come before everything else, from arrays in the order of slots.
    """
    slot_RK, share_RK, cost_R = layer.slot_RK, layer.share_RK, state.cost_R
    num_ranks, slots_per_rank = slot_RK.shape
    own_RK = np.zeros((num_ranks, slots_per_rank))  # a slot's part of its rank's cost
    there_RK = np.zeros((num_ranks, slots_per_rank))  # and what it would be of rank a's
    for b in range(num_ranks):
        for j in range(slots_per_rank):
            if slot_RK[b, j] >= 0:
                own_RK[b, j] = share_RK[b, j] * pull_RE[b, slot_RK[b, j]]
    count = start
    least = LEAST_GAIN * cost_R.sum()
    for a in range(num_ranks):
        if not hot_R[a]:
            continue
        for b in range(num_ranks):
            for j in range(slots_per_rank):
                there_RK[b, j] = share_RK[b, j] * pull_RE[a, max(slot_RK[b, j], 0)]
        for i in range(slots_per_rank):
            e = slot_RK[a, i]
            if e < 0:
                continue
            for b in range(num_ranks):
                if b == a or (hot_R[b] and b < a) or state.place_ER[e, b] >= 0:
                    continue
                pull_e = share_RK[a, i] * pull_RE[b, e]
                for j in range(slots_per_rank):
                    f = slot_RK[b, j]
                    if f < 0 or (there_RK[b, j] >= own_RK[a, i] and not hot_R[b]):
                        continue
                    travels = layer.rule != NEAREST
                    travels |= state.count_E[e] == 1 and state.count_E[f] == 1
                    if travels:
                        gain = (
                            cost_R[a]
                            + cost_R[b]
                            - _least_cost(cost_R[a], there_RK[b, j] - own_RK[a, i], doublings)
                            - _least_cost(cost_R[b], pull_e - own_RK[b, j], doublings)
                        )
                        if gain <= least:
                            continue
                    if not _can_swap(
                        state.place_ER, layer.node_E, layer.ranks_per_node, a, b, e, f
                    ):
                        continue
                    price = first_ER[e, a] - first_ER[e, b] + first_ER[f, b] - first_ER[f, a]
                    if price > room:
                        continue
                    if not travels:
                        _propose_swap(move, layer, state, a, i, b, j)
                        gain = _most_gain(move, layer, state, pull_RE, doublings)
                        if gain <= least:
                            continue
                    found.bound_C[count] = gain / price if price > 0 else gain * FREE
                    found.move_C4[count, 0], found.move_C4[count, 1] = a, i
                    found.move_C4[count, 2], found.move_C4[count, 3] = b, j
                    count += 1
    return count


@_inner()
def _set_replica_gains(gains, layer, state, move, pull_RE, doublings):  # type: ignore[no-untyped-def]
    """Fill in what replicas that go and come make other ranks gain, by bounds from above."""
    slot_RK = layer.slot_RK
    num_ranks, slots_per_rank = slot_RK.shape
    for a in range(num_ranks):
        for i in range(slots_per_rank):
            e = slot_RK[a, i]
            if e >= 0 and state.count_E[e] > 1:
                _leave(move, 0, layer, state, e, a)
                move.expert[1] = -1
                own = state.cost_R[a] - _least_cost(
                    state.cost_R[a], -layer.share_RK[a, i] * pull_RE[a, e], doublings
                )
                gains.drop_RK[a, i] = _most_gain(move, layer, state, pull_RE, doublings) - own
    num_nodes = gains.join_EN.shape[1]
    for f in range(len(state.count_E)):
        if state.count_E[f] == 0:
            continue
        for node in range(num_nodes):
            # Any rank of the node that does not have it stands for all of them.
            a = node * (num_ranks // num_nodes)
            last = a + num_ranks // num_nodes - 1
            while a < last and state.place_ER[f, a] >= 0:
                a += 1
            if state.place_ER[f, a] >= 0:
                continue
            _enter(move, 0, layer, state, f, a)
            move.expert[1] = -1
            share = move.share[0, move.size[0] - 1]
            own = state.cost_R[a] - _least_cost(
                state.cost_R[a], share * pull_RE[a, f], doublings
            )
            gains.join_EN[f, node] = _most_gain(move, layer, state, pull_RE, doublings) - own
            gains.share_EN[f, node] = share


@_inner()
def _find_replicas(found, start, gains, layer, state, move, pull_RE, hot_R, first_ER, room, doublings):  # type: ignore[no-untyped-def]  # noqa: PLR0913, E501
    """List the replacements of replicas that may gain; return how many candidates there are."""
    slot_RK, cost_R = layer.slot_RK, state.cost_R
    num_ranks, slots_per_rank = slot_RK.shape
    per_node = num_ranks // gains.join_EN.shape[1]
    count = start
    least = LEAST_GAIN * cost_R.sum()
    _set_replica_gains(gains, layer, state, move, pull_RE, doublings)
    num_spare = 0
    spare_X2 = np.zeros((num_ranks * slots_per_rank, 2), np.int64)
    for a in range(num_ranks):
        for i in range(slots_per_rank):
            e = slot_RK[a, i]
            if e >= 0 and state.count_E[e] > 1:
                spare_X2[num_spare, 0], spare_X2[num_spare, 1] = a, i
                num_spare += 1
    for f in range(len(state.count_E)):
        if state.count_E[f] == 0:
            continue
        relieves = False
        for i in range(state.count_E[f]):
            relieves |= hot_R[state.holder_ER[f, i]]
        for x in range(num_spare):
            a, i = spare_X2[x, 0], spare_X2[x, 1]
            if not (relieves or hot_R[a]) or state.place_ER[f, a] >= 0:
                continue
            if layer.node_E[f] >= 0 and layer.node_E[f] != a // layer.ranks_per_node:
                continue
            e = slot_RK[a, i]
            price = first_ER[e, a] - first_ER[f, a]
            if price > room:
                continue
            pull = gains.share_EN[f, a // per_node] * pull_RE[a, f]
            pull -= layer.share_RK[a, i] * pull_RE[a, e]
            gain = cost_R[a] - _least_cost(cost_R[a], pull, doublings)
            gain += gains.drop_RK[a, i] + gains.join_EN[f, a // per_node]
            if gain <= least:
                # Ranks that have both experts may gain more than the sum says.
                together = False
                for y in range(state.count_E[e]):
                    together |= state.place_ER[f, state.holder_ER[e, y]] >= 0
                if not together:
                    continue
                _propose_replica(move, layer, state, a, i, f)
                gain = _most_gain(move, layer, state, pull_RE, doublings)
            if gain > least:
                found.bound_C[count] = gain / price if price > 0 else gain * FREE
                found.move_C4[count, 0], found.move_C4[count, 1] = a, i
                found.move_C4[count, 2], found.move_C4[count, 3] = -1, f
                count += 1
    return count


@_inner()
def _price_of(candidate, layer, first_ER):  # type: ignore[no-untyped-def]
    """Return how many more experts have to be fetched."""
    a, i, b, j = candidate
    e = layer.slot_RK[a, i]
    if b < 0:
        return first_ER[e, a] - first_ER[j, a]
    f = layer.slot_RK[b, j]
    return first_ER[e, a] - first_ER[e, b] + first_ER[f, b] - first_ER[f, a]


@_inner()
def _propose(candidate, move, layer, state):  # type: ignore[no-untyped-def]
    a, i, b, j = candidate
    if b < 0:
        _propose_replica(move, layer, state, a, i, j)
    else:
        _propose_swap(move, layer, state, a, i, b, j)


@_inner()
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
        candidate = (
            found.move_C4[c, 0], found.move_C4[c, 1], found.move_C4[c, 2], found.move_C4[c, 3]
        )  # fmt: skip
        _propose(candidate, move, layer, state)
        change, _ = _price(move, layer, state, doublings)
        if -change <= least:
            continue
        price = _price_of(candidate, layer, first_ER)
        worth = -change / price if price > 0 else -change * FREE
        if worth > best_worth:
            best, best_worth = c, worth
    return best


@_inner()
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
                    _keep(move, 0, layer, state, e, -1)
                    move.share[0, i] += change
                    move.share[0, (i + 1) % n] -= change
                    move.expert[1] = -1
                    gain, touched = _price(move, layer, state, doublings)
                    if gain < 0.0:
                        _apply(move, touched, layer, state, a, k, -1, -1)


@_inner()
def _mark_hot(hot_R, cost_R, num_hot):  # type: ignore[no-untyped-def]
    hot_R[:] = False
    for _ in range(min(num_hot, len(hot_R))):
        top = -1
        for r in range(len(hot_R)):
            if not hot_R[r] and (top < 0 or cost_R[r] > cost_R[top]):
                top = r
        hot_R[top] = True


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
    num_ranks, slots_per_rank = layer.slot_RK.shape
    num_experts, num_windows = layer.load_EW.shape
    state = _State(
        np.zeros(num_experts, np.int64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros((num_ranks, num_windows)),
        np.zeros(num_windows),
        np.zeros(num_ranks),
    )
    move = _Move(
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
    num_slots = num_ranks * slots_per_rank
    size = min(num_hot, num_ranks) * slots_per_rank * num_slots + num_slots * num_experts
    found = _Candidates(np.zeros(size), np.zeros((size, 4), np.int64))
    num_nodes = num_ranks // layer.ranks_per_node if layer.rule == NEAREST else 1
    gains = _ReplicaGains(
        np.zeros((num_ranks, slots_per_rank)),
        np.zeros((num_experts, num_nodes)),
        np.zeros((num_experts, num_nodes)),
    )
    pull_RE = np.zeros((num_ranks, num_experts))
    buffer_W = np.zeros(num_windows)
    hot_R = np.zeros(num_ranks, np.bool_)
    best_MRK = np.zeros((max_moves + 1, num_ranks, slots_per_rank), np.int64)
    share_MRK = np.zeros((max_moves + 1, num_ranks, slots_per_rank))
    objective_M = np.full(max_moves + 1, inf)
    moved = 0
    for _ in range(4 * max_moves + 16):
        # Loads anew: rounding does not add up.
        _sum_loads(layer, state)
        _set_slopes(layer, state, doublings)
        if layer.rule == WEIGHTED:
            _settle(move, layer, state, doublings)
            _sum_loads(layer, state)
            _set_slopes(layer, state, doublings)
        value = _objective(layer, state)
        if value < objective_M[moved]:
            objective_M[moved] = value
            best_MRK[moved] = layer.slot_RK
            share_MRK[moved] = layer.share_RK
        _set_pulls(layer, state, pull_RE, buffer_W, doublings)
        _mark_hot(hot_R, state.cost_R, num_hot)
        room = max_moves - moved
        count = _find_swaps(
            found, 0, layer, state, move, pull_RE, hot_R, first_ER, room, doublings
        )
        count = _find_replicas(
            found, count, gains, layer, state, move, pull_RE, hot_R, first_ER, room, doublings
        )
        best = _best(found, count, move, layer, state, first_ER, doublings)
        if best < 0:
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
