"""One all-to-all with exact sizes, there and back: a token crosses once to each part it needs.

A *part* is what a row is sent to: a rank, or in the first hop of an exchange by node, a node. A row
carries the token's activations as bytes, and which slots of the part it is for with what weights.
Behind the rows come their sums, which are added up in the order of parts.
Sizes are first exchanged as counts, together with two words of which every process learns the
minimum; the host reads it all with one copy, which is where it waits for its peers.
Shape letters: T tokens, K top-k, P parts, C processes, N rows, B bytes, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.places import pack_rows, place_rows
from eplb.runtime.ep.rows import gather_rows, sum_rows

__all__ = ["NO_FAULT", "NUM_WORDS", "Crossing", "Hop", "Received", "Told", "sort_by_slot"]

# Rows of bytes start at multiples of this, for wide loads and views of any type.
ROW_ALIGNMENT_BYTES = 16
NUM_WORDS = 2
# The second word of a process without a fault; one with a fault says its number.
NO_FAULT = torch.iinfo(torch.int64).max


@dataclass(frozen=True, slots=True)
class Hop:
    """Between which processes rows go, and which slots are of which part.

    Parameters
    ----------
    process_group : ProcessGroup
    first_slot : int
        Of the first part.
    slots_per_part, num_parts : int
        Parts divide evenly over the processes, in order.
    """

    process_group: dist.ProcessGroup
    first_slot: int
    slots_per_part: int
    num_parts: int

    @property
    def parts_per_process(self) -> int:
        """Parts that a process receives for."""
        return self.num_parts // dist.get_world_size(self.process_group)


@dataclass(frozen=True, slots=True)
class Received:
    """Rows that arrived, in order of their source process and, of one, of part and token.

    Parameters
    ----------
    bytes_NB : Tensor of uint8
    slot_NK : Tensor of int32
        Slots that the row is for, -1 for none.
    weight_NK : Tensor of float32
    num_pairs : int
        How many slots are named in all.
    """

    bytes_NB: torch.Tensor
    slot_NK: torch.Tensor
    weight_NK: torch.Tensor
    num_pairs: int


@dataclass(frozen=True, slots=True)
class Told:
    """What counts say of a batch.

    Parameters
    ----------
    words : tuple of int
        The minimum over processes of each word.
    rows, pairs : list of int
        Tokens and token-expert pairs that each of the own parts gets.
    """

    words: tuple[int, ...]
    rows: list[int]
    pairs: list[int]


def sort_by_slot(
    received: Received, first_slot: int, num_slots: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the bytes of received token-expert pairs, slot after slot; nothing waits.

    Parameters
    ----------
    received : Received
    first_slot, num_slots : int
        Of this process.

    Returns
    -------
    bytes_PB : Tensor of uint8
    end_S : Tensor of int32
        Where each slot's pairs end.
    index_NK : Tensor of int64
        The pair of each row and slot, -1 for none.
    """
    slot_NK = received.slot_NK
    num_rows, top_k = slot_NK.shape
    local_NK = torch.where(slot_NK >= 0, slot_NK - first_slot, num_slots)
    # Few bits are sorted fast.
    small = torch.int16 if num_slots < 1 << 15 else torch.int32
    sorted_P, order_P = torch.sort(local_NK.flatten().to(small), stable=True)
    place_NK = torch.empty_like(order_P).scatter_(
        0, order_P, torch.arange(len(order_P), device=order_P.device)
    )
    index_NK = torch.where(slot_NK >= 0, place_NK.view(num_rows, top_k), -1)
    bytes_PB = received.bytes_NB.new_empty(received.num_pairs, received.bytes_NB.shape[1])
    gather_rows(received.bytes_NB, order_P[: received.num_pairs] // top_k, bytes_PB)
    edges = torch.arange(num_slots, dtype=small, device=sorted_P.device)
    end_S = torch.searchsorted(sorted_P, edges, right=True, out_int32=True)
    return bytes_PB, end_S, index_NK


class Crossing:
    """Rows of one batch on their way through a hop and back.

    Call :meth:`count`, :meth:`learn`, :meth:`post`, :meth:`receive`, :meth:`post_back` and
    :meth:`finish` in this order; ``count``, ``post`` and ``post_back`` start what the next call
    waits for.

    Attributes
    ----------
    told : Told
        After ``learn``.
    send_rows, receive_rows : list of int
        After ``learn``: rows to and from each process.
    received_NB : Tensor of uint8
        After ``post``: what the rows are received in.
    """

    def __init__(self, group: EPGroup, hop: Hop, what: str) -> None:
        self._group, self._hop, self._what = group, hop, what
        self.told = Told((), [], [])
        self.send_rows: list[int] = []
        self.receive_rows: list[int] = []
        self._work: dist.Work | None = None

    def count(self, slot_TK: torch.Tensor, weight_TK: torch.Tensor, words: torch.Tensor) -> None:
        """Say how many rows go where; ``words`` is int64 [NUM_WORDS] on the device."""
        hop = self._hop
        P, per_process = hop.num_parts, hop.parts_per_process
        C = P // per_process
        self._places = place_rows(slot_TK, hop.first_slot, hop.slots_per_part, P)
        self._slot_TK, self._weight_TK = slot_TK, weight_TK
        counts_CX = torch.cat(
            [
                self._places.rows_P.view(C, per_process),
                self._places.pairs_P.view(C, per_process),
                words.expand(C, NUM_WORDS),
            ],
            dim=1,
        )
        received_CX = torch.empty_like(counts_CX)
        with self._group.watched(f"counts of {self._what}"):
            self._work = dist.all_to_all_single(
                received_CX, counts_CX, group=hop.process_group, async_op=True
            )
        self._counts = counts_CX, received_CX

    def learn(self) -> None:
        """Wait for the counts, on the host."""
        per_process = self._hop.parts_per_process
        sent_CX, received_CX = self._read_counts()
        self.send_rows = sent_CX[:, :per_process].sum(1).tolist()
        self.receive_rows = received_CX[:, :per_process].sum(1).tolist()
        total_X = received_CX.sum(0).tolist()
        self.told = Told(
            words=tuple(received_CX[:, 2 * per_process :].amin(0).tolist()),
            rows=total_X[:per_process],
            pairs=total_X[per_process : 2 * per_process],
        )

    def post(self, bytes_TB: torch.Tensor) -> None:
        """Start the rows on their way."""
        sent_NB = self._pack(bytes_TB, sum(self.send_rows))
        self._num_bytes = bytes_TB.shape[1]
        self.received_NB = sent_NB.new_empty(sum(self.receive_rows), sent_NB.shape[1])
        self._start(self.received_NB, sent_NB, self.receive_rows, self.send_rows, "dispatch")

    def receive(self) -> Received:
        """Return the rows once they are there (on a GPU: before what is launched next)."""
        self._finish_work("dispatch")
        K, size = self._slot_TK.shape[1], self._num_bytes
        meta = _aligned(size)
        rows_NB = self.received_NB
        return Received(
            bytes_NB=rows_NB[:, :size],
            slot_NK=rows_NB[:, meta : meta + 4 * K].view(torch.int32),
            weight_NK=rows_NB[:, meta + 4 * K : meta + 8 * K].view(torch.float32),
            num_pairs=sum(self.told.pairs),
        )

    def post_back(self, sums_NH: torch.Tensor) -> None:
        """Start the results of the received rows on their way back."""
        self._returned_NH = sums_NH.new_empty(sum(self.send_rows), sums_NH.shape[1])
        self._start(self._returned_NH, sums_NH, self.send_rows, self.receive_rows, "combine")

    def finish(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the sum of each token's results over its parts, in order, [T, H]."""
        self._finish_work("combine")
        return sum_rows(self._returned_NH, self._places.index_TK, dtype=dtype)

    def _read_counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        what = f"counts of {self._what}"
        self._finish_work("counts")
        both = torch.stack(self._counts)
        if both.is_cuda:
            host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            host.copy_(both, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._group.wait(event, what)
            both = host
        return both[0], both[1]

    def _pack(self, bytes_TB: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Return rows to send, in order of part and token: activations, slots, weights."""
        top_k, size = self._slot_TK.shape[1], bytes_TB.shape[1]
        meta = _aligned(size)
        rows_NB = bytes_TB.new_empty(num_rows, meta + _aligned(8 * top_k))
        pack_rows(
            self._places, bytes_TB, self._slot_TK, self._weight_TK,
            rows_NB[:, :size],
            rows_NB[:, meta : meta + 4 * top_k].view(torch.int32),
            rows_NB[:, meta + 4 * top_k : meta + 8 * top_k].view(torch.float32),
        )  # fmt: skip
        return rows_NB

    def _start(
        self,
        output: torch.Tensor,
        input_: torch.Tensor,
        output_rows: list[int],
        input_rows: list[int],
        what: str,
    ) -> None:
        with self._group.watched(f"{what} of {self._what}"):
            self._work = dist.all_to_all_single(
                output, input_, output_rows, input_rows,
                group=self._hop.process_group, async_op=True,
            )  # fmt: skip

    def _finish_work(self, what: str) -> None:
        work, self._work = self._work, None
        assert work is not None, "called out of order"
        with self._group.watched(f"{what} of {self._what}"):
            work.wait()


def _aligned(size: int) -> int:
    return -(-size // ROW_ALIGNMENT_BYTES) * ROW_ALIGNMENT_BYTES
