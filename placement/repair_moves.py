"""The moves that ``replan`` chooses from, with bounds on what they gain; compiled by numba.

A rank r that costs ``c = sum_w p_w`` with ``p_w = slope_w * load_rw ** P`` costs, once its loads
changed by d_w,

    sum_w p_w * (1 + d_w / load_rw) ** P  >=  c * (1 + sum_w p_w * d_w / load_rw / c) ** P

by Jensen's inequality, and the sum on the right is a number for each rank and expert (``pull_RE``).
So every candidate has a bound on what it gains in a handful of operations. What is done with them:
:mod:`eplb.placement.repair_kernel`, and :mod:`eplb.placement.repair_batch` for the rule ``batch``.

Shape letters: W windows, E logical experts, R ranks, K slots of a rank, N nodes, C candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray
from eplb.placement.anneal_kernel import NEAREST, WEIGHTED, can_swap, inner, to_power
from eplb.placement.anneal_moves import join, keep, propose_swap, rule_shares, touch

__all__ = [
    "FREE",
    "LEAST_GAIN",
    "candidate_of",
    "find_candidates",
    "held_experts",
    "new_candidates",
    "price_of",
    "propose",
]

# A candidate that gains less than this part of the cost is rounding.
LEAST_GAIN = 1e-9
# What a candidate that fetches nothing is worth beside one that does.
FREE = 1e6


class _Candidates(NamedTuple):
    """Moves that may gain, and bounds on what they gain for each expert fetched."""

    bound_C: FloatArray
    move_C4: NDArray[np.int64]  # rank, slot; rank and slot it is swapped with, or -1 and an expert


class _ReplicaGains(NamedTuple):
    """What ranks other than the one in question gain by a replica that goes or comes."""

    drop_RK: FloatArray  # the replica in a slot goes
    join_EN: FloatArray  # one comes to a node (to any, with one column)
    share_EN: FloatArray  # and the share that it then receives


@inner()
def new_candidates(layer, num_hot):  # type: ignore[no-untyped-def]
    """Return room for all moves that touch one of so many ranks."""
    num_ranks, slots_per_rank = layer.slot_RK.shape
    num_slots = num_ranks * slots_per_rank
    size = min(num_hot, num_ranks) * slots_per_rank * num_slots + num_slots * len(layer.load_EW)
    return _Candidates(np.zeros(size), np.zeros((size, 4), np.int64))


@inner()
def candidate_of(found, c):  # type: ignore[no-untyped-def]
    """Return a candidate as a tuple."""
    return found.move_C4[c, 0], found.move_C4[c, 1], found.move_C4[c, 2], found.move_C4[c, 3]


@inner()
def held_experts(place_ER):  # type: ignore[no-untyped-def]
    """Return 1 where a rank holds an expert, else 0."""
    held_ER = np.zeros(place_ER.shape, np.int64)
    for e in range(place_ER.shape[0]):
        for r in range(place_ER.shape[1]):
            held_ER[e, r] = place_ER[e, r] >= 0
    return held_ER


@inner()
def _hot_ranks(cost_R, num_hot):  # type: ignore[no-untyped-def]
    """Tell which ranks cost most."""
    hot_R = np.zeros(len(cost_R), np.bool_)
    for _ in range(min(num_hot, len(hot_R))):
        top = -1
        for r in range(len(hot_R)):
            if not hot_R[r] and (top < 0 or cost_R[r] > cost_R[top]):
                top = r
        hot_R[top] = True
    return hot_R


@inner(fastmath=True)
def _pulls(layer, state, doublings):  # type: ignore[no-untyped-def]
    """Return the part by which an expert changes a rank's cost, to first order and over P."""
    pull_RE = np.zeros((len(layer.slot_RK), len(layer.load_EW)))
    buffer_W = np.zeros(len(layer.weight_W))
    for r in range(len(pull_RE)):
        for w in range(len(buffer_W)):
            load = state.load_RW[r, w]
            power = to_power(load, doublings)
            buffer_W[w] = state.slope_W[w] * power / load if load > 0.0 else 0.0
        for e in range(pull_RE.shape[1]):
            load_W = layer.load_EW[e]
            total = 0.0
            for w in range(len(buffer_W)):
                total += buffer_W[w] * load_W[w]
            pull_RE[r, e] = total / state.cost_R[r] if state.cost_R[r] > 0.0 else 0.0
    return pull_RE


@inner()
def _least_cost(cost, pull, doublings):  # type: ignore[no-untyped-def]
    """Return a bound from below on a rank's cost after changes of a pull."""
    return cost * to_power(max(1.0 + pull, 0.0), doublings)


@inner()
def _most_gain(move, layer, state, pull_RE, doublings):  # type: ignore[no-untyped-def]
    """Return a bound from above on what a proposal gains."""
    e, f = move.expert[0], max(move.expert[1], 0)
    gain = 0.0
    for i in range(touch(move, layer, state)):
        r = move.rank[i]
        pull = move.change[0, r] * pull_RE[r, e] + move.change[1, r] * pull_RE[r, f]
        gain += state.cost_R[r] - _least_cost(state.cost_R[r], pull, doublings)
    return gain


@inner()
def _enter(move, which, layer, state, f, r):  # type: ignore[no-untyped-def]
    """Propose a replica of expert f on rank r."""
    keep(move, which, layer, state, f, -1)
    n = move.size[which]
    if layer.rule == WEIGHTED:
        for i in range(n):
            move.share[which, i] *= n / (n + 1.0)
    join(move, which, r, 1.0 / (n + 1.0))
    if layer.rule != WEIGHTED:
        rule_shares(layer, len(state.cost_R), move.holder[which], n + 1, move.share[which])


@inner()
def _leave(move, which, layer, state, e, r):  # type: ignore[no-untyped-def]
    """Propose that expert e has no replica on rank r."""
    keep(move, which, layer, state, e, r)
    n = move.size[which]
    if layer.rule != WEIGHTED:
        rule_shares(layer, len(state.cost_R), move.holder[which], n, move.share[which])
        return
    # The others take over what it had, in proportion to what they have.
    left = 0.0
    for i in range(n):
        left += move.share[which, i]
    for i in range(n):
        move.share[which, i] = move.share[which, i] / left if left > 0.0 else 1.0 / n


@inner()
def _propose_replica(move, layer, state, r, k, f):  # type: ignore[no-untyped-def]
    """Let slot k of rank r drop its replica for one of expert f, without chance."""
    _enter(move, 0, layer, state, f, r)
    e = layer.slot_RK[r, k]
    move.expert[0], move.expert[1] = f, e
    _leave(move, 1, layer, state, e, r)


@inner(fastmath=True)
def _find_swaps(  # type: ignore[no-untyped-def]  # noqa: PLR0912  (calls cost numba seconds each)
    found, layer, state, move, pull_RE, hot_R, first_ER, room, doublings
):
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
    count = 0
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
                    if not can_swap(state.place_ER, layer.node_E, layer.ranks_per_node, a, b, e, f):
                        continue
                    price = first_ER[e, a] - first_ER[e, b] + first_ER[f, b] - first_ER[f, a]
                    if price > room:
                        continue
                    if not travels:
                        propose_swap(move, layer, state, a, i, b, j)
                        gain = _most_gain(move, layer, state, pull_RE, doublings)
                        if gain <= least:
                            continue
                    found.bound_C[count] = gain / price if price > 0 else gain * FREE
                    found.move_C4[count, 0], found.move_C4[count, 1] = a, i
                    found.move_C4[count, 2], found.move_C4[count, 3] = b, j
                    count += 1
    return count


@inner()
def _replica_gains(layer, state, move, pull_RE, doublings):  # type: ignore[no-untyped-def]
    """Return what replicas that go and come make other ranks gain, by bounds from above."""
    slot_RK = layer.slot_RK
    num_ranks, slots_per_rank = slot_RK.shape
    num_experts = len(state.count_E)
    num_nodes = num_ranks // layer.ranks_per_node if layer.rule == NEAREST else 1
    gains = _ReplicaGains(
        np.zeros((num_ranks, slots_per_rank)),
        np.zeros((num_experts, num_nodes)),
        np.zeros((num_experts, num_nodes)),
    )
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
    for f in range(num_experts):
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
            own = state.cost_R[a] - _least_cost(state.cost_R[a], share * pull_RE[a, f], doublings)
            gains.join_EN[f, node] = _most_gain(move, layer, state, pull_RE, doublings) - own
            gains.share_EN[f, node] = share
    return gains


@inner()
def _find_replicas(  # type: ignore[no-untyped-def]  # noqa: PLR0912
    found, start, layer, state, move, pull_RE, hot_R, first_ER, room, doublings
):
    """List the replacements of replicas that may gain; return how many candidates there are."""
    slot_RK, cost_R = layer.slot_RK, state.cost_R
    num_ranks, slots_per_rank = slot_RK.shape
    gains = _replica_gains(layer, state, move, pull_RE, doublings)
    per_node = num_ranks // gains.join_EN.shape[1]
    count = start
    least = LEAST_GAIN * cost_R.sum()
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


@inner()
def find_candidates(found, layer, state, move, first_ER, num_hot, room, doublings):  # type: ignore[no-untyped-def]
    """List the moves that may gain and fetch at most ``room``; return how many there are."""
    pull_RE = _pulls(layer, state, doublings)
    hot_R = _hot_ranks(state.cost_R, num_hot)
    count = _find_swaps(found, layer, state, move, pull_RE, hot_R, first_ER, room, doublings)
    return _find_replicas(
        found, count, layer, state, move, pull_RE, hot_R, first_ER, room, doublings
    )


@inner()
def price_of(candidate, layer, first_ER):  # type: ignore[no-untyped-def]
    """Return how many more experts have to be fetched."""
    a, i, b, j = candidate
    e = layer.slot_RK[a, i]
    if b < 0:
        return first_ER[e, a] - first_ER[j, a]
    f = layer.slot_RK[b, j]
    return first_ER[e, a] - first_ER[e, b] + first_ER[f, b] - first_ER[f, a]


@inner()
def propose(candidate, move, layer, state):  # type: ignore[no-untyped-def]
    """Propose a candidate."""
    a, i, b, j = candidate
    if b < 0:
        _propose_replica(move, layer, state, a, i, j)
    else:
        propose_swap(move, layer, state, a, i, b, j)
