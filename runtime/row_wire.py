"""What rows look like on their way between processes: the request, the answer, the bytes."""

from __future__ import annotations

import socket
import struct
from typing import Any

import torch

__all__ = ["GRANTED", "REFUSED", "REQUEST", "HostRow", "receive_into"]

# The server's token, the swap's epoch, the row of the layer and the slot in it.
REQUEST = struct.Struct("<16sqqq")
# What comes before the row, or instead of it.
GRANTED, REFUSED = b"\1", b"\0"


class HostRow:
    """A row on the host on its way from or to the device; none is needed on the CPU."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def read(self, row: torch.Tensor) -> memoryview:
        """Return a row's bytes."""
        if not row.is_cuda:
            return _bytes_of(row)
        self._copy(self._pinned(row), row)
        return _bytes_of(self._pinned(row))

    def writable(self, row: torch.Tensor) -> memoryview:
        """Return where bytes for a row are to be put before :meth:`write`."""
        return _bytes_of(self._pinned(row) if row.is_cuda else row)

    def write(self, row: torch.Tensor) -> None:
        """Bring the bytes to the row."""
        if row.is_cuda:
            self._copy(row, self._pinned(row))

    def _pinned(self, row: torch.Tensor) -> torch.Tensor:
        if self._buffer is None:
            self._buffer = torch.empty(row.shape, dtype=torch.uint8, pin_memory=True)
        return self._buffer

    def _copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy and wait, on a stream that serving does not use; the wait lets other threads run."""
        device = to.device if to.is_cuda else source.device
        with torch.cuda.device(device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                to.copy_(source, non_blocking=True)
            self._stream.synchronize()


def receive_into(connection: socket.socket, view: memoryview) -> bool:
    """Fill a buffer; False where the peer hung up."""
    view = view.cast("B")
    while view:
        received = connection.recv_into(view)
        if not received:
            return False
        view = view[received:]
    return True


def _bytes_of(row: torch.Tensor) -> memoryview:
    array: Any = row.numpy()
    return memoryview(array)
