"""What a process needs to move rows: spare rows, a lane, a server, a fetcher, a board."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.distributed_c10d import PrefixStore

from eplb.arrays import IntArray
from eplb.errors import EplbError
from eplb.runtime.batch_work import BatchWork, SwapLayer
from eplb.runtime.ep.agreement import gather_sound
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.peer_memory import PeerMemory
from eplb.runtime.hosts import check_hosts, own_host
from eplb.runtime.lane import Pacer, SideLane
from eplb.runtime.proposal import ProposalBoard
from eplb.runtime.row_fetch import RowFetcher
from eplb.runtime.row_server import RowServer
from eplb.runtime.spare_rows import SpareRows

__all__ = ["Equipment"]


@dataclass(frozen=True, slots=True)
class Equipment:
    """Made by :meth:`connect`, given up by :meth:`close`.

    Parameters
    ----------
    work : BatchWork
    board : ProposalBoard
    server : RowServer
    memory : PeerMemory
    """

    work: BatchWork
    board: ProposalBoard
    server: RowServer
    memory: PeerMemory

    @classmethod
    def connect(
        cls,
        group: EPGroup,
        layers: Sequence[SwapLayer],
        checksum_LE: IntArray,
        find_row: Callable[[int, int, int], torch.Tensor | None],
        *,
        spare_rows: int,
        bytes_per_s: float | None,
        timeout_s: float,
        host: str | None,
    ) -> Equipment:
        """Make everything, and learn where the others' servers are. Collective.

        Parameters
        ----------
        find_row
            See :class:`~eplb.runtime.row_server.RowServer`.
        timeout_s : float
            How long a peer that is fetched from may send nothing.
        host : str, optional
            Address under which other processes reach this one; found out where left out.

        Raises
        ------
        InvalidInput
            Some process' machine does not have its address, or others cannot reach it there.
        """
        row_bytes = layers[0].slots.layout.row_bytes
        memory = PeerMemory(group)
        spare = SpareRows(spare_rows, row_bytes, memory.allocate)
        host = host or own_host()
        servers: list[RowServer] = []

        def own() -> str:
            servers.append(RowServer(find_row, host))
            return f"{secrets.token_hex(8)} {host}"

        try:
            told = [text.split() for text in gather_sound(group, own)]
            check_hosts([host for _, host in told])
        except EplbError:
            for server in servers:
                server.close()
            raise
        server = servers[0]
        # What others have left in the group's store is none of this one's.
        store = PrefixStore(told[0][0], group.store)
        addresses = PrefixStore("address", store)
        addresses.set(str(group.process), server.address)
        pacer = Pacer(bytes_per_s, row_bytes)
        work = BatchWork(
            layers, group.process, layers[0].slots.num_slots, spare, memory,
            SideLane(group.device, pacer), RowFetcher(addresses, pacer, timeout_s), checksum_LE,
        )  # fmt: skip
        for layer in layers:
            layer.after_dispatch = work.lane.pump
        group.barrier()
        return cls(work, ProposalBoard(store, group.process, group.num_processes), server, memory)

    def close(self) -> None:
        """Let go of layers, threads, sockets and memory."""
        for layer in self.work.layers:
            layer.after_dispatch = None
        self.work.fetcher.close()
        self.server.close()
        self.memory.close()
