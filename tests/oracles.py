"""Slow references that are easy to see right. They share no code with what they judge.

``deepseek_rebalance``: DeepSeek's algorithm, from its description. ``optimal_max_rank_load`` and
``optimal_imbalance_mean``: brute force over tiny cases. ``share_of_slots``,
``rank_loads`` and ``best_split_max_load``: split rules by enumeration, in fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from itertools import combinations, product
from math import lcm

import numpy as np

# ---------------------------------------------------------------- DeepSeek's algorithm


def deepseek_rebalance(weight_LE, num_replicas, num_groups, num_nodes, num_gpus):
    """Return (phys_to_log [L, S], log_to_phys [L, E, X], replica_count [L, E]).

    Loads are single precision, as in the original. Ties go to the lower index, everywhere.
    """
    weight_LE = np.asarray(weight_LE).astype(np.float32)
    if num_groups % num_nodes:
        # Groups that cannot be divided over nodes: the global policy.
        num_groups = num_nodes = 1
    layers = [
        _rebalance_layer(list(load_E), num_replicas, num_groups, num_nodes, num_gpus)
        for load_E in weight_LE
    ]
    num_experts = weight_LE.shape[1]
    copies = [[len(slots[e]) for e in range(num_experts)] for _, slots in layers]
    widest = max(max(row) for row in copies)
    inverse = [
        [slots[e] + [-1] * (widest - len(slots[e])) for e in range(num_experts)]
        for _, slots in layers
    ]
    return np.array([row for row, _ in layers]), np.array(inverse), np.array(copies)


def _rebalance_layer(load_E, num_slots, num_groups, num_nodes, num_ranks):
    """One layer: its slots, and for each expert the slots of its replicas as they were made."""
    group_size = len(load_E) // num_groups
    members = [range(g * group_size, (g + 1) * group_size) for g in range(num_groups)]
    # torch adds in another order than numpy: sums that are not exact differ in the last bit.
    group_load = [np.array([load_E[e] for e in m], np.float32).sum() for m in members]
    ranks_per_node = num_ranks // num_nodes
    row: list[int] = []
    slots_of: list[dict[int, int]] = [{} for _ in load_E]
    for groups in _pack(group_load, num_nodes):
        experts = [expert for group in groups for expert in members[group]]
        replicas = _replicate(experts, load_E, num_slots // num_nodes)
        copies = {expert: sum(e == expert for e, _ in replicas) for expert in experts}
        loads = [load_E[e] / np.float32(copies[e]) for e, _ in replicas]
        for rank in _pack(loads, ranks_per_node):
            for item in rank:
                expert, nth = replicas[item]
                slots_of[expert][nth] = len(row)
                row.append(expert)
    return row, [[slots[n] for n in sorted(slots)] for slots in slots_of]


def _replicate(experts, load_E, num_slots):
    """Every expert once, then the expert with the largest load per replica again, till full."""
    replicas = [(expert, 0) for expert in experts]
    copies = dict.fromkeys(experts, 1)
    while len(replicas) < num_slots:
        # max returns the first of equals.
        hottest = max(experts, key=lambda e: load_E[e] / np.float32(copies[e]))
        replicas.append((hottest, copies[hottest]))
        copies[hottest] += 1
    return replicas


def _pack(loads, num_packs):
    """Equal numbers of items a pack, the largest load next into the lightest pack with room."""
    room = len(loads) // num_packs
    if room == 1:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    total = [np.float32(0)] * num_packs
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        pack = min((p for p in range(num_packs) if len(packs[p]) < room), key=lambda p: total[p])
        packs[pack].append(item)
        total[pack] = total[pack] + loads[item]
    return packs


# ---------------------------------------------------------------- brute force


def optimal_max_rank_load(
    load_E: Sequence[float], num_ranks: int, slots_per_rank: int, *, distinct_ranks: bool
) -> Fraction | None:
    """Return the smallest largest rank load of one layer under even split, exactly.

    Over all replica counts and all placements; slots may stay empty. None if nothing fits.
    """
    best = optimal_imbalance_mean(
        [load_E], num_ranks, slots_per_rank, distinct_ranks=distinct_ranks
    )
    return None if best is None else best * sum(map(Fraction, load_E)) / num_ranks


def optimal_imbalance_mean(
    load_WE: Sequence[Sequence[float]],
    num_ranks: int,
    slots_per_rank: int,
    *,
    distinct_ranks: bool,
) -> Fraction | None:
    """Return the smallest mean over windows of max / mean rank load of one layer, exactly.

    Every window needs load. Meant for at most 6 experts, 4 ranks and 8 slots. Experts are placed
    one after the other in every way there is; ranks are interchangeable, so states that differ in
    the order of ranks only are one state.
    """
    windows = [[Fraction(load) for load in load_E] for load_E in load_WE]
    num_windows, num_experts = len(windows), len(windows[0])
    most = num_ranks * slots_per_rank
    # As whole numbers in one unit, in which also every replica's load is whole.
    shares = [[load / sum(load_E) for load in load_E] for load_E in windows]
    unit = lcm(*range(1, most + 1)) * lcm(*(s.denominator for row in shares for s in row))
    whole = [[int(share * unit) for share in row] for row in shares]

    @cache
    def rest(expert: int, ranks: tuple[tuple[int, tuple[int, ...]], ...]) -> int | None:
        """Least sum over windows of the largest load, from here on."""
        if expert == num_experts:
            return sum(max(loads[w] for _, loads in ranks) for w in range(num_windows))
        best = None
        limits = (range(min(free, 1 if distinct_ranks else free) + 1) for free, _ in ranks)
        for copies in product(*limits):
            total = sum(copies)
            # Equal ranks stand side by side: one order of what they get is enough.
            mirrored = any(
                ranks[i] == ranks[i + 1] and copies[i] < copies[i + 1] for i in range(num_ranks - 1)
            )
            if total == 0 or mirrored:
                continue
            after = tuple(
                sorted(
                    (
                        free - n,
                        tuple(load + whole[w][expert] * n // total for w, load in enumerate(loads)),
                    )
                    for n, (free, loads) in zip(copies, ranks, strict=True)
                )
            )
            if sum(free for free, _ in after) < num_experts - expert - 1:
                continue
            value = rest(expert + 1, after)
            if value is not None and (best is None or value < best):
                best = value
        return best

    least = rest(0, ((slots_per_rank, (0,) * num_windows),) * num_ranks)
    return None if least is None else Fraction(least, unit) * num_ranks / num_windows


# ---------------------------------------------------------------- split rules and rank loads


def share_of_slots(row: Sequence[int], topology, split: str) -> list[Fraction]:
    """Return the fraction of its expert's tokens that each slot of a layer receives.

    A token of each source rank is followed to its slots.
    """
    num_ranks = topology.num_nodes * topology.ranks_per_node
    rank_of = [slot // topology.slots_per_rank for slot in range(len(row))]
    node_of = [rank // topology.ranks_per_node for rank in rank_of]
    share = [Fraction(0)] * len(row)
    for expert in set(row) - {-1}:
        everywhere = [slot for slot, e in enumerate(row) if e == expert]
        for source in range(num_ranks):
            near = everywhere
            if split == "nearest":
                own = [s for s in everywhere if rank_of[s] == source]
                mates = [s for s in everywhere if node_of[s] == source // topology.ranks_per_node]
                near = own or mates or everywhere
            for slot in near:
                share[slot] += Fraction(1, num_ranks * len(near))
    return share


def rank_loads(
    load_E: Sequence[float], row: Sequence[int], topology, split: str, weights=None
) -> list[Fraction]:
    """Return what each rank receives of one layer's loads in one window.

    ``weights`` are the fractions of the slots under ``weighted``.
    """
    loads = [Fraction(0)] * (topology.num_nodes * topology.ranks_per_node)
    shares = share_of_slots(row, topology, split) if weights is None else map(Fraction, weights)
    for slot, (expert, share) in enumerate(zip(row, shares, strict=True)):
        if expert >= 0:
            loads[slot // topology.slots_per_rank] += share * Fraction(load_E[expert])
    return loads


def best_split_max_load(load_E: Sequence[float], row: Sequence[int], topology) -> Fraction:
    """Return the smallest largest rank load that one window can be split to, exactly.

    By the theorem of maximum flow and minimum cut: whatever set of experts is taken, its load has
    only the ranks that hold them to go to, and the tightest set decides. All sets are tried.
    """
    ranks_of: dict[int, set[int]] = {}
    for slot, expert in enumerate(row):
        if expert >= 0:
            ranks_of.setdefault(expert, set()).add(slot // topology.slots_per_rank)
    best = Fraction(0)
    for size in range(1, len(ranks_of) + 1):
        for experts in combinations(ranks_of, size):
            ranks = set().union(*(ranks_of[e] for e in experts))
            best = max(best, sum(Fraction(load_E[e]) for e in experts) / len(ranks))
    return best
