"""The compiled half of :mod:`eplb.placement.rank_search`: ranks filled one after the other.

Importing this module costs numba. Shape letters: W windows, E logical experts, S slots, R ranks,
N nodes, C classes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from eplb.arrays import FloatArray, IntArray

__all__ = ["fill_ranks"]

# Columns of a class: its replicas on the node, nodes with replicas, replicas.
_HERE, _NODES, _ALL = 0, 1, 2
# Against rounding, in favour of "can be reached".
_SLACK = 1e-9
# Slots owed after a choice that is not allowed.
_NEVER = 1 << 30


@njit(cache=True, nogil=True)
def fill_ranks(  # noqa: PLR0912, PLR0915 (one loop, with no call to spare in it)
    load_ECW: FloatArray,
    class_C3: IntArray,
    allowed_EC: IntArray,
    weight_W: FloatArray,
    total_W: FloatArray,
    num_nodes: int,
    num_ranks: int,
    num_slots: int,
    target: float,
    margin: float,
    steps: int,
) -> tuple[IntArray, float, int]:
    """Return the best placement whose objective is at most ``target``, by branch and bound.

    Slots are filled in order, each with an expert of a class, and a branch ends where the ranks
    so far and the mean of those to come already cost more than the target. Its weighted mean load
    leaves a rank a range: no rank may be above the target, and what it is below is missing for the
    others. Classes of an expert are tried by falling load within that. Ranks list experts in
    rising order, the ranks of a node are in lexicographic order, and so are nodes by their
    first ranks: of placements that differ in names only one is left.

    Parameters
    ----------
    load_ECW : array of float64
        Load of one replica of each expert in each class.
    class_C3 : array of int64
        Replicas on the node, nodes with replicas, replicas.
    allowed_EC : array of int64
        1 where an expert may be in a class; each may in one at least.
    weight_W, total_W : arrays of float64
        Weights of the windows, and their loads.
    num_nodes, num_ranks, num_slots : int
    target : float
    margin : float
        After a placement is found, only better ones by this fraction are looked for.
    steps : int
        Choices to try.

    Returns
    -------
    best_S : array of int64
        The experts in the slots, E where one is empty. Only meaningful if ``value`` is finite.
    value : float
        Its objective, infinite if none was found.
    left : int
        Steps that were left: with 0 the search has not ended, and may have missed a better one.
    """
    num_experts, num_classes, num_windows = load_ECW.shape
    per_rank, per_node = num_slots // num_ranks, num_ranks // num_nodes
    # Classes that are allowed, by falling mean load; and the largest of an expert and those after.
    mean_EC = np.full((num_experts, num_classes + 1), -np.inf)
    class_EC = np.zeros((num_experts, num_classes), np.int64)
    most_E = np.zeros(num_experts + 2)
    for e in range(num_experts - 1, -1, -1):
        value_C = np.full(num_classes, -np.inf)
        for c in range(num_classes):
            if allowed_EC[e, c]:
                value_C[c] = 0.0
                for w in range(num_windows):
                    value_C[c] += weight_W[w] * load_ECW[e, c, w]
        class_EC[e] = np.argsort(-value_C, kind="mergesort")
        for i in range(num_classes):
            mean_EC[e, i] = value_C[class_EC[e, i]]
        most_E[e] = max(most_E[e + 1], mean_EC[e, 0])
    least_E = np.full(num_experts, num_slots)
    for e in range(num_experts):
        for c in range(num_classes):
            if allowed_EC[e, c]:
                least_E[e] = min(least_E[e], class_C3[c, _ALL])
    # Of the experts: a class with its spread, replicas placed, nodes with some; the same by node.
    like_E = np.zeros(num_experts, np.int64)
    placed_E = np.zeros(num_experts, np.int64)
    nodes_E = np.zeros(num_experts, np.int64)
    here_NE = np.zeros((num_nodes, num_experts), np.int64)
    placed_NE = np.zeros((num_nodes, num_experts), np.int64)
    # Of the slots: what is chosen, the last expert to choose, replicas that slots are owed.
    expert_S = np.full(num_slots + 1, -1)
    class_S = np.zeros(num_slots + 1, np.int64)
    upper_S = np.zeros(num_slots + 1, np.int64)
    owed_S = np.zeros(num_slots + 1, np.int64)
    owed_S[0] = least_E.sum()
    # The load of a rank up to a slot; of the ranks before it the largest, and what they left. The
    # same of weighted means.
    mean_S, mean_rest_R = np.zeros(num_slots + 1), np.zeros(num_ranks + 1)
    for w in range(num_windows):
        mean_rest_R[0] += weight_W[w] * total_W[w]
    load_SW = np.zeros((num_slots + 1, num_windows))
    most_RW = np.zeros((num_ranks + 1, num_windows))
    rest_RW = np.zeros((num_ranks + 1, num_windows))
    rest_RW[0] = total_W
    best_S = np.zeros(num_slots, np.int64)
    best = np.inf
    d = 0
    while d >= 0 and steps > 0:
        rank, node = d // per_rank, d // (per_rank * per_node)
        ranks_left = per_node - rank % per_node
        last_slot = d % per_rank == per_rank - 1
        most_W, rest_W = most_RW[rank], rest_RW[rank]
        if d % per_rank == 0:
            load_SW[d] = 0.0
            mean_S[d] = 0.0
        # What the mean load of this replica may be, and of this and the ones after it at least.
        room = target * (1.0 + _SLACK) - mean_S[d]
        missing = mean_rest_R[rank] - target * (num_ranks - rank - 1 + _SLACK) - mean_S[d]
        slots_after = per_rank - 1 - d % per_rank
        # From here on c is a place in the order of classes.
        e, c = expert_S[d], class_S[d] + 1
        if e < 0:
            e, upper_S[d] = _range(
                d, per_rank, per_node, num_nodes, expert_S, like_E, class_C3,
                placed_E, here_NE[node], placed_NE[node],
            )  # fmt: skip
            c = 0
        chosen = False
        while e <= upper_S[d]:
            steps -= 1
            if e == num_experts:
                # An empty slot.
                if c > 0 or missing > 0.0:
                    break
                if owed_S[d] <= num_slots - d - 1:
                    owed_S[d + 1] = owed_S[d]
                    load_SW[d + 1] = load_SW[d]
                    chosen = True
            else:
                while mean_EC[e, c] > room:
                    c += 1
                if mean_EC[e, c] < missing - slots_after * most_E[e + 1] or mean_EC[e, c] < 0.0:
                    e, c = e + 1, 0
                    continue
                owed = _owed_after(
                    e, class_EC[e, c], class_C3, num_nodes - node, per_node, ranks_left, least_E,
                    like_E, placed_E, nodes_E, here_NE[node], placed_NE[node],
                )  # fmt: skip
                if owed_S[d] + owed <= num_slots - d - 1:
                    owed_S[d + 1] = owed + owed_S[d]
                    for w in range(num_windows):
                        load_SW[d + 1, w] = load_SW[d, w] + load_ECW[e, class_EC[e, c], w]
                    chosen = True
            if chosen:
                value = 0.0
                for w in range(num_windows):
                    load = load_SW[d + 1, w]
                    largest = max(most_W[w], load, rest_W[w] / (num_ranks - rank))
                    if last_slot and rank + 1 < num_ranks:
                        largest = max(largest, (rest_W[w] - load) / (num_ranks - rank - 1))
                    value += weight_W[w] * largest
                if value <= target and (
                    not last_slot
                    or _on_time(e, ranks_left - 1, num_experts, here_NE[node], placed_NE[node])
                ):
                    break
                chosen = False
            c += 1
        expert_S[d], class_S[d] = e, c
        if not chosen:
            d -= 1
            if d >= 0 and expert_S[d] < num_experts:
                e, node = expert_S[d], d // (per_rank * per_node)
                placed_E[e] -= 1
                placed_NE[node, e] -= 1
                nodes_E[e] -= placed_NE[node, e] == 0
            continue
        if d == num_slots - 1:
            best_S[:] = expert_S[:num_slots]
            best = value
            target = value * (1.0 - margin)
            continue
        mean_S[d + 1] = mean_S[d]
        if e < num_experts:
            mean_S[d + 1] += mean_EC[e, c]
            like_E[e] = class_EC[e, c]
            nodes_E[e] += placed_NE[node, e] == 0
            here_NE[node, e] = class_C3[like_E[e], _HERE]
            placed_E[e] += 1
            placed_NE[node, e] += 1
        if last_slot:
            mean_rest_R[rank + 1] = mean_rest_R[rank] - mean_S[d + 1]
            for w in range(num_windows):
                most_RW[rank + 1, w] = max(most_W[w], load_SW[d + 1, w])
                rest_RW[rank + 1, w] = rest_W[w] - load_SW[d + 1, w]
        d += 1
        expert_S[d] = -1
    return best_S, best, max(steps, 0) if d >= 0 else max(steps, 1)


@njit(cache=True, nogil=True)
def _range(
    d: int,
    per_rank: int,
    per_node: int,
    num_nodes: int,
    expert_S: IntArray,
    like_E: IntArray,
    class_C3: IntArray,
    placed_E: IntArray,
    here_E: IntArray,
    placed_here_E: IntArray,
) -> tuple[int, int]:
    """Return the first and the last expert to try in a slot, in the order of ranks and nodes."""
    num_experts = len(placed_E)
    rank, slot = d // per_rank, d % per_rank
    node, ranks_left = rank // per_node, per_node - rank % per_node
    first_rank = ranks_left == per_node
    first = 0
    if slot > 0:
        # Rising, empty slots last.
        first = min(expert_S[d - 1] + 1, num_experts)
    back = per_rank * (per_node if first_rank else 1)
    if d >= back:
        # Not before the rank (or the first rank of the node) before.
        same = True
        for s in range(d - slot, d):
            same &= expert_S[s] == expert_S[s - back]
        if same:
            first = max(first, expert_S[d - back])
    for e in range(first if slot > 0 else 0, num_experts):
        all_left = class_C3[like_E[e], _ALL] - placed_E[e]
        if slot > 0:
            # Replicas that every rank to come needs.
            if placed_here_E[e] > 0 and here_E[e] - placed_here_E[e] >= ranks_left:
                return first, e
        elif first_rank or node == num_nodes - 1:
            # Nodes, and ranks of the last node, begin with the first expert that is not done.
            if placed_E[e] == 0 or all_left > 0:
                return first, e
        elif here_E[e] > placed_here_E[e] > 0:
            return first, e
    return first, num_experts


@njit(cache=True, nogil=True)
def _owed_after(
    e: int,
    c: int,
    class_C3: IntArray,
    nodes_left: int,
    per_node: int,
    ranks_left: int,
    least_E: IntArray,
    like_E: IntArray,
    placed_E: IntArray,
    nodes_E: IntArray,
    here_E: IntArray,
    placed_here_E: IntArray,
) -> int:
    """Return how many more slots experts are owed after this choice; _NEVER if it is not allowed.

    All replicas of an expert are of classes of one spread, and those on a node of one class.
    """
    here, nodes, replicas = class_C3[c, _HERE], class_C3[c, _NODES], class_C3[c, _ALL]
    like = like_E[e]
    if placed_E[e] > 0 and (class_C3[like, _NODES] != nodes or class_C3[like, _ALL] != replicas):
        return _NEVER
    if placed_here_E[e] > 0:
        return -1 if here_E[e] == here and placed_here_E[e] < here else _NEVER
    nodes_after = nodes - nodes_E[e] - 1
    rest = replicas - placed_E[e] - here
    if (
        here > ranks_left
        or not 0 <= nodes_after < nodes_left
        or not nodes_after <= rest <= nodes_after * per_node
    ):
        return _NEVER
    return -1 if placed_E[e] > 0 else replicas - least_E[e] - 1


@njit(cache=True, nogil=True)
def _on_time(
    chosen: int, ranks_left: int, num_experts: int, here_E: IntArray, placed_here_E: IntArray
) -> bool:
    """Return whether the replicas that the node still needs have ranks, but for the one chosen."""
    for e in range(num_experts):
        if placed_here_E[e] > 0 and here_E[e] - placed_here_E[e] - (e == chosen) > ranks_left:
            return False
    return True
