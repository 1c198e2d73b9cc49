"""Placements for splits that are free (``weighted``, ``batch``), by how slots join ranks together.

Experts and ranks with an edge for each replica make a graph, and load moves freely within a
connected component. One of r ranks with K slots each can hold n <= (K-1) r + 1 experts, and any
such experts of total load W *can* be spread over its ranks evenly, W / r on each (:func:`fill`):
fill one rank after the other with K-1 whole experts and a part of one more. So the best placement
of one load is the best division of experts into components. Two components with room for an expert
more are no better than one, so none has room: there are m = E - (K-1) R of them, or only one, which
costs no more than the mean. This is splittable packing with at most K parts a bin; for K = 2 it is
the covering of bins by the items T - w.
Importing this module costs numba. Shape letters: E logical experts, S slots, R ranks, K slots of a
rank, B components.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from eplb.arrays import FloatArray, IntArray
from eplb.slots import EMPTY

__all__ = ["fill", "place_groups", "place_in_components"]

# What is left of an expert below this part of the target is rounding.
_ROUNDING = 1e-12
# Steps for which an expert that has moved stays.
_BARRED, _BARRED_MORE = 4, 12


def place_in_components(
    load_E: FloatArray, num_ranks: int, slots_per_rank: int, *, steps: int = 3000, seed: int = 0
) -> tuple[IntArray, FloatArray]:
    """Return slots and fractions of a small largest rank load under a free split, shape [S] each.

    Parameters
    ----------
    load_E : array of float64
        One window, with some load.
    num_ranks, slots_per_rank : int
        With room for all experts.
    steps, seed : int
        Changes of the division into components, where there are several.

    Notes
    -----
    With ``E + R - 1`` slots or more the largest rank load is the mean one, which is optimal.
    """
    group_E = _group_experts(load_E, num_ranks, slots_per_rank, steps=steps, seed=seed)
    return place_groups(load_E, group_E, num_ranks, slots_per_rank)


def place_groups(
    load_E: FloatArray, group_E: IntArray, num_ranks: int, slots_per_rank: int
) -> tuple[IntArray, FloatArray]:
    """Return slots and fractions, shape [S] each, that level the ranks of each component.

    Parameters
    ----------
    load_E : array of float64
    group_E : array of int64
        The component of each expert, numbered from 0. There are ranks enough for all components.
    num_ranks, slots_per_rank : int
    """
    load_B = np.bincount(group_E, load_E)
    ranks_B = np.maximum(1, -(-(np.bincount(group_E) - 1) // max(slots_per_rank - 1, 1)))
    for _ in range(num_ranks - ranks_B.sum()):
        ranks_B[np.argmax(load_B / ranks_B)] += 1
    row_RK = np.full((num_ranks, slots_per_rank), EMPTY, np.int64)
    fraction_RK = np.zeros((num_ranks, slots_per_rank))
    first = 0
    for group, ranks in enumerate(ranks_B):
        experts = np.flatnonzero(group_E == group)
        row, fraction = fill(load_E[experts], int(ranks), slots_per_rank)
        row_RK[first : first + ranks] = np.append(experts, EMPTY)[row]
        fraction_RK[first : first + ranks] = fraction
        first += ranks
    return row_RK.reshape(-1), fraction_RK.reshape(-1)


def fill(load_E: FloatArray, num_ranks: int, slots_per_rank: int) -> tuple[IntArray, FloatArray]:
    """Spread experts evenly over the ranks of a component, [R, K] slots and fractions.

    Parameters
    ----------
    load_E : array of float64
        At most ``(slots_per_rank - 1) * num_ranks + 1`` experts.
    num_ranks, slots_per_rank : int

    Notes
    -----
    With n = (K-1) r + 1 experts of mean rank load T left, the K-1 coldest have less than T in all.
    Exchange them one by one for hotter ones until the hottest beside them, L, makes T full. The
    exchange that does so takes no more than L in, so those K-1 still fit whole, and of L a part.
    Where even the K hottest do not fill a rank, any K do.
    """
    num_experts, whole = len(load_E), slots_per_rank - 1
    assert num_experts <= whole * num_ranks + 1
    target = load_E.sum() / num_ranks
    row_RK = np.full((num_ranks, slots_per_rank), EMPTY, np.int64)
    part_RK = np.zeros((num_ranks, slots_per_rank))
    # Experts without load stand for slots that may stay empty.
    spare = whole * num_ranks + 1 - num_experts
    expert_X = np.concatenate([np.full(spare, EMPTY), np.arange(num_experts)])
    left_X = np.concatenate([np.zeros(spare), load_E])
    for rank in range(num_ranks):
        order_X = np.argsort(left_X, kind="stable")
        expert_X, left_X = expert_X[order_X], left_X[order_X]
        last = len(left_X) - 1
        if rank == num_ranks - 1:
            taken, part = np.arange(len(left_X)), left_X[-1]
        else:
            taken = np.arange(whole)
            for hot in range(whole):
                if left_X[taken].sum() + left_X[last] >= target:
                    break
                taken[whole - 1 - hot] = last - 1 - hot
            taken = np.append(taken, last)
            part = min(left_X[last], max(target - left_X[taken[:-1]].sum(), 0.0))
        row_RK[rank] = expert_X[taken]
        part_RK[rank, :-1], part_RK[rank, -1] = left_X[taken[:-1]], part
        left_X[last] -= part
        if left_X[last] <= _ROUNDING * target:
            # All of it is placed.
            left_X[last], expert_X[last] = 0.0, EMPTY
        left_X, expert_X = np.delete(left_X, taken[:-1]), np.delete(expert_X, taken[:-1])
    total_E = np.append(np.where(load_E > 0, load_E, 1.0), 1.0)
    # An expert without load has one slot, which receives all of nothing.
    idle_RK = (row_RK >= 0) & (np.append(load_E, 1.0)[row_RK] == 0)
    return row_RK, np.where(idle_RK, 1.0, part_RK / total_E[row_RK])


def _group_experts(
    load_E: FloatArray, num_ranks: int, slots_per_rank: int, *, steps: int, seed: int
) -> IntArray:
    """Return the component of each expert, whose largest mean rank load is small, shape [E].

    Components have (K-1) r + 1 experts on r ranks, in all R, if there are several.
    """
    whole = slots_per_rank - 1
    num_groups = max(1, len(load_E) - whole * num_ranks)
    if num_groups == 1:
        return np.zeros(len(load_E), np.int64)
    order_E = np.argsort(-load_E, kind="stable")
    # The hottest experts begin components, with ranks in proportion to their load.
    ranks_B = np.ones(num_groups, np.int64)
    for _ in range(num_ranks - num_groups):
        ranks_B[np.argmax(load_E[order_E[:num_groups]] / ranks_B)] += 1
    group_E = np.empty(len(load_E), np.int64)
    load_B, room_B = load_E[order_E[:num_groups]].copy(), whole * ranks_B
    group_E[order_E[:num_groups]] = np.arange(num_groups)
    for expert in order_E[num_groups:]:
        # The hottest goes where each of the experts to come has most room for load.
        left_B = ranks_B * load_E.sum() / num_ranks - load_B
        group = int(np.argmax(np.where(room_B > 0, left_B / np.maximum(room_B, 1), -np.inf)))
        group_E[expert] = group
        load_B[group] += load_E[expert]
        room_B[group] -= 1
    if whole == 0:
        # Each expert is a component.
        return group_E
    return _improve(load_E, group_E, ranks_B, whole, steps, seed)


@njit(cache=True, nogil=True)
def _improve(
    load_E: FloatArray, group_E: IntArray, ranks_B: IntArray, whole: int, steps: int, seed: int
) -> IntArray:
    """Return a better division: tabu search over changes of the costliest component."""
    np.random.seed(seed)  # noqa: NPY002 (numba has this generator only)
    group_E, ranks_B = group_E.copy(), ranks_B.copy()
    load_B = np.zeros(len(ranks_B))
    for e in range(len(load_E)):
        load_B[group_E[e]] += load_E[e]
    best_E, best = group_E.copy(), (load_B / ranks_B).max()
    bound = load_E.sum() / ranks_B.sum()
    barred_E = np.zeros(len(load_E), np.int64)
    for step in range(1, steps + 1):
        worst = int(np.argmax(load_B / ranks_B))
        out, back, to = _best_change(
            load_E, group_E, load_B, ranks_B, whole, worst, barred_E, step, best
        )
        for expert, before, after in ((out, worst, to), (back, to, worst)):
            if expert < 0:
                continue
            group_E[expert] = after
            barred_E[expert] = step + _BARRED + np.random.randint(_BARRED_MORE)  # noqa: NPY002
            load_B[before] -= load_E[expert]
            load_B[after] += load_E[expert]
        moved = (back >= 0) - (out >= 0)
        ranks_B[worst] += moved
        ranks_B[to] -= moved
        value = (load_B / ranks_B).max()
        if value < best:
            best, best_E = value, group_E.copy()
            if best <= bound * (1.0 + _ROUNDING):
                break
    return best_E


@njit(cache=True, nogil=True)
def _best_change(
    load_E: FloatArray,
    group_E: IntArray,
    load_B: FloatArray,
    ranks_B: IntArray,
    whole: int,
    worst: int,
    barred_E: IntArray,
    step: int,
    best: float,
) -> tuple[int, int, int]:
    """Return which expert leaves the costliest component, which one comes, and the other component.

    Two experts change places, or, with two slots a rank, one (the other is -1) goes with a rank.
    """
    num_experts = len(load_E)
    least, out, back, to = np.inf, -1, -1, worst
    for i in range(-1, num_experts):
        if i >= 0 and group_E[i] != worst:
            continue
        # From E on no expert comes back from this component.
        for j in range(num_experts + len(ranks_B)):
            comes = j < num_experts
            other = group_E[j] if comes else j - num_experts
            moved = comes - (i >= 0)
            if other == worst or (i < 0 and not comes):
                continue
            if moved != 0 and (
                whole > 1 or min(ranks_B[worst] + moved, ranks_B[other] - moved) < 1
            ):
                continue
            change = (load_E[j] if comes else 0.0) - (load_E[i] if i >= 0 else 0.0)
            value = max(
                (load_B[worst] + change) / (ranks_B[worst] + moved),
                (load_B[other] - change) / (ranks_B[other] - moved),
            )
            barred = (comes and barred_E[j] >= step) or (i >= 0 and barred_E[i] >= step)
            if value < least and (not barred or value < best):
                least, out, back, to = value, i, j if comes else -1, other
    return out, back, to
