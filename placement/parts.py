"""Change one layer over in parts, where its experts do not fit the spare slots all at once.

A part is a set of experts that arrive together: those that come in the place of others wait in
spare slots till the part changes over, those that come into empty slots need none. What a part
overwrites has to have another live replica after it. So an expert of one replica that leaves its
rank takes part together with its own arrival elsewhere, and what that overwrites in turn: a chain,
which ends at an empty slot, at a redundant replica, or where it began. Ranks as vertices and such
moves as edges, a chain that meets no rank twice exists as long as anything is left to move: one
spare slot a rank is always enough.

Shape letters: R ranks, K slots of a rank, M moves of the layer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from eplb.arrays import IntArray

__all__ = ["split_layer"]

# Rows of experts by rank and slot, -1 where there is none.
Rows = list[list[int]]


@dataclass
class _Layer:
    """What is in force, and what is left to do.

    Parameters
    ----------
    rows : list of lists
        The experts in force.
    leaving : list of sets
        Slots of each rank whose expert has no place on it in the new placement.
    free : list of sets
        Slots of each rank that hold nothing, and that it has.
    live : Counter
        Replicas of each expert in force, and then after the part at work.
    pending : dict
        Moves that bring an expert, by expert.
    waiting : list of int
        Experts that wait in spare slots of each rank in the part at work.
    """

    rows: Rows
    leaving: list[set[int]]
    free: list[set[int]]
    live: Counter[int]
    pending: dict[int, list[int]]
    waiting: list[int] = field(default_factory=list)


def split_layer(
    old_RK: IntArray,
    new_RK: IntArray,
    rank_M: IntArray,
    slot_M: IntArray,
    expert_M: IntArray,
    spare_slots: int,
) -> list[list[tuple[int, int, bool]]] | None:
    """Return the parts in which a layer changes over; None if no order of parts will do.

    Parameters
    ----------
    old_RK, new_RK : array of int
        Logical expert in each slot, -1 where there is none.
    rank_M, slot_M, expert_M : array of int
        The moves: which rank gets which expert, and into which slot in the end.
    spare_slots : int
        At least 1 always finds an order.

    Returns
    -------
    parts : list of lists
        Of each part its moves, the slot that each comes to lie in, which is that of the new
        placement where that can be, and whether it waits in a spare slot.
    """
    layer = _start(old_RK, new_RK, expert_M)
    rank, slot, expert = rank_M.tolist(), slot_M.tolist(), expert_M.tolist()
    left = list(range(len(rank)))
    parts = []
    while left:
        layer.waiting = [0] * len(layer.rows)
        part: dict[int, tuple[int, bool]] = {}
        grown = True
        while grown:
            grown = False
            for move in left:
                if move in part:
                    continue
                chain = _chain(layer, move, rank, slot, expert, spare_slots)
                for link, place in chain:
                    part[link] = place, _take(layer, rank[link], place, expert[link], link)
                grown |= bool(chain)
        if not part:
            return None
        for move, (place, _) in part.items():
            layer.rows[rank[move]][place] = expert[move]
        parts.append([(move, place, waits) for move, (place, waits) in part.items()])
        left = [move for move in left if move not in part]
    return parts


def _start(old_RK: IntArray, new_RK: IntArray, expert_M: IntArray) -> _Layer:
    rows: Rows = old_RK.tolist()
    leaving, free = [], []
    for row, wanted in zip(rows, new_RK.tolist(), strict=True):
        staying = Counter(wanted)
        gone = set()
        for k, expert in enumerate(row):
            if expert >= 0 and staying[expert] <= 0:
                gone.add(k)
            staying[expert] -= 1
        leaving.append(gone)
        free.append({k for k, e in enumerate(row) if e < 0 and wanted[k] >= 0})
    pending: dict[int, list[int]] = {}
    for move, expert in enumerate(expert_M.tolist()):
        pending.setdefault(expert, []).append(move)
    return _Layer(
        rows=rows,
        leaving=leaving,
        free=free,
        live=Counter(e for row in rows for e in row if e >= 0),
        pending=pending,
    )


def _chain(
    layer: _Layer, first: int, rank: list[int], slot: list[int], expert: list[int], spare: int
) -> list[tuple[int, int]]:
    """Return moves that can be made together, ``first`` among them, and their slots; [] if none.

    The shortest, by breadth-first search over ranks.
    """
    came_from: dict[int, tuple[int, int] | None] = {first: None}
    queue, seen = [first], {rank[first]}
    for move in queue:
        here, wanted = rank[move], slot[move]
        rows = layer.rows[here]
        if layer.free[here]:
            return _path(came_from, move, _best(layer.free[here], wanted))
        if layer.waiting[here] >= spare:
            continue
        redundant = {
            k
            for k in layer.leaving[here]
            if layer.live[rows[k]] > 1 or (rows[k] == expert[first] and move != first)
        }
        if redundant:
            return _path(came_from, move, _best(redundant, wanted))
        for k in sorted(layer.leaving[here], key=lambda k: (k != wanted, k)):
            for other in layer.pending.get(rows[k], ()):
                if rank[other] not in seen:
                    seen.add(rank[other])
                    came_from[other] = move, k
                    queue.append(other)
    return []


def _best(slots: set[int], wanted: int) -> int:
    return wanted if wanted in slots else min(slots)


def _path(
    came_from: dict[int, tuple[int, int] | None], move: int, slot: int
) -> list[tuple[int, int]]:
    path = [(move, slot)]
    while (before := came_from[path[-1][0]]) is not None:
        path.append(before)
    return path


def _take(layer: _Layer, rank: int, slot: int, expert: int, move: int) -> bool:
    """Note that an expert comes into a slot; return whether it waits in a spare one till then."""
    waits = slot not in layer.free[rank]
    if waits:
        layer.leaving[rank].remove(slot)
        layer.live[layer.rows[rank][slot]] -= 1
        layer.waiting[rank] += 1
    else:
        layer.free[rank].remove(slot)
    layer.live[expert] += 1
    layer.pending[expert].remove(move)
    return waits
