"""What a process does for one batch of a swap: move its rows, check them, switch, and go back.

The order of it is :mod:`eplb.runtime.swap`'s; each stage is started here and asked for its end, and
nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from eplb.arrays import IntArray
from eplb.errors import EplbError
from eplb.runtime.ep.expert_slots import ExpertSlots
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.peer_memory import PeerMemory
from eplb.runtime.lane import SideLane
from eplb.runtime.moves import CHECKPOINT, Arrivals
from eplb.runtime.row_fetch import Fetch, RowFetcher
from eplb.runtime.spare_rows import SpareRows

__all__ = ["BatchWork", "Loader", "SwapLayer", "WrongChecksum"]

# A row's sum takes a fifth of the row's time over NVLink (44 MB on an H100: 23 us and 115 us), but
# multiprocessors and launches, which serving feels: it is charged as half of a row.
SUM_SHARE = 2

# From the absolute layer id and a logical expert to its tensors, as the checkpoint has them.
Loader = Callable[[int, int], Mapping[str, torch.Tensor]]


class WrongChecksum(EplbError):
    """Bytes are not those that were loaded."""

    exit_code = 7


class SwapLayer(Protocol):
    """What the swap needs of a layer; :class:`~eplb.runtime.ep.layer.EPMoELayer` is one.

    Attributes
    ----------
    layer_id : int
        Absolute decoder layer id.
    slots : ExpertSlots
        Of this process.
    word, word_min : int
        Sent to all processes with the counts of each forward, and their minimum in the last.
    after_dispatch : callable or None
        To be called when the dispatch of a forward is on its stream.
    """

    layer_id: int
    slots: ExpertSlots
    word: int
    after_dispatch: Callable[[], None] | None

    @property
    def word_min(self) -> int:
        """See above."""

    def install(self, tables: Any, /) -> None:
        """Put a placement in force from the next forward on."""

    def join(self, group: EPGroup, tables: Any, /) -> None:
        """Go on in another group, with the same slots; only recovery from a loss calls it."""


class BatchWork:
    """The stages of the present batch, on the rows of one process.

    Parameters
    ----------
    layers : sequence of SwapLayer
        In the order of the placement's rows.
    process, slots_per_process : int
    spare : SpareRows
    memory : PeerMemory
        Through which rows are pushed to the processes of the node.
    lane : SideLane
    fetcher : RowFetcher
        For rows of all other processes.
    checksum_LE : array of int64, shape [L, E]
        Of each expert when it was loaded.
    """

    def __init__(
        self,
        layers: Sequence[SwapLayer],
        process: int,
        slots_per_process: int,
        spare: SpareRows,
        memory: PeerMemory,
        lane: SideLane,
        fetcher: RowFetcher,
        checksum_LE: IntArray,
    ) -> None:
        self.layers, self.spare = layers, spare
        self.lane, self.fetcher = lane, fetcher
        self._process, self._slots_per_process = process, slots_per_process
        self._memory, self._checksum_LE = memory, checksum_LE
        self._arrivals: Arrivals | None = None
        self._received: IntArray = np.zeros(0, np.int64)
        self._num_sums = 0
        device = spare.rows.device
        self._sums = torch.zeros(spare.num_rows, dtype=torch.int64, device=device)
        self._host_sums = self._sums
        if device.type == "cuda":
            self._host_sums = torch.zeros(spare.num_rows, dtype=torch.int64, pin_memory=True)
        self._is_switched = False

    @property
    def done_bytes(self) -> int:
        """What has been copied, fetched or checked so far; it grows while there is progress."""
        return self.lane.done_bytes + self.fetcher.done_bytes

    @property
    def is_drained(self) -> bool:
        """Whether nothing that was started is under way any more."""
        return self.lane.is_idle and self.fetcher.is_idle

    def move(self, epoch: int, arrivals: Arrivals, load: Loader | None = None) -> None:
        """Start bringing rows into the spare rows; the batch before has been ended.

        Rows on this process, and those for peers whose memory it can write to, are copied on the
        lane; the others are fetched. ``load`` brings what no slot holds.
        """
        assert self._arrivals is None, "another batch has not been ended"
        self._arrivals, self._is_switched = arrivals, False
        self._received = arrivals.received_by(self._process, self._slots_per_process)
        for index in arrivals.sent_by(self._process, self._slots_per_process):
            target = int(arrivals.slot_M[index]) // self._slots_per_process
            rows = self.spare.rows if target == self._process else self._memory.rows_of(target)
            if rows is not None:
                source = self._slot_row(arrivals.layer_M[index], arrivals.source_M[index])
                into = rows[int(arrivals.row_M[index])]
                self.lane.add(partial(_copy, into, source), source.numel())
        fetches = []
        for index in self._received:
            source_slot, layer = int(arrivals.source_M[index]), int(arrivals.layer_M[index])
            into = self.spare.rows[int(arrivals.row_M[index])]
            process, slot = divmod(source_slot, self._slots_per_process)
            if source_slot == CHECKPOINT:
                assert load is not None, "nothing to load lost experts with"
                self._load(layer, int(arrivals.expert_M[index]), into, load)
            elif process != self._process and self._memory.rows_of(process) is None:
                fetches.append(Fetch(process, layer, slot, into))
        self.fetcher.start(epoch, fetches)

    def check(self) -> None:
        """Start adding up the rows that have arrived."""
        assert self._arrivals is not None
        self._add_up([self.spare.rows[int(row)] for row in self._arrivals.row_M[self._received]])

    def switch(self, tables: Sequence[Any], part: int) -> None:
        """Put rows and tables of a part of the batch in force; behind the last, add all rows up."""
        assert self._arrivals is not None
        layers = self._arrivals.parts[part]
        self._put_in(self._received[np.isin(self._arrivals.layer_M[self._received], layers)])
        for layer in layers:
            self.layers[layer].install(tables[layer])
        if part == len(self._arrivals.parts) - 1:
            self._add_up(self._slot_rows(self._received))

    def put_in(self) -> None:
        """Put all of the batch's rows into their slots, and start adding these up."""
        self._put_in(self._received)
        self._add_up(self._slot_rows(self._received))

    def poll(self) -> bool:
        """Return whether the stage under way is complete on this process.

        Raises
        ------
        WrongChecksum
            Bytes are not those that were loaded.
        MigrationFailed, RuntimeError, MemoryError
            A transfer failed, or memory ran out.
        """
        if self.lane.error is not None:
            raise self.lane.error
        if not self.fetcher.poll() or not self.lane.is_idle:
            return False
        if self._num_sums:
            sums = self._host_sums[: self._num_sums].tolist()
            self._num_sums = 0
            self._compare(sums)
        return True

    def roll_back(self, tables: Sequence[Any]) -> None:
        """Put the old placement of the batch back in force, and withdraw what is under way."""
        self.withdraw()
        if self._is_switched and self._arrivals is not None:
            self.spare.put_back()
            for layer in self._arrivals.layers:
                self.layers[layer].install(tables[layer])
        self.end()

    def withdraw(self) -> None:
        """Start nothing more; what is under way ends soon (:attr:`is_drained`)."""
        self.lane.clear()
        self.fetcher.cancel()
        self._num_sums = 0

    def end(self) -> None:
        """Give up displaced rows: what is in force stays."""
        self.spare.free()
        self._arrivals, self._is_switched = None, False

    def _put_in(self, index: IntArray) -> None:
        assert self._arrivals is not None
        self._is_switched = True
        self.spare.put_in(self._slot_rows(index), self._arrivals.row_M[index].tolist())

    def _slot_rows(self, index: IntArray) -> list[torch.Tensor]:
        """Return the rows of the slots of some of the arrivals."""
        assert self._arrivals is not None
        layer_M, slot_M = self._arrivals.layer_M[index], self._arrivals.slot_M[index]
        return [
            self._slot_row(layer, slot)
            for layer, slot in zip(layer_M.tolist(), slot_M.tolist(), strict=True)
        ]

    def _slot_row(self, layer: int, slot: int) -> torch.Tensor:
        return self.layers[int(layer)].slots.rows[int(slot) % self._slots_per_process]

    def _load(self, layer: int, expert: int, into: torch.Tensor, load: Loader) -> None:
        """Fill a spare row from the checkpoint."""
        layout = self.layers[layer].slots.layout
        one = ExpertSlots(layout, 1, into.device)
        one.load(0, load(self.layers[layer].layer_id, expert))
        into.copy_(one.rows[0])

    def _add_up(self, rows: list[torch.Tensor]) -> None:
        """Queue sums of rows, one row at a time, and bring them to the host."""
        self._num_sums = len(rows)
        for number, row in enumerate(rows):
            self.lane.add(partial(_sum_into, self._sums, number, row), row.numel() // SUM_SHARE)
        if rows and self._host_sums is not self._sums:
            self.lane.add(partial(_copy, self._host_sums, self._sums), 0)

    def _compare(self, sums: list[int]) -> None:
        assert self._arrivals is not None
        arrivals = self._arrivals
        for index, total in zip(self._received, sums, strict=True):
            layer, expert = int(arrivals.layer_M[index]), int(arrivals.expert_M[index])
            if total != self._checksum_LE[layer, expert]:
                slot, source = int(arrivals.slot_M[index]), int(arrivals.source_M[index])
                raise WrongChecksum(
                    f"layer {self.layers[layer].layer_id}, slot {slot}: expert {expert} from slot "
                    f"{source} is not what was loaded (sum {total}, expected "
                    f"{self._checksum_LE[layer, expert]})"
                )


def _copy(into: torch.Tensor, source: torch.Tensor) -> None:
    into.copy_(source, non_blocking=True)


def _sum_into(sums: torch.Tensor, number: int, row: torch.Tensor) -> None:
    sums[number : number + 1] = ExpertSlots.checksums(row[None])
