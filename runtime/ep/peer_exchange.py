"""The exchange over peer memory: tokens and results are written where they are needed.

No buffer is packed, nothing is sent by a collective, and counts travel with the tokens: each
process writes rows into its region at every peer, then its counts and words, then a number that
says so. A received row says itself where its result goes, so results are written back as they are
added up. What :mod:`eplb.runtime.ep.exchange` does between nodes and on CPUs, with sums of the same
numbers in the same order.
Shape letters: T tokens, K top-k, P token-expert pairs, S slots of a process, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from eplb.errors import InvalidInput
from eplb.runtime.ep import peer_kernels
from eplb.runtime.ep.exchange import Told
from eplb.runtime.ep.kernels import as_words
from eplb.runtime.ep.mailbox import Mailbox
from eplb.runtime.ep.payload import BLOCK
from eplb.runtime.ep.peer_buffers import PeerBuffers
from eplb.runtime.ep.rows import sum_rows

__all__ = ["PeerCrossing", "add_up"]

# Of kernels that move rows: programs, warps of each and what it moves at a time. Measured on H100;
# fewer programs do not leave more room for computation beside them (docs/runtime.md).
_PROGRAMS, _WARPS, _COLUMNS = 1056, 8, 2048
# The same of the kernel that adds rows up.
_SUM_PROGRAMS, _SUM_WARPS, _SUM_COLUMNS = 2112, 4, 1024


class PeerCrossing:
    """Tokens of one batch on their way to their experts, and results on their way back.

    Call :meth:`start`, :meth:`learn` (not where sizes are padded), :meth:`pairs`,
    :meth:`give_back` and :meth:`finish` in this order.

    Parameters
    ----------
    buffers : PeerBuffers
    box : Mailbox
    told : Tensor of int64
        Of :meth:`PeerBuffers.new_told`; counts are written there.
    first_slot : int
        Of the node.
    beside : bool
        Move rows on a stream of their own.
    padded : bool
        Sizes are the largest possible, and the host learns nothing.
    """

    def __init__(
        self,
        buffers: PeerBuffers,
        box: Mailbox,
        told: torch.Tensor,
        first_slot: int,
        *,
        beside: bool,
        padded: bool,
    ) -> None:
        self._buffers, self._box, self._told = buffers, box, told
        self._first_slot, self._padded = first_slot, padded
        self._beside = beside and buffers.stream is not None
        C = buffers.num_processes
        self._most_rows = buffers.rows_per_process
        self._num_pairs = C * buffers.max_rows * buffers.top_k

    def start(
        self,
        bytes_TB: torch.Tensor,
        slot_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        words: torch.Tensor,
    ) -> None:
        """Write all tokens to where they go, then counts and ``words`` (int64 [2]).

        Raises
        ------
        InvalidInput
            More tokens than there is room for, or of another number of experts.
        """
        buffers, box = self._buffers, self._box
        T, top_k = slot_TK.shape
        if top_k != buffers.top_k:
            raise InvalidInput(
                f"tokens go to {top_k} experts, and PeerBuffers are for {buffers.top_k}; make "
                f"them with top_k={top_k}"
            )
        if buffers.max_rows < T:
            raise InvalidInput(
                f"{T} tokens in a batch, and PeerBuffers has room for {buffers.max_rows}; make it "
                "with a larger max_tokens"
            )
        self._index_TJ = torch.empty(
            T, buffers.num_returns, dtype=torch.int32, device=slot_TK.device
        )
        # Held until the results are there: another stream reads them.
        self._held = bytes_TB, slot_TK, weight_TK, words

        def launch() -> None:
            if T:
                (tokens,) = as_words(bytes_TB)
                peer_kernels.dispatch[min(T, _PROGRAMS),](
                    tokens, slot_TK, weight_TK, self._index_TJ, box.targets, box.counters,
                    box.rows_at, T, tokens.stride(0), slot_TK.stride(0), weight_TK.stride(0),
                    buffers.row_bytes, buffers.meta_bytes, self._first_slot,
                    buffers.slots_per_rank, buffers.num_parts, buffers.parts_per_process,
                    buffers.num_processes, tokens.shape[1], buffers.num_returns, top_k,
                    K=box.targets.shape[1], most=top_k, columns=_COLUMNS, num_warps=_WARPS,
                )  # fmt: skip
            self._meet(words)

        self._run(launch)
        self._is_told = None
        if slot_TK.is_cuda and not self._padded:
            self._is_told = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._is_told.record(buffers.stream if self._beside else None)

    def learn(self, what: str) -> Told:
        """Wait on the host until all peers have written, and return what they told.

        Raises
        ------
        ServingFailed
            A peer did not in time.
        """
        buffers = self._buffers
        if self._is_told is not None:
            buffers.group.wait(self._is_told, what)
        buffers.check_whole(what)
        numbers = self._told.tolist()
        self._num_pairs = numbers[2]
        self._most_rows = max(numbers[3 : 3 + buffers.num_processes])
        return buffers.told_of(numbers)

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the activations of received token-expert pairs, [P, H], and each slot's end.

        Pairs of a slot lie side by side, in no particular order. Where sizes are padded there is
        anything behind the last slot's end.
        """
        self._join()
        buffers, box = self._buffers, self._box
        payload = buffers.payload
        out_PH = torch.empty(
            self._num_pairs, payload.hidden_size, dtype=payload.dtype, device=box.rows.device
        )
        C, N, _ = box.rows.shape
        rows = box.rows.view(C * N, -1)
        meta = rows[:, buffers.meta_bytes :].view(torch.int32)
        scaled = payload.kind == "fp8"
        if scaled:
            values, scales = payload.fp8_parts(rows[:, : payload.num_bytes])
            out, width = out_PH, payload.hidden_size
        else:
            values, out = as_words(rows[:, : payload.num_bytes], out_PH.view(torch.uint8))
            scales, width = values, out.shape[1]
        if self._most_rows:
            peer_kernels.arrive[min(self._most_rows, _PROGRAMS), C](
                values, scales, meta, box.rows_C, box.cursor_S, box.index, out, N,
                values.stride(0), scales.stride(0), meta.stride(0), width, buffers.top_k,
                -(-payload.hidden_size // BLOCK), K=box.index.shape[1], most=buffers.top_k,
                columns=_COLUMNS, scaled=scaled, block=BLOCK, num_warps=_WARPS,
            )  # fmt: skip
        return out_PH, box.end_S

    def give_back(self, out_PH: torch.Tensor) -> None:
        """Write the weighted sums of each row's outputs to the processes the rows came from."""
        buffers, box = self._buffers, self._box
        C, N, _ = box.rows.shape
        meta = box.rows.view(C * N, -1)[:, buffers.meta_bytes :]
        self._held_PH = out_PH

        def launch() -> None:
            if self._most_rows:
                peer_kernels.give_back[min(self._most_rows, -(-_SUM_PROGRAMS // C)), C](
                    out_PH, meta.view(torch.int32), meta.view(torch.float32), box.rows_C,
                    box.index, box.back_at, N, meta.stride(0) // 4, out_PH.shape[1],
                    buffers.top_k, K=box.index.shape[1], most=buffers.top_k, columns=_SUM_COLUMNS,
                    num_warps=_SUM_WARPS,
                )  # fmt: skip
            self._meet(None)

        self._run(launch)

    def finish(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the sum of each token's results over its ranks, in order, [T, H]."""
        self._join()
        return sum_rows(self._box.back, self._index_TJ, dtype=dtype)

    def _meet(self, words: torch.Tensor | None) -> None:
        buffers, box, S = self._buffers, self._box, self._buffers.slots_per_process
        peer_kernels.meet[1,](
            box.counters, box.epoch if words is None else words, box.headers_at, box.headers,
            box.flags_at, box.flags, box.epoch, buffers.abort_word, self._told, box.rows_C,
            box.end_S, box.cursor_S, buffers.process, buffers.num_processes, buffers.num_parts,
            buffers.parts_per_process, S, with_counts=words is not None,
            C=triton.next_power_of_2(buffers.num_processes),
            Q=triton.next_power_of_2(buffers.parts_per_process), S=triton.next_power_of_2(S),
        )  # fmt: skip

    def _run(self, launch: Callable[[], None]) -> None:
        """Launch on the present stream, or behind what it has on the stream beside."""
        stream = self._buffers.stream
        if not self._beside:
            launch()
            return
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            launch()
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def _join(self) -> None:
        """Have the present stream wait for what was launched last."""
        if self._beside:
            torch.cuda.current_stream().wait_event(self._done)


def add_up(buffers: PeerBuffers, box: Mailbox, count_E: torch.Tensor) -> None:
    """Replace counts of experts, int64 [E], by their sum over the processes of the node."""
    peer_kernels.add_up[1,](
        count_E, box.experts_at, box.experts, box.flags_at, box.flags, box.epoch,
        buffers.abort_word, buffers.process, buffers.num_processes, buffers.num_experts,
        C=triton.next_power_of_2(buffers.num_processes),
        E=triton.next_power_of_2(buffers.num_experts),
    )  # fmt: skip
