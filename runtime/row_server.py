"""A process' slots, served to its peers over TCP (:mod:`eplb.runtime.row_fetch` asks for them)."""

from __future__ import annotations

import contextlib
import secrets
import socket
import socketserver
import threading
from collections.abc import Callable
from typing import Any

import torch

from eplb.runtime.hosts import no_address
from eplb.runtime.row_wire import GRANTED, REFUSED, REQUEST, HostRow, receive_into

__all__ = ["RowServer"]

# How long who connects may take to show that it is of the group; a peer asks at once.
STRANGER_S = 10.0


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


class _Handler(socketserver.BaseRequestHandler):
    """Serves one peer until it hangs up."""

    server: _Server

    def handle(self) -> None:
        connection: socket.socket = self.request
        stage = HostRow()
        request = bytearray(REQUEST.size)
        connection.settimeout(STRANGER_S)
        try:
            while receive_into(connection, memoryview(request)):
                token, epoch, layer, slot = REQUEST.unpack(request)
                if not secrets.compare_digest(token, self.server.token):
                    return
                connection.settimeout(None)
                row = self.server.find_row(epoch, layer, slot)
                if row is None:
                    connection.sendall(REFUSED)
                else:
                    view = stage.read(row)
                    connection.sendall(GRANTED)
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
