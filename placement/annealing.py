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

from math import exp, inf
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from eplb.arrays import FloatArray

__all__ = ["RULES", "Layer", "anneal"]

EVEN, NEAREST, WEIGHTED = 0, 1, 2
# `batch` has an inner loop of its own, which uses no shares.
RULES = {"even": EVEN, "nearest": NEAREST, "weighted": WEIGHTED, "batch": EVEN}

# Loads are summed anew from the slots after this many sweeps, which rounding does not survive.
_RESUM_SWEEPS = 16
# Of the proposals, those that change replica counts and those that shift fractions.
_REPLACE, _SHIFT = 0.1, 0.3


class Layer(NamedTuple):
    """One layer's loads, its slots, and what the search knows of them.

    Made by :func:`eplb.placement.search.layer_state`; slots and shares change in place.

    Parameters
    ----------
    load_EW : array of float64
        Scaled so that the mean rank load of each window is 1.
    weight_W : array of float64
        Non-negative, adds up to 1.
    node_E : array of int64
        The node an expert has to stay in, or -1.
    slot_RK : array of int64
        The expert in each slot, no expert twice on a rank.
    share_RK : array of float64
        The fraction of its expert's tokens that a slot receives.
    rule : int
        ``EVEN``, ``NEAREST`` or ``WEIGHTED``.
    ranks_per_node : int
    random : array of uint64, shape [1]
        State of the random numbers.
    """

    load_EW: FloatArray
    weight_W: FloatArray
    node_E: NDArray[np.int64]
    slot_RK: NDArray[np.int64]
    share_RK: FloatArray
    rule: int
    ranks_per_node: int
    random: NDArray[np.uint64]


class _State(NamedTuple):
    """What is derived from slots and shares."""

    count_E: NDArray[np.int64]
    holder_ER: NDArray[np.int64]  # ranks that hold an expert, the first count_E of a row
    place_ER: NDArray[np.int64]  # the slot of an expert on a rank, or -1
    load_RW: FloatArray
    slope_W: FloatArray
    cost_R: FloatArray


class _Move(NamedTuple):
    """Two experts' replicas after a proposal, and the ranks that it touches."""

    expert: NDArray[np.int64]  # [2]; the second may be -1
    size: NDArray[np.int64]  # [2] replicas
    holder: NDArray[np.int64]  # [2, R]
    share: FloatArray  # [2, R]
    rank: NDArray[np.int64]  # [R] ranks touched
    change: FloatArray  # [2, R] by rank: change of each expert's share
    cost: FloatArray  # [R] by rank: the cost after it
    seen: NDArray[np.bool_]  # [R]


def _inner(**options: Any) -> Any:
    """Compile a function that compiled functions call: without what Python would call it by."""
    compiler: Any = njit
    return compiler(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)


@_inner()
def _random(state):  # type: ignore[no-untyped-def]
    """Xorshift (Marsaglia, J. Stat. Softw. 8, 2003): the next number in [0, 1)."""
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return np.float64(x >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@_inner()
def _below(state, n):  # type: ignore[no-untyped-def]
    """Return a random whole number below n."""
    return int(_random(state) * n)


# Loops in place of array expressions, which take numba seconds each to compile.
@_inner()
def _fill(target, value):  # type: ignore[no-untyped-def]
    for i in range(len(target)):
        target[i] = value


@_inner()
def _copy(target, source):  # type: ignore[no-untyped-def]
    for i in range(len(target)):
        target[i] = source[i]


@_inner()
def _copy_rows(target, source):  # type: ignore[no-untyped-def]
    for i in range(len(target)):
        _copy(target[i], source[i])


@_inner(fastmath=True)
def _add(target, factor, source):  # type: ignore[no-untyped-def]
    for i in range(len(target)):
        target[i] += factor * source[i]


@_inner(fastmath=True)
def _cost(load_W, slope_W, doublings):  # type: ignore[no-untyped-def]
    total = 0.0
    for w in range(load_W.shape[0]):
        v = load_W[w]
        for _ in range(doublings):
            v *= v
        total += slope_W[w] * v
    return total


@_inner(fastmath=True)
def _cost_one(load_W, a_W, a, slope_W, doublings):  # type: ignore[no-untyped-def]
    total = 0.0
    for w in range(load_W.shape[0]):
        v = load_W[w] + a * a_W[w]
        for _ in range(doublings):
            v *= v
        total += slope_W[w] * v
    return total


@_inner(fastmath=True)
def _cost_two(load_W, a_W, a, b_W, b, slope_W, doublings):  # type: ignore[no-untyped-def]
    total = 0.0
    for w in range(load_W.shape[0]):
        v = load_W[w] + a * a_W[w] + b * b_W[w]
        for _ in range(doublings):
            v *= v
        total += slope_W[w] * v
    return total


@_inner()
def _index_slots(slot_RK, count_E, holder_ER, place_ER):  # type: ignore[no-untyped-def]
    """Fill in how many replicas each expert has, on which ranks, and in which slots of them."""
    _fill(count_E, 0)
    for e in range(len(count_E)):
        _fill(place_ER[e], -1)
    for r in range(slot_RK.shape[0]):
        for k in range(slot_RK.shape[1]):
            e = slot_RK[r, k]
            if e >= 0:
                holder_ER[e, count_E[e]] = r
                count_E[e] += 1
                place_ER[e, r] = k


@_inner()
def _derive(layer, state):  # type: ignore[no-untyped-def]
    """Fill in counts, holders and places, and shares where the rule gives them."""
    num_ranks = len(layer.slot_RK)
    _index_slots(layer.slot_RK, state.count_E, state.holder_ER, state.place_ER)
    if layer.rule != WEIGHTED:
        share = np.empty(num_ranks)
        for e in range(len(state.count_E)):
            n = state.count_E[e]
            _rule_shares(layer, num_ranks, state.holder_ER[e], n, share)
            for i in range(n):
                r = state.holder_ER[e, i]
                layer.share_RK[r, state.place_ER[e, r]] = share[i]


@_inner()
def _rule_shares(layer, num_ranks, holder, count, share):  # type: ignore[no-untyped-def]
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


@_inner()
def _sum_loads(layer, state):  # type: ignore[no-untyped-def]
    for r in range(layer.slot_RK.shape[0]):
        _fill(state.load_RW[r], 0.0)
        for k in range(layer.slot_RK.shape[1]):
            e = layer.slot_RK[r, k]
            if e >= 0:
                _add(state.load_RW[r], layer.share_RK[r, k], layer.load_EW[e])


@_inner()
def _objective(layer, state):  # type: ignore[no-untyped-def]
    total = 0.0
    for w in range(len(layer.weight_W)):
        largest = 0.0
        for r in range(state.load_RW.shape[0]):
            largest = max(largest, state.load_RW[r, w])
        total += layer.weight_W[w] * largest
    return total


@_inner(fastmath=True)
def _set_slopes(layer, state, doublings):  # type: ignore[no-untyped-def]
    power = 2.0**doublings
    num_ranks, num_windows = state.load_RW.shape
    total_W = np.zeros(num_windows)
    for r in range(num_ranks):
        for w in range(num_windows):
            v = state.load_RW[r, w]
            for _ in range(doublings):
                v *= v
            total_W[w] += v
    for w in range(num_windows):
        state.slope_W[w] = layer.weight_W[w] / power * total_W[w] ** (1.0 / power - 1.0)
    for r in range(num_ranks):
        state.cost_R[r] = _cost(state.load_RW[r], state.slope_W, doublings)


@_inner()
def _keep(move, which, layer, state, expert, leaves):  # type: ignore[no-untyped-def]
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


@_inner()
def _join(move, which, rank, share):  # type: ignore[no-untyped-def]
    n = move.size[which]
    move.holder[which, n] = rank
    move.share[which, n] = share
    move.size[which] = n + 1


@_inner()
def _can_swap(place_ER, node_E, ranks_per_node, r, s, e, f):  # type: ignore[no-untyped-def]
    """Tell whether rank r may get expert f and rank s expert e; -1 is an empty slot."""
    if (e >= 0 and place_ER[e, s] >= 0) or (f >= 0 and place_ER[f, r] >= 0):
        return False
    if r // ranks_per_node == s // ranks_per_node:
        return True
    return (e < 0 or node_E[e] < 0) and (f < 0 or node_E[f] < 0)


@_inner()
def _propose_swap(move, layer, state, r, k, s, j):  # type: ignore[no-untyped-def]
    """Exchange slot k of rank r with slot j of rank s."""
    e, f = layer.slot_RK[r, k], layer.slot_RK[s, j]
    if e < 0:
        e, f, r, s, k, j = f, e, s, r, j, k
    _keep(move, 0, layer, state, e, r)
    _join(move, 0, s, layer.share_RK[r, k])
    move.expert[1] = f
    if f >= 0:
        _keep(move, 1, layer, state, f, s)
        _join(move, 1, r, layer.share_RK[s, j])
    if layer.rule == NEAREST:
        num_ranks = len(state.cost_R)
        _rule_shares(layer, num_ranks, move.holder[0], move.size[0], move.share[0])
        if f >= 0:
            _rule_shares(layer, num_ranks, move.holder[1], move.size[1], move.share[1])


@_inner()
def _propose_replace(move, layer, state, r, k, f):  # type: ignore[no-untyped-def]
    """Let slot k of rank r drop its replica for one of expert f."""
    e = layer.slot_RK[r, k]
    if e == f or state.place_ER[f, r] >= 0 or (e >= 0 and state.count_E[e] < 2):
        return False
    if layer.node_E[f] >= 0 and layer.node_E[f] != r // layer.ranks_per_node:
        return False
    num_ranks = len(state.cost_R)
    _keep(move, 0, layer, state, f, -1)
    if layer.rule == WEIGHTED:
        # The new replica takes over half of a random one's part.
        i = _below(layer.random, move.size[0])
        move.share[0, i] *= 0.5
        _join(move, 0, r, move.share[0, i])
    else:
        _join(move, 0, r, 0.0)
        _rule_shares(layer, num_ranks, move.holder[0], move.size[0], move.share[0])
    move.expert[1] = e
    if e >= 0:
        _keep(move, 1, layer, state, e, r)
        if layer.rule == WEIGHTED:
            move.share[1, _below(layer.random, move.size[1])] += layer.share_RK[r, k]
        else:
            _rule_shares(layer, num_ranks, move.holder[1], move.size[1], move.share[1])
    return True


@_inner()
def _propose_shift(move, layer, state, r, k):  # type: ignore[no-untyped-def]
    """Divide anew what slot k of rank r and another replica of its expert receive."""
    e = layer.slot_RK[r, k]
    if e < 0 or state.count_E[e] < 2:
        return False
    _keep(move, 0, layer, state, e, r)
    i = _below(layer.random, move.size[0])
    here, there = layer.share_RK[r, k], move.share[0, i]
    # As far as the other can give, or by a little.
    change = _random(layer.random) * (here + there) - here
    if _random(layer.random) < 0.7:
        change *= 0.05
    _join(move, 0, r, here + change)
    move.share[0, i] = there - change
    move.expert[1] = -1
    return True


@_inner()
def _price(move, layer, state, doublings):  # type: ignore[no-untyped-def]
    """Return the change of cost and the number of ranks touched."""
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
    total = 0.0
    a_W, b_W = layer.load_EW[move.expert[0]], layer.load_EW[max(move.expert[1], 0)]
    for i in range(touched):
        r = move.rank[i]
        move.seen[r] = False
        a, b = move.change[0, r], move.change[1, r]
        if a == 0.0 and b == 0.0:
            move.cost[r] = state.cost_R[r]
            continue
        if b == 0.0:
            cost = _cost_one(state.load_RW[r], a_W, a, state.slope_W, doublings)
        else:
            cost = _cost_two(state.load_RW[r], a_W, a, b_W, b, state.slope_W, doublings)
        move.cost[r] = cost
        total += cost - state.cost_R[r]
    return total, touched


@_inner()
def _apply(move, touched, layer, state, r, k, s, j):  # type: ignore[no-untyped-def]
    """Carry a proposal out; it leaves slot k of rank r, and slot j of rank s, to each other."""
    for i in range(touched):
        q = move.rank[i]
        a, b = move.change[0, q], move.change[1, q]
        if a != 0.0:
            _add(state.load_RW[q], a, layer.load_EW[move.expert[0]])
        if b != 0.0:
            _add(state.load_RW[q], b, layer.load_EW[move.expert[1]])
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


@_inner()
def _hot_rank(cost_R, random):  # type: ignore[no-untyped-def]
    """Return a random rank, half the time the costlier of two."""
    r = _below(random, len(cost_R))
    other = _below(random, len(cost_R))
    if cost_R[other] > cost_R[r] and _random(random) < 0.5:
        return other
    return r


@_inner()
def _accepts(random, change, temperature):  # type: ignore[no-untyped-def]
    """Decide by the rule of Metropolis et al. (J. Chem. Phys. 21, 1953)."""
    return change <= 0.0 or _random(random) < exp(-change / temperature)


@_inner()
def _try_replace(move, layer, state, r, f, temperature, doublings):  # type: ignore[no-untyped-def]
    """Propose that a slot that can be given up takes a replica of expert f."""
    num_ranks, slots_per_rank = layer.slot_RK.shape
    k = 0
    for _ in range(4):
        r, k = _below(layer.random, num_ranks), _below(layer.random, slots_per_rank)
        e = layer.slot_RK[r, k]
        if e < 0 or state.count_E[e] > 1:
            break
    if _propose_replace(move, layer, state, r, k, f):
        change, touched = _price(move, layer, state, doublings)
        if _accepts(layer.random, change, temperature):
            _apply(move, touched, layer, state, r, k, -1, -1)


@_inner()
def _try_shift(move, layer, state, r, k, temperature, doublings):  # type: ignore[no-untyped-def]
    if _propose_shift(move, layer, state, r, k):
        change, touched = _price(move, layer, state, doublings)
        if _accepts(layer.random, change, temperature):
            _apply(move, touched, layer, state, r, k, -1, -1)


@_inner()
def _try_swap(move, layer, state, r, k, s, j, temperature, doublings):  # type: ignore[no-untyped-def]
    _propose_swap(move, layer, state, r, k, s, j)
    change, touched = _price(move, layer, state, doublings)
    if _accepts(layer.random, change, temperature):
        _apply(move, touched, layer, state, r, k, s, j)


@_inner()
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
        r, k = _hot_rank(cost_R, random), _below(random, slots_per_rank)
        kind = _random(random)
        if kind < _REPLACE:
            # Of an expert at random, or one that a hot rank would like to share.
            f = slot_RK[r, k]
            if f < 0 or kind < 0.5 * _REPLACE:
                f = _below(random, len(load_EW))
            _try_replace(move, layer, state, r, f, temperature, doublings)
            continue
        if layer.rule == WEIGHTED and kind < _REPLACE + _SHIFT:
            _try_shift(move, layer, state, r, k, temperature, doublings)
            continue
        s, j = _below(random, num_ranks), _below(random, slots_per_rank)
        e, f = slot_RK[r, k], slot_RK[s, j]
        if r == s or e == f:
            continue
        if not _can_swap(place_ER, layer.node_E, layer.ranks_per_node, r, s, e, f):
            continue
        if e >= 0 and f >= 0 and (layer.rule != NEAREST or (count_E[e] == 1 and count_E[f] == 1)):
            # Shares travel along, so two ranks tell.
            a, b = share_RK[r, k], share_RK[s, j]
            change = (
                _cost_two(load_RW[r], load_EW[e], -a, load_EW[f], b, slope_W, doublings)
                + _cost_two(load_RW[s], load_EW[e], a, load_EW[f], -b, slope_W, doublings)
                - cost_R[r]
                - cost_R[s]
            )
            if _accepts(random, change, temperature):
                _try_swap(move, layer, state, r, k, s, j, inf, doublings)
        else:
            _try_swap(move, layer, state, r, k, s, j, temperature, doublings)


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
    num_ranks = len(layer.slot_RK)
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
    fall = (last_temperature / first_temperature) ** (1.0 / max(num_sweeps - 1, 1))
    temperature = first_temperature
    for sweep in range(num_sweeps + 1):
        if sweep % _RESUM_SWEEPS == 0 or sweep == num_sweeps:
            _sum_loads(layer, state)
        value = _objective(layer, state)
        if value < best_value:
            best_value = value
            _copy_rows(best_slot_RK, layer.slot_RK)
            _copy_rows(best_share_RK, layer.share_RK)
        if sweep < num_sweeps:
            _set_slopes(layer, state, doublings)
            _sweep(move, layer, state, temperature, doublings)
            temperature *= fall
    return best_value
