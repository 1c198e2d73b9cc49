"""The moves of the annealing of one layer: what they change, what that costs, and doing it.

A move changes the replicas of one or two experts: a swap of two slots, a slot that drops its
replica for one of another expert, or with fixed fractions (``weighted``) a part that shifts between
two replicas. :func:`offer` prices what was proposed, and carries it out if it is accepted. The loop
around them is :mod:`eplb.placement.annealing`.

Shape letters: W windows, E logical experts, R ranks, K slots of a rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray
from eplb.placement.anneal_kernel import (
    EVEN,
    NEAREST,
    WEIGHTED,
    accepts,
    add_scaled,
    inner,
    random_below,
    random_unit,
    to_power,
)

__all__ = [
    "Move",
    "State",
    "apply",
    "join",
    "keep",
    "new_move",
    "new_state",
    "offer",
    "price",
    "propose_replace",
    "propose_shift",
    "propose_swap",
    "rank_cost_with_both",
    "rule_shares",
    "touch",
]


class State(NamedTuple):
    """What is derived from slots and shares."""

    count_E: NDArray[np.int64]
    holder_ER: NDArray[np.int64]  # ranks that hold an expert, the first count_E of a row
    place_ER: NDArray[np.int64]  # the slot of an expert on a rank, or -1
    load_RW: FloatArray
    slope_W: FloatArray
    cost_R: FloatArray


class Move(NamedTuple):
    """Two experts' replicas after a proposal, and the ranks that it touches."""

    expert: NDArray[np.int64]  # [2]; the second may be -1
    size: NDArray[np.int64]  # [2] replicas
    holder: NDArray[np.int64]  # [2, R]
    share: FloatArray  # [2, R]
    rank: NDArray[np.int64]  # [R] ranks touched
    change: FloatArray  # [2, R] by rank: change of each expert's share
    cost: FloatArray  # [R] by rank: the cost after it
    seen: NDArray[np.bool_]  # [R]


@inner()
def new_state(layer):  # type: ignore[no-untyped-def]
    """Return a state of zeros, of a layer's size."""
    num_ranks = len(layer.slot_RK)
    num_experts, num_windows = layer.load_EW.shape
    return State(
        np.zeros(num_experts, np.int64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros((num_experts, num_ranks), np.int64),
        np.zeros((num_ranks, num_windows)),
        np.zeros(num_windows),
        np.zeros(num_ranks),
    )


@inner()
def new_move(num_ranks):  # type: ignore[no-untyped-def]
    """Return a move of nothing."""
    return Move(
        np.zeros(2, np.int64),
        np.zeros(2, np.int64),
        np.zeros((2, num_ranks + 1), np.int64),
        np.zeros((2, num_ranks + 1)),
        np.zeros(num_ranks, np.int64),
        np.zeros((2, num_ranks)),
        np.zeros(num_ranks),
        np.zeros(num_ranks, np.bool_),
    )


@inner(fastmath=True)
def rank_cost_with(load_W, a_W, a, slope_W, doublings):  # type: ignore[no-untyped-def]
    """Return what a rank costs with ``a`` more of an expert's loads."""
    total = 0.0
    for w in range(load_W.shape[0]):
        total += slope_W[w] * to_power(load_W[w] + a * a_W[w], doublings)
    return total


@inner(fastmath=True)
def rank_cost_with_both(load_W, a_W, a, b_W, b, slope_W, doublings):  # type: ignore[no-untyped-def]
    """Return what a rank costs with more of two experts' loads."""
    total = 0.0
    for w in range(load_W.shape[0]):
        total += slope_W[w] * to_power(load_W[w] + a * a_W[w] + b * b_W[w], doublings)
    return total


@inner()
def rule_shares(layer, num_ranks, holder, count, share):  # type: ignore[no-untyped-def]
    """Shares of an expert on ``count`` distinct ranks, as eplb.split gives them."""
    if layer.rule == EVEN or count == 1:
        for i in range(count):
            share[i] = 1.0 / count
        return
    per_node = layer.ranks_per_node
    num_nodes = 0
    for i in range(count):
        first = True
        for j in range(i):
            if holder[j] // per_node == holder[i] // per_node:
                first = False
        num_nodes += first
    distant = (num_ranks - per_node * num_nodes) / count
    for i in range(count):
        neighbours = 0
        for j in range(count):
            neighbours += holder[j] // per_node == holder[i] // per_node
        share[i] = (per_node / neighbours + distant) / num_ranks


@inner()
def keep(move, which, layer, state, expert, leaves):  # type: ignore[no-untyped-def]
    """Start a proposal with an expert's present replicas, all but the one on rank ``leaves``."""
    move.expert[which] = expert
    n = 0
    for i in range(state.count_E[expert]):
        r = state.holder_ER[expert, i]
        if r != leaves:
            move.holder[which, n] = r
            move.share[which, n] = layer.share_RK[r, state.place_ER[expert, r]]
            n += 1
    move.size[which] = n


@inner()
def join(move, which, rank, share):  # type: ignore[no-untyped-def]
    """Add a replica to a proposal."""
    n = move.size[which]
    move.holder[which, n] = rank
    move.share[which, n] = share
    move.size[which] = n + 1


@inner()
def propose_swap(move, layer, state, r, k, s, j):  # type: ignore[no-untyped-def]
    """Exchange slot k of rank r with slot j of rank s."""
    e, f = layer.slot_RK[r, k], layer.slot_RK[s, j]
    if e < 0:
        e, f, r, s, k, j = f, e, s, r, j, k
    keep(move, 0, layer, state, e, r)
    join(move, 0, s, layer.share_RK[r, k])
    move.expert[1] = f
    if f >= 0:
        keep(move, 1, layer, state, f, s)
        join(move, 1, r, layer.share_RK[s, j])
    if layer.rule == NEAREST:
        num_ranks = len(state.cost_R)
        rule_shares(layer, num_ranks, move.holder[0], move.size[0], move.share[0])
        if f >= 0:
            rule_shares(layer, num_ranks, move.holder[1], move.size[1], move.share[1])


@inner()
def propose_replace(move, layer, state, r, k, f):  # type: ignore[no-untyped-def]
    """Let slot k of rank r drop its replica for one of expert f."""
    e = layer.slot_RK[r, k]
    if e == f or state.place_ER[f, r] >= 0 or (e >= 0 and state.count_E[e] < 2):
        return False
    if layer.node_E[f] >= 0 and layer.node_E[f] != r // layer.ranks_per_node:
        return False
    num_ranks = len(state.cost_R)
    keep(move, 0, layer, state, f, -1)
    if layer.rule == WEIGHTED:
        # The new replica takes over half of a random one's part.
        i = random_below(layer.random, move.size[0])
        move.share[0, i] *= 0.5
        join(move, 0, r, move.share[0, i])
    else:
        join(move, 0, r, 0.0)
        rule_shares(layer, num_ranks, move.holder[0], move.size[0], move.share[0])
    move.expert[1] = e
    if e >= 0:
        keep(move, 1, layer, state, e, r)
        if layer.rule == WEIGHTED:
            move.share[1, random_below(layer.random, move.size[1])] += layer.share_RK[r, k]
        else:
            rule_shares(layer, num_ranks, move.holder[1], move.size[1], move.share[1])
    return True


@inner()
def propose_shift(move, layer, state, r, k):  # type: ignore[no-untyped-def]
    """Divide anew what slot k of rank r and another replica of its expert receive."""
    e = layer.slot_RK[r, k]
    if e < 0 or state.count_E[e] < 2:
        return False
    keep(move, 0, layer, state, e, r)
    i = random_below(layer.random, move.size[0])
    here, there = layer.share_RK[r, k], move.share[0, i]
    # As far as the other can give, or by a little.
    change = random_unit(layer.random) * (here + there) - here
    if random_unit(layer.random) < 0.7:
        change *= 0.05
    join(move, 0, r, here + change)
    move.share[0, i] = there - change
    move.expert[1] = -1
    return True


@inner()
def touch(move, layer, state):  # type: ignore[no-untyped-def]
    """Fill in the ranks that a proposal touches and the changes of shares; return their number."""
    touched = 0
    for which in range(2):
        e = move.expert[which]
        if e < 0:
            continue
        for i in range(state.count_E[e] + move.size[which]):
            if i < state.count_E[e]:
                r = state.holder_ER[e, i]
                change = -layer.share_RK[r, state.place_ER[e, r]]
            else:
                r = move.holder[which, i - state.count_E[e]]
                change = move.share[which, i - state.count_E[e]]
            if not move.seen[r]:
                move.seen[r] = True
                move.rank[touched] = r
                move.change[0, r] = 0.0
                move.change[1, r] = 0.0
                touched += 1
            move.change[which, r] += change
    for i in range(touched):
        move.seen[move.rank[i]] = False
    return touched


@inner()
def price(move, layer, state, doublings):  # type: ignore[no-untyped-def]
    """Return the change of cost and the number of ranks touched."""
    touched = touch(move, layer, state)
    total = 0.0
    a_W, b_W = layer.load_EW[move.expert[0]], layer.load_EW[max(move.expert[1], 0)]
    for i in range(touched):
        r = move.rank[i]
        a, b = move.change[0, r], move.change[1, r]
        if a == 0.0 and b == 0.0:
            move.cost[r] = state.cost_R[r]
            continue
        if b == 0.0:
            cost = rank_cost_with(state.load_RW[r], a_W, a, state.slope_W, doublings)
        else:
            cost = rank_cost_with_both(state.load_RW[r], a_W, a, b_W, b, state.slope_W, doublings)
        move.cost[r] = cost
        total += cost - state.cost_R[r]
    return total, touched


@inner()
def apply(move, touched, layer, state, r, k, s, j):  # type: ignore[no-untyped-def]
    """Carry a proposal out; it leaves slot k of rank r, and slot j of rank s, to each other."""
    for i in range(touched):
        q = move.rank[i]
        a, b = move.change[0, q], move.change[1, q]
        if a != 0.0:
            add_scaled(state.load_RW[q], a, layer.load_EW[move.expert[0]])
        if b != 0.0:
            add_scaled(state.load_RW[q], b, layer.load_EW[move.expert[1]])
        state.cost_R[q] = move.cost[q]
    e = layer.slot_RK[r, k]
    if s >= 0:
        f = layer.slot_RK[s, j]
        layer.slot_RK[r, k], layer.slot_RK[s, j] = f, e
        layer.share_RK[r, k], layer.share_RK[s, j] = 0.0, 0.0
        if e >= 0:
            state.place_ER[e, r], state.place_ER[e, s] = -1, j
        if f >= 0:
            state.place_ER[f, s], state.place_ER[f, r] = -1, k
    elif move.expert[0] != e:
        f = move.expert[0]
        layer.slot_RK[r, k] = f
        state.place_ER[f, r] = k
        if e >= 0:
            state.place_ER[e, r] = -1
    for which in range(2):
        e = move.expert[which]
        if e < 0:
            continue
        state.count_E[e] = move.size[which]
        for i in range(move.size[which]):
            q = move.holder[which, i]
            state.holder_ER[e, i] = q
            layer.share_RK[q, state.place_ER[e, q]] = move.share[which, i]


@inner()
def offer(move, layer, state, r, k, s, j, temperature, doublings):  # type: ignore[no-untyped-def]
    """Price a proposal, and carry it out if the rise of cost is accepted."""
    change, touched = price(move, layer, state, doublings)
    if accepts(layer.random, change, temperature):
        apply(move, touched, layer, state, r, k, s, j)
