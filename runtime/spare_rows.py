"""Rows in which experts wait before a switch, and the displaced ones after it.

One pool serves all layers of a process. Putting rows in is two copies on the device for each, and
one row more than may wait: the content of a slot moves to the free row, the waiting row into the
slot, and the row it waited in is the free one for the next. Addresses of slots never change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from eplb.errors import InvalidInput

__all__ = ["SpareRows"]


class SpareRows:
    """The pool of one process.

    Parameters
    ----------
    num_rows : int
        Rows that may wait at a time; the pool has one more.
    row_bytes : int
    allocate : callable
        From a shape to a tensor of uint8 on the device; memory of the process alone, or such that
        peers can write to (:mod:`eplb.runtime.ep.peer_memory`).

    Attributes
    ----------
    rows : Tensor of uint8, shape [num_rows + 1, row_bytes]
    """

    def __init__(
        self, num_rows: int, row_bytes: int, allocate: Callable[[tuple[int, int]], torch.Tensor]
    ) -> None:
        if num_rows < 1:
            raise InvalidInput(f"spare_rows ({num_rows}) must be at least 1")
        self.num_rows = num_rows
        self.rows = allocate((num_rows + 1, row_bytes))
        self._displaced: list[tuple[torch.Tensor, int]] = []
        self._empty = num_rows

    def put_in(self, slot_rows: Sequence[torch.Tensor], waiting: Sequence[int]) -> None:
        """Put waiting rows into slots, and keep what was there until :meth:`free`.

        Runs on the current stream, behind the steps launched before and ahead of the next.
        """
        for slot_row, row in zip(slot_rows, waiting, strict=True):
            waiting_row = self.rows[row]
            self.rows[self._empty].copy_(slot_row)
            slot_row.copy_(waiting_row)
            self._displaced.append((slot_row, self._empty))
            self._empty = row

    def put_back(self) -> None:
        """Put displaced rows back into their slots."""
        for slot_row, row in self._displaced:
            slot_row.copy_(self.rows[row])
        self.free()

    def free(self) -> None:
        """Give displaced rows up; all rows are free then."""
        self._displaced.clear()
        self._empty = self.num_rows
