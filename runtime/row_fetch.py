"""Rows fetched from other processes over TCP: between nodes, and on CPUs.

Each process serves its slots from threads of their own (:mod:`eplb.runtime.row_server`) and fetches
what it needs on another, from and into pinned memory where the device is a GPU. It is no
collective: nothing on the device or in a process group waits for it, so it cannot deadlock with
serving's exchanges, and unlike a receive of gloo, which cannot be withdrawn without losing the
group, a fetch ends when its socket is closed. The request says which swap it is for, and a source
that has rolled that back refuses.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.distributed_c10d import Store

from eplb.errors import MigrationFailed
from eplb.runtime.lane import Pacer
from eplb.runtime.row_wire import GRANTED, REQUEST, HostRow, receive_into

__all__ = ["Fetch", "RowFetcher"]

# How long a fetch that is withdrawn takes to end; only connecting cannot be interrupted, and a
# thread that does so ends by itself without touching a row.
WITHDRAW_S = 1.0


@dataclass(frozen=True, slots=True)
class Fetch:
    """A row to be fetched: from the slot of a layer at a process, into a row of this one."""

    process: int
    layer: int
    slot: int
    into: torch.Tensor


class RowFetcher:
    """Fetches rows from peers, one after the other, on a thread of its own.

    Parameters
    ----------
    store : Store
        Where each process published its server's address, under its number.
    pacer : Pacer
    timeout_s : float
        How long a peer may send nothing.

    Attributes
    ----------
    done_bytes : int
        Fetched so far.
    """

    def __init__(self, store: Store, pacer: Pacer, timeout_s: float) -> None:
        self._store, self._pacer, self._timeout_s = store, pacer, timeout_s
        self.done_bytes = 0
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._connections: dict[int, tuple[socket.socket, bytes]] = {}

    def start(self, epoch: int, fetches: Sequence[Fetch]) -> None:
        """Fetch these rows in this order."""
        assert self.is_idle, "rows of another batch are being fetched"
        if self._cancelled.is_set():
            self._hang_up()
        self._error = None
        self._cancelled.clear()
        if fetches:
            self._thread = threading.Thread(
                target=self._run, args=(epoch, list(fetches)), name="eplb-fetch", daemon=True
            )
            self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether no thread is at work."""
        return self._thread is None or not self._thread.is_alive()

    def poll(self) -> bool:
        """Return whether all is there.

        Raises
        ------
        MigrationFailed
            A peer refused, stayed silent or hung up.
        """
        if not self.is_idle:
            return False
        if self._error is not None:
            raise self._error
        return True

    def cancel(self) -> None:
        """Withdraw; the thread ends soon after (:attr:`is_idle`)."""
        self._cancelled.set()
        for connection, _ in list(self._connections.values()):
            # Wakes the thread out of its wait; it closes the socket.
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        """Withdraw, and wait for the thread unless it still waits for a host to answer."""
        self.cancel()
        if self._thread is not None:
            self._thread.join(WITHDRAW_S)
        if self.is_idle:
            self._hang_up()

    def _run(self, epoch: int, fetches: list[Fetch]) -> None:
        stage = HostRow()
        for fetch in fetches:
            try:
                while wait_s := self._pacer.wait_s(fetch.into.numel()):
                    if self._cancelled.wait(wait_s):
                        break
                if self._cancelled.is_set():
                    break
                self._fetch(epoch, fetch, stage)
            except Exception as error:  # noqa: BLE001  (or what was not fetched would count as there)
                if not self._cancelled.is_set():
                    self._error = _named(error, fetch)
                break
            self.done_bytes += fetch.into.numel()
        if self._cancelled.is_set() or self._error is not None:
            # A reply may be half read.
            self._hang_up()

    def _fetch(self, epoch: int, fetch: Fetch, stage: HostRow) -> None:
        connection, token = self._connect(fetch.process)
        connection.sendall(REQUEST.pack(token, epoch, fetch.layer, fetch.slot))
        answer = bytearray(1)
        if not receive_into(connection, memoryview(answer)):
            raise ConnectionResetError("it hung up")
        if bytes(answer) != GRANTED:
            raise MigrationFailed("it has ended this swap")
        view = stage.writable(fetch.into)
        if not receive_into(connection, view):
            raise ConnectionResetError("it hung up")
        stage.write(fetch.into)

    def _connect(self, process: int) -> tuple[socket.socket, bytes]:
        if process not in self._connections:
            host, port, token = self._store.get(str(process)).decode().split()
            connection = socket.create_connection((host, int(port)), self._timeout_s)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections[process] = connection, bytes.fromhex(token)
            if self._cancelled.is_set():
                # It may have hung up all connections just before there was this one.
                raise ConnectionAbortedError("withdrawn")
        return self._connections[process]

    def _hang_up(self) -> None:
        for connection, _ in self._connections.values():
            connection.close()
        self._connections.clear()


def _named(error: Exception, fetch: Fetch) -> Exception:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return error
    what = "it sent nothing in time" if isinstance(error, TimeoutError) else str(error)
    return MigrationFailed(
        f"slot {fetch.slot} of layer row {fetch.layer} could not be fetched from process "
        f"{fetch.process}: {what}; look at that process, then swap again"
    )
