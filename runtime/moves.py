"""What a swap does to the slots of each process: which rows arrive, from where, in which batch.

All processes compute the same from the same two placements. A slot whose expert changes gets its
new row from a slot of the old placement: of the same rank where that holds the expert, otherwise
from the rank that :mod:`eplb.placement.schedule` chose.
Shape letters: L layers, S slots of a layer, R ranks, K slots of a rank, M rows that arrive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from eplb.arrays import IntArray, frozen_array
from eplb.errors import MigrationFailed
from eplb.placement.migration import find_migration
from eplb.placement.schedule import schedule_moves

__all__ = [
    "CHECKPOINT",
    "Arrivals",
    "arriving_slots",
    "check_spare_rows",
    "find_arrivals",
    "layer_batches",
    "rows_per_process",
    "swap_batches",
]

# Sources of rows that no slot holds: they are loaded from the checkpoint.
CHECKPOINT = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrivals:
    """One batch: rows that arrive at all processes, and the layers that change over with them.

    Parameters
    ----------
    parts : tuple of tuple of int
        Rows of the placement: the layers that change over together at each step of the switch.
    layer_M, slot_M, expert_M : array of int64, shape [M]
        Row of the layer, slot in the layer, and the logical expert that comes there.
    source_M : array of int64, shape [M]
        Slot of the layer, in the old placement, that holds the expert; -1 where none does.
    round_M : array of int64, shape [M]
        In which round it is sent; -1 for rows that stay on their rank.
    row_M : array of int64, shape [M]
        Spare row of the receiving process in which it waits.
    """

    parts: tuple[tuple[int, ...], ...]
    layer_M: IntArray
    slot_M: IntArray
    expert_M: IntArray
    source_M: IntArray
    round_M: IntArray
    row_M: IntArray

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if name.endswith("_M"):
                object.__setattr__(self, name, frozen_array(getattr(self, name), np.int64))

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers of the batch."""
        return tuple(layer for part in self.parts for layer in part)

    @property
    def num_rows(self) -> int:
        """M."""
        return len(self.slot_M)

    def received_by(self, process: int, slots_per_process: int) -> IntArray:
        """Return which of the rows a process receives, in order of rounds."""
        return self._in_order(self.slot_M // slots_per_process == process)

    def sent_by(self, process: int, slots_per_process: int) -> IntArray:
        """Return which of the rows a process has, in order of rounds."""
        has = (self.source_M >= 0) & (self.source_M // slots_per_process == process)
        return self._in_order(has)

    def _in_order(self, chosen: np.ndarray) -> IntArray:
        index: IntArray = np.flatnonzero(chosen)
        return index[np.argsort(self.round_M[index], kind="stable")]


def swap_batches(
    old_LS: IntArray,
    new_LS: IntArray,
    *,
    slots_per_rank: int,
    ranks_per_process: int,
    ranks_per_node: int,
    spare_rows: int,
    rows_per_step: int | None = None,
) -> Iterator[Arrivals]:
    """Give the batches of a swap, at least one; layers keep their order.

    Parameters
    ----------
    old_LS, new_LS : array of int, shape [L, S]
        Logical expert in each slot, -1 where there is none.
    spare_rows : int
        Rows that may wait on a process at a time.
    rows_per_step : int, optional
        See :func:`layer_batches`.

    Raises
    ------
    MigrationFailed
        More slots of one layer and process change than there are spare rows.
    """
    slots_per_process = slots_per_rank * ranks_per_process
    batches = layer_batches(
        arriving_slots(old_LS, new_LS), slots_per_process, spare_rows, rows_per_step
    )
    for parts in batches:
        yield find_arrivals(
            old_LS, new_LS, parts,
            slots_per_rank=slots_per_rank, slots_per_process=slots_per_process,
            ranks_per_node=ranks_per_node,
        )  # fmt: skip


def arriving_slots(old_LS: IntArray, new_LS: IntArray) -> np.ndarray:
    """Return which slots get another expert, bool [L, S]; emptied ones get none."""
    arriving_LS: np.ndarray = (new_LS != old_LS) & (new_LS >= 0)
    return arriving_LS


def rows_per_process(changed_LS: np.ndarray, slots_per_process: int) -> IntArray:
    """Return how many of these slots of each layer are on each process, [L, P]."""
    count_LP: IntArray = changed_LS.reshape(len(changed_LS), -1, slots_per_process).sum(axis=2)
    return count_LP


def check_spare_rows(count_LP: IntArray, spare_rows: int) -> None:
    """Raise unless the rows of each layer can wait on each process.

    Raises
    ------
    MigrationFailed
        A layer alone needs more spare rows.
    """
    most = int(count_LP.max(initial=0))
    if most > spare_rows:
        layer, process = np.argwhere(count_LP == most)[0]
        raise MigrationFailed(
            f"{most} slots of one layer (row {layer}) change on process {process}, and "
            f"{spare_rows} rows can wait there; give spare_rows={most}, or move fewer experts"
        )


def layer_batches(
    changed_LS: np.ndarray,
    slots_per_process: int,
    spare_rows: int,
    rows_per_step: int | None = None,
) -> list[list[list[int]]]:
    """Return the parts of each batch, and the layers of each part; layers keep their order.

    A batch takes as many layers as spare rows allow. A part takes as many as put at most
    ``rows_per_step`` rows in place on every process, at least one; the whole batch where it is left
    out.

    Raises
    ------
    MigrationFailed
        A layer alone needs more spare rows.
    """
    count_LP = rows_per_process(changed_LS, slots_per_process)
    check_spare_rows(count_LP, spare_rows)
    batches: list[list[list[int]]] = [[[]]]
    waiting_P = np.zeros(count_LP.shape[1], np.int64)
    put_in_P = waiting_P.copy()
    for layer, count_P in enumerate(count_LP):
        if (waiting_P + count_P).max() > spare_rows:
            batches.append([[]])
            waiting_P[:] = put_in_P[:] = 0
        parts = batches[-1]
        if parts[-1] and rows_per_step is not None and (put_in_P + count_P).max() > rows_per_step:
            parts.append([])
            put_in_P[:] = 0
        parts[-1].append(layer)
        waiting_P += count_P
        put_in_P += count_P
    return batches


def find_arrivals(
    old_LS: IntArray,
    new_LS: IntArray,
    parts: Sequence[Sequence[int]],
    *,
    slots_per_rank: int,
    slots_per_process: int,
    ranks_per_node: int,
) -> Arrivals:
    """Return the rows of one batch of layers with their sources, rounds and spare rows."""
    layers = [layer for part in parts for layer in part]
    old, new = old_LS[layers], new_LS[layers]
    row_M, slot_M = np.nonzero(arriving_slots(old, new))
    expert_M = new[row_M, slot_M]
    source_rank_M = slot_M // slots_per_rank
    round_M = np.full(len(slot_M), -1)
    is_lost_M = ~(old[row_M] == expert_M[:, np.newaxis]).any(axis=1)
    sent = new.copy()
    sent[row_M[is_lost_M], slot_M[is_lost_M]] = -1
    migration = find_migration(_by_rank(old, slots_per_rank), _by_rank(sent, slots_per_rank))
    if migration.num_moves:
        schedule = schedule_moves(migration, ranks_per_node)
        # Both are in the order of slots, and what is fetched is some of what arrives.
        fetched_slot = migration.rank_M * slots_per_rank + migration.slot_M
        num_slots = old.shape[1]
        index = np.searchsorted(
            row_M * num_slots + slot_M, migration.layer_M * num_slots + fetched_slot
        )
        source_rank_M[index] = schedule.source_M
        round_M[index] = schedule.round_M
    source_M = _slot_of(old, row_M, source_rank_M, expert_M, slots_per_rank)
    source_M[is_lost_M] = CHECKPOINT
    return Arrivals(
        parts=tuple(map(tuple, parts)),
        layer_M=np.array(layers, np.int64)[row_M],
        slot_M=slot_M,
        expert_M=expert_M,
        source_M=source_M,
        round_M=round_M,
        row_M=spare_rows_of(slot_M, slots_per_process),
    )


def spare_rows_of(slot_M: IntArray, slots_per_process: int) -> IntArray:
    """Return numbers of the rows that arrive at each process, from 0 on."""
    process_M = slot_M // slots_per_process
    order_M = np.argsort(process_M, kind="stable")
    first_M = np.searchsorted(process_M[order_M], process_M[order_M])
    row_M = np.empty(len(slot_M), np.int64)
    row_M[order_M] = np.arange(len(slot_M)) - first_M
    return row_M


def _by_rank(rows_LS: IntArray, slots_per_rank: int) -> IntArray:
    return rows_LS.reshape(len(rows_LS), -1, slots_per_rank)


def _slot_of(
    old_LS: IntArray,
    layer_M: IntArray,
    rank_M: IntArray,
    expert_M: IntArray,
    slots_per_rank: int,
) -> IntArray:
    """Return the first slot of each of these ranks that holds the expert."""
    held_MK = _by_rank(old_LS, slots_per_rank)[layer_M, rank_M]
    place_M = (held_MK == expert_M[:, np.newaxis]).argmax(axis=1)
    slots: IntArray = rank_M * slots_per_rank + place_M
    return slots
