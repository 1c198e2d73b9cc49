"""Memory for the exchange over peer memory: made once, shared by all layers of a process.

Every process of a node has a region for each of the others, of fixed size, so nobody needs to know
counts before writing. What one exchange uses is a :class:`~eplb.runtime.ep.mailbox.Mailbox`; two
batches under way at a time need two. Layers use mailboxes one after the other: a process writes to
its peers again only when all have told that they are done with what they got
(:mod:`eplb.runtime.ep.peer_exchange`).
Shape letters: C processes, S slots of a process, N rows from a process, T tokens, J rows that
return for a token, H hidden size, B bytes, E logical experts.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from eplb.errors import InvalidInput, ServingFailed
from eplb.runtime.ep.exchange import NO_FAULT, Told
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.mailbox import Mailbox
from eplb.runtime.ep.payload import Payload
from eplb.runtime.ep.peer_memory import PeerMemory
from eplb.runtime.ep.tables import PlacementTables

if TYPE_CHECKING:
    from eplb.runtime.ep.peer_exchange import PeerCrossing

__all__ = ["PeerBuffers"]

_ALIGNMENT_BYTES = 256
# Rows begin at multiples of this, for wide stores.
_ROW_ALIGNMENT_BYTES = 16


class PeerBuffers:
    """Where the processes of a node write tokens and results to each other. Collective.

    Parameters
    ----------
    group : EPGroup
        Of GPUs that can reach each other's memory: all of one node, or of several nodes if it was
        made with ``nodes=True``; between nodes rows then go through collectives.
    max_tokens : int
        Most tokens of a process in one forward.
    hidden_size, top_k, slots_per_rank, num_experts : int
        Of all layers that use it.
    payload : str
        What activations travel as.
    micro_batches : int
        How many batches are under way at a time.

    Attributes
    ----------
    mailboxes : list of Mailbox
    max_rows : int
        Tokens that may come from one process of the node.

    Raises
    ------
    InvalidInput
        Some process' memory cannot be written to, or a size is none.
    """

    def __init__(
        self,
        group: EPGroup,
        *,
        max_tokens: int,
        hidden_size: int,
        top_k: int,
        slots_per_rank: int,
        num_experts: int,
        payload: str = "bf16",
        micro_batches: int = 1,
    ) -> None:
        sizes = {"max_tokens": max_tokens, "top_k": top_k, "slots_per_rank": slots_per_rank}
        for name, size in sizes.items():
            if size < 1:
                raise InvalidInput(f"{name} ({size}) must be at least 1")
        self.group, self.top_k, self.slots_per_rank = group, top_k, slots_per_rank
        self.num_experts = num_experts
        self.payload = Payload(payload, hidden_size)
        self.max_tokens = max_tokens
        by_node = group.num_nodes > 1
        inner = group.node_group if by_node else group.process_group
        if inner is None:
            raise InvalidInput(
                "peer memory is a node's; make an EPGroup of several nodes with nodes=True"
            )
        self.process = dist.get_rank(inner)
        self.num_processes = dist.get_world_size(inner)
        self.parts_per_process = group.ranks_per_process
        self.num_parts = self.num_processes * self.parts_per_process
        self.slots_per_process = self.parts_per_process * slots_per_rank
        # Across nodes come, to the process at the sender's place, tokens of every node.
        batch = -(-max_tokens // micro_batches)
        self.max_rows = batch * (group.num_nodes if by_node else 1)
        self.meta_bytes = _aligned(self.payload.num_bytes, _ROW_ALIGNMENT_BYTES)
        self.row_bytes = _aligned(self.meta_bytes + 4 * (2 * top_k + 1), _ROW_ALIGNMENT_BYTES)
        self.abort_word = _on_host(torch.zeros(1, dtype=torch.int32), group.device)
        self._memories: list[PeerMemory] = []
        self.mailboxes = [self._mailbox() for _ in range(micro_batches)]
        self.stream = (
            torch.cuda.Stream(group.device)  # type: ignore[no-untyped-call]
            if group.device.type == "cuda"
            else None
        )
        group.on_abort.append(self.abort)
        # Nobody writes before all are ready.
        group.barrier()

    def new_told(self) -> torch.Tensor:
        """Return memory on the host for what a batch's counts say, int64 [3 + C + 2 * Q].

        See :func:`eplb.runtime.ep.peer_kernels.meet`.
        """
        told = torch.zeros(3 + self.num_processes + 2 * self.parts_per_process, dtype=torch.int64)
        told[1] = NO_FAULT
        return _on_host(told, self.group.device)

    def check_layer(self, payload: Payload, tables: PlacementTables, micro_batches: int) -> None:
        """Raise unless a layer fits.

        Raises
        ------
        InvalidInput
        """
        own = {
            "hidden_size": self.payload.hidden_size, "payload": self.payload.kind,
            "slots_per_rank": self.slots_per_rank, "num_experts": self.num_experts,
            "micro_batches": len(self.mailboxes),
        }  # fmt: skip
        its = {
            "hidden_size": payload.hidden_size, "payload": payload.kind,
            "slots_per_rank": tables.slots_per_rank, "num_experts": tables.num_experts,
            "micro_batches": micro_batches,
        }  # fmt: skip
        for name, value in its.items():
            if own[name] != value:
                raise InvalidInput(
                    f"the layer's {name} is {value} and the PeerBuffers' {own[name]}; make them "
                    "for each other"
                )

    def crossing(
        self, number: int, told: torch.Tensor, first_slot: int, *, beside: bool, padded: bool
    ) -> PeerCrossing:
        """Return a crossing of a batch through one of the mailboxes."""
        from eplb.runtime.ep import peer_exchange  # noqa: PLC0415  (Triton is there with GPUs only)

        return peer_exchange.PeerCrossing(
            self, self.mailboxes[number], told, first_slot, beside=beside, padded=padded
        )

    def add_up(self, number: int, count_E: torch.Tensor) -> None:
        """Replace counts of experts, int64 [E], by their sum over the processes of the node."""
        from eplb.runtime.ep import peer_exchange  # noqa: PLC0415

        peer_exchange.add_up(self, self.mailboxes[number], count_E)

    def read_told(self, told: list[torch.Tensor], what: str) -> list[Told]:
        """Wait on the host for all that has been launched, and return what counts say.

        Raises
        ------
        ServingFailed
            A peer stayed away.
        """
        if self.group.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self.group.wait(event, what)
        self.check_whole(what)
        return [self.told_of(one.tolist()) for one in told]

    def told_of(self, numbers: list[int]) -> Told:
        """Return what a batch's counts say, from the numbers of :meth:`new_told`."""
        Q = self.parts_per_process
        return Told((numbers[0], numbers[1]), numbers[-2 * Q : -Q], numbers[-Q:])

    def check_whole(self, what: str) -> None:
        """Raise if waits for peers have been ended, so that what arrived may be anything.

        Raises
        ------
        ServingFailed
        """
        if self.abort_word.item():
            raise ServingFailed(
                f"{what}: a peer stayed away before, and this group waits for nobody any more; "
                "restart it without what stalled"
            )

    def abort(self) -> None:
        """Have all waits for peers on the device end; nothing received after it is of use."""
        self.abort_word.fill_(1)

    def close(self) -> None:
        """Let go of the peers' memory. No exchange may be under way."""
        if self.abort in self.group.on_abort:
            self.group.on_abort.remove(self.abort)
        for memory in self._memories:
            memory.close()
        self.mailboxes = []

    @property
    def num_returns(self) -> int:
        """Rows that can return for a token: one from each part that it went to."""
        return min(self.top_k, self.num_parts)

    @property
    def rows_per_process(self) -> int:
        """Rows that one process may send to another."""
        return self.max_rows * min(self.top_k, self.parts_per_process)

    def _mailbox(self) -> Mailbox:
        C, S, device = self.num_processes, self.slots_per_process, self.group.device
        hidden, dtype = self.payload.hidden_size, self.payload.dtype
        shared: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "rows": ((C, self.rows_per_process, self.row_bytes), torch.uint8),
            "back": ((self.max_rows * self.num_returns, hidden), dtype),
            "headers": ((2, C, self.parts_per_process + S + 2), torch.int64),
            "experts": ((2, C, self.num_experts), torch.int64),
            "flags": ((C,), torch.int64),
        }
        begins: dict[str, int] = {}
        size = 0
        for name, (shape, kind) in shared.items():
            begins[name] = size
            size += _aligned(prod(shape) * kind.itemsize, _ALIGNMENT_BYTES)
        memory = PeerMemory(self.group)
        self._memories.append(memory)
        own = memory.allocate((1, size))[0]
        at = self._addresses(memory, own)
        # This process' region in a peer's rows, and its flag there.
        region = self.process * self.rows_per_process * self.row_bytes
        within = {"rows": region, "flags": 8 * self.process}

        def there(name: str) -> torch.Tensor:
            begin = begins[name] + within.get(name, 0)
            return torch.tensor([a + begin for a in at], dtype=torch.int64, device=device)

        def small(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        places = 1 << (self.top_k - 1).bit_length()
        return Mailbox(
            **{
                name: own[begins[name] :][: prod(shape) * kind.itemsize].view(kind).view(shape)
                for name, (shape, kind) in shared.items()
            },
            **{f"{name}_at": there(name) for name in shared},
            epoch=small(1, dtype=torch.int64),
            counters=small(C + self.num_parts + C * S),
            targets=small(self.max_rows, places, dtype=torch.int64),
            index=small(C * self.rows_per_process, places),
            rows_C=small(C),
            end_S=small(S),
            cursor_S=small(S),
        )

    def _addresses(self, memory: PeerMemory, own: torch.Tensor) -> list[int]:
        """Return where the allocation of each process of the node is, as this process sees it."""
        found = []
        first = self.group.process - self.process
        for number in range(self.num_processes):
            view = own if number == self.process else memory.rows_of(first + number)
            if view is None:
                raise InvalidInput(
                    f"process {self.group.process} cannot write to the memory of process "
                    f"{first + number}; peer memory needs GPUs of one host that reach each other: "
                    "leave PeerBuffers out (--exchange collectives)"
                )
            found.append(view.data_ptr())
        return found


def _on_host(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return it where the host and, if it is a GPU, the device can read and write it."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
