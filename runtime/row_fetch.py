"""Rows fetched from other processes over TCP: between nodes, and on CPUs.

Each process serves its slots from threads of their own and fetches what it needs on another, from
and into pinned memory where the device is a GPU. It is no collective: nothing on the device or in
a process group waits for it, so it cannot deadlock with serving's exchanges, and unlike a receive
of gloo, which cannot be withdrawn without losing the group, a fetch ends when its socket is closed.
The request says which swap it is for, and a source that has rolled that back refuses.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

from eplb.errors import InvalidInput, MigrationFailed
from eplb.runtime.lane import Pacer

__all__ = ["Fetch", "RowFetcher", "RowServer", "check_hosts", "no_address", "own_host"]

_REQUEST = struct.Struct("<16sqqq")
_GRANTED, _REFUSED = b"\1", b"\0"
# How long who connects may take to show that it is of the group; a peer asks at once.
STRANGER_S = 10.0
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


def own_host() -> str:
    """Return the address under which the group's first machine, MASTER_ADDR, sees this one."""
    toward = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: connecting a datagram socket only chooses a route.
            probe.connect((toward, 9))
        except OSError:
            return "127.0.0.1"
        host: str = probe.getsockname()[0]
        return host


def no_address(host: str, error: OSError) -> InvalidInput:
    """Return the error for an address that nothing can be opened at."""
    return InvalidInput(
        f"host {host!r} cannot be listened at ({error.strerror or error}); give host= an address "
        "of this machine, or leave it out"
    )


def check_hosts(hosts: Sequence[str]) -> None:
    """Raise where processes would look for another machine's on their own.

    A machine whose name is a loopback address in its own /etc/hosts finds that for itself.

    Raises
    ------
    InvalidInput
        Some addresses are of the loopback interface, and others are not.
    """
    local = [p for p, host in enumerate(hosts) if host.startswith("127.") or host == "localhost"]
    if 0 < len(local) < len(hosts):
        raise InvalidInput(
            f"process{'es' * (len(local) > 1)} {', '.join(map(str, local))} can be reached at "
            f"{hosts[local[0]]} only, which other machines take for themselves; give host= the "
            "address in their network, or make MASTER_ADDR an address and not a name"
        )


class _Handler(socketserver.BaseRequestHandler):
    """Serves one peer until it hangs up."""

    server: _Server

    def handle(self) -> None:
        connection: socket.socket = self.request
        stage = _HostRow()
        request = bytearray(_REQUEST.size)
        connection.settimeout(STRANGER_S)
        try:
            while _receive_into(connection, memoryview(request)):
                token, epoch, layer, slot = _REQUEST.unpack(request)
                if not secrets.compare_digest(token, self.server.token):
                    return
                connection.settimeout(None)
                row = self.server.find_row(epoch, layer, slot)
                if row is None:
                    connection.sendall(_REFUSED)
                else:
                    view = stage.read(row)
                    connection.sendall(_GRANTED)
                    connection.sendall(view)
        except OSError:
            # The peer withdrew; it knows why.
            return


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self, host: str, token: bytes, find_row: Callable[[int, int, int], torch.Tensor | None]
    ) -> None:
        self.token = token
        self.find_row = find_row
        self._open: set[socket.socket] = set()
        super().__init__((host, 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection on a thread of its own."""
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection that has been served."""
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Have all threads that serve a connection end; otherwise they do so with their peers."""
        for connection in self._open.copy():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class RowServer:
    """Serves this process' slots to its peers.

    Parameters
    ----------
    find_row : callable
        From the epoch of a swap, the row of a layer and the slot in it to the row of bytes; None
        where that swap is not moving rows here. It is called on other threads.
    host : str

    Raises
    ------
    InvalidInput
        This machine does not have the address.
    """

    def __init__(self, find_row: Callable[[int, int, int], torch.Tensor | None], host: str) -> None:
        self._token = secrets.token_bytes(16)
        try:
            self._server = _Server(host, self._token, find_row)
        except OSError as error:
            raise no_address(host, error) from None
        # How often it looks whether it is to end.
        poll_s = 0.05
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(poll_s,), name="eplb-rows", daemon=True
        )
        self._thread.start()

    @property
    def address(self) -> str:
        """What a peer needs to know, as text."""
        host, port = self._server.server_address[:2]
        return f"{host!s} {port} {self._token.hex()}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        self._thread.join()


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
        stage = _HostRow()
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

    def _fetch(self, epoch: int, fetch: Fetch, stage: _HostRow) -> None:
        connection, token = self._connect(fetch.process)
        connection.sendall(_REQUEST.pack(token, epoch, fetch.layer, fetch.slot))
        answer = bytearray(1)
        if not _receive_into(connection, memoryview(answer)):
            raise ConnectionResetError("it hung up")
        if bytes(answer) != _GRANTED:
            raise MigrationFailed("it has ended this swap")
        view = stage.writable(fetch.into)
        if not _receive_into(connection, view):
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


class _HostRow:
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


def _bytes_of(row: torch.Tensor) -> memoryview:
    array: Any = row.numpy()
    return memoryview(array)


def _receive_into(connection: socket.socket, view: memoryview) -> bool:
    """Fill a buffer; False where the peer hung up."""
    view = view.cast("B")
    while view:
        received = connection.recv_into(view)
        if not received:
            return False
        view = view[received:]
    return True


def _named(error: Exception, fetch: Fetch) -> Exception:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return error
    what = "it sent nothing in time" if isinstance(error, TimeoutError) else str(error)
    return MigrationFailed(
        f"slot {fetch.slot} of layer row {fetch.layer} could not be fetched from process "
        f"{fetch.process}: {what}; look at that process, then swap again"
    )
