"""Counts on the device: fixed buffers that only grow, and snapshots of them drained to the host.

The other half, which makes windows of snapshots, is in :mod:`eplb.profiles.recorder_writer`.

Counters are never set back. A window is the difference of two snapshots, so a snapshot is one copy
with nothing to order it against: captured graphs keep adding to the same addresses, a snapshot
that has to be left out only makes the next window longer, and 32 bits may wrap around, because
differences are taken modulo 2**32.

The thread that waits for snapshots makes no call to CUDA, not even to ask for an event: any call
that may wait breaks a graph capture that another thread has under way. Behind each snapshot a
number is copied to pinned memory, and the thread looks at that.
Shape letters: P phases, L layers, E logical experts, C columns, T tokens, K top-k.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["DEVICE_BYTES", "Counters", "Pending"]

# 16 buffers of 58 layers x 256 experts are 0.95 MB; what snapshots may take on the device.
DEVICE_BYTES = 1 << 20
POLL_S, PATIENCE_S = 0.002, 600


@dataclass(frozen=True, slots=True)
class Pending:
    """A snapshot on its way to host buffer ``slot``, which holds it once its word is ``number``."""

    slot: int
    number: int


class Counters:
    """Token-expert pairs by phase, layer and expert, counted without waiting for the device.

    Parameters
    ----------
    num_phases, num_layers, num_experts : int
    num_columns : int
        Expert ids that may occur, at least ``num_experts``: ids from ``num_experts`` on (identity
        experts, ids of other ranks) are counted apart and not recorded. Two columns are added:
        one for ids beyond, one for negative ids, which mean "not routed".
    device : torch.device
    """

    def __init__(
        self,
        num_phases: int,
        num_layers: int,
        num_experts: int,
        num_columns: int,
        device: torch.device,
    ) -> None:
        self.num_experts = num_experts
        self.num_columns = num_columns
        self.device = device
        shape = (num_phases, num_layers, num_columns + 2)
        num_bytes = 4 * num_phases * num_layers * (num_columns + 2)
        num_slots = max(2, min(15, DEVICE_BYTES // num_bytes - 1))
        # Buffers made under inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.counts_PLC = torch.zeros(shape, dtype=torch.int32, device=device)
            self._one = torch.ones(1, dtype=torch.int32, device=device)
            pinned = device.type == "cuda"
            self._ring = torch.zeros((num_slots, *shape), dtype=torch.int32, device=device)
            self._host = torch.zeros((num_slots, *shape), dtype=torch.int32, pin_memory=pinned)
        # Graphs may be captured around these tensors: torch.compile must not copy them.
        torch._dynamo.mark_static_address(self.counts_PLC)
        self._rows = [list(layers.unbind(0)) for layers in self.counts_PLC.unbind(0)]
        self._flat = [layers.reshape(-1) for layers in self.counts_PLC.unbind(0)]
        with torch.inference_mode(False):
            row = num_columns + 2
            self._offset_L11 = (torch.arange(num_layers, device=device) * row).view(-1, 1, 1)
        self._stream = torch.cuda.Stream(device) if pinned else None  # type: ignore[no-untyped-call]
        with torch.inference_mode(False):
            # A word a buffer: buffers are in use until their word was seen.
            self._numbers = torch.zeros(num_slots, dtype=torch.int32, device=device)
            self._arrived = torch.zeros(num_slots, dtype=torch.int32, pin_memory=pinned)
        self._snapshots = 0
        self._extra: list[torch.Tensor] = []
        self._in_use: dict[int, torch.Tensor] = {}
        self._free = deque(range(num_slots))
        self._lock = threading.Lock()

    def add(
        self,
        phase_idx: int,
        layer_idx: int,
        ids_TK: torch.Tensor,
        weight_TK: torch.Tensor | None,
        *,
        checked: bool,
    ) -> None:
        """Count the choices of some tokens: one kernel where the ids are known to be in range.

        Parameters
        ----------
        phase_idx, layer_idx : int
        ids_TK : Tensor of int, shape [T, K]
        weight_TK : Tensor of int32, shape [T, K], optional
            0 for a token that is padding, 1 for others.
        checked : bool
            Whether every id is within ``0:num_columns``, as those a router took by top-k are.
        """
        ids = ids_TK.reshape(-1)
        if not checked:
            # -1 and below go to the last column, ids beyond the columns to the one before it.
            ids = ids.clamp(-1, self.num_columns).remainder(self.num_columns + 2)
        ones = self._one.expand(ids.shape[0]) if weight_TK is None else weight_TK.reshape(-1)
        if torch.compiler.is_compiling():
            # Views that live outside of a compiled graph would come in as aliased inputs.
            row_C = self.counts_PLC[phase_idx, layer_idx]
        else:
            row_C = self._rows[phase_idx][layer_idx]
        row_C.index_add_(0, ids, ones)

    def add_layers(
        self,
        phase_idx: int,
        first: int,
        ids: list[torch.Tensor],
        weight_TK: torch.Tensor | None,
    ) -> None:
        """Count the choices of layers in a row at once, in a few kernels for all of them.

        Parameters
        ----------
        phase_idx : int
        first : int
            Index of the first layer.
        ids : list of Tensor of int64, each of shape [T, K]
            Of that layer and those behind it; every id within ``0:num_columns``.
        weight_TK : Tensor of int32, shape [T, K], optional
            0 for padding.
        """
        at = (torch.stack(ids) + self._offset_L11[first : first + len(ids)]).reshape(-1)
        if weight_TK is None:
            ones = self._one.expand(at.shape[0])
        else:
            ones = weight_TK.expand(len(ids), *weight_TK.shape).reshape(-1)
        self._flat[phase_idx].index_add_(0, at, ones)

    def snapshot(self, extra: torch.Tensor | None = None) -> Pending | None:
        """Start draining the counts as the current stream will have them.

        Parameters
        ----------
        extra : Tensor, optional
            Drained with them; always of one shape, and not written again.

        Returns
        -------
        pending : Pending, optional
            None where all buffers are still on their way.
        """
        with self._lock:
            if not self._free:
                return None
            slot = self._free.popleft()
        if extra is not None:
            self._in_use[slot] = extra
        if extra is not None and not self._extra:
            pinned = self._stream is not None
            self._extra = [torch.empty_like(extra, device="cpu", pin_memory=pinned)
                           for _ in range(len(self._host))]  # fmt: skip
        # Modulo 2**31: the number is compared for equality only.
        self._snapshots = (self._snapshots + 1) % (1 << 31)
        self._numbers[slot].fill_(self._snapshots)
        if self._stream is None:
            self._drain(slot, self.counts_PLC, extra)
        else:
            self._ring[slot].copy_(self.counts_PLC)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                self._drain(slot, self._ring[slot], extra)
        return Pending(slot, self._snapshots)

    def _drain(self, slot: int, counts_PLC: torch.Tensor, extra: torch.Tensor | None) -> None:
        self._host[slot].copy_(counts_PLC, non_blocking=True)
        if extra is not None:
            self._extra[slot].copy_(extra, non_blocking=True)
        self._arrived[slot].copy_(self._numbers[slot], non_blocking=True)

    def take(self, pending: Pending) -> tuple[NDArray[np.uint32], NDArray[np.int16] | None]:
        """Wait for a snapshot, on a thread that may, and return counts [P, L, C] and the extra.

        Raises
        ------
        TimeoutError
            It does not come: the device has failed, or has far more queued than any step takes.
        """
        arrived, start = self._arrived.numpy(), time.monotonic()
        while arrived[pending.slot] != pending.number:
            if time.monotonic() - start > PATIENCE_S:
                raise TimeoutError(f"no counts from {self.device} for {PATIENCE_S} s")
            time.sleep(POLL_S)
        counts_PLC = self._host[pending.slot].numpy().view(np.uint32).copy()
        extra = self._extra[pending.slot].numpy().copy() if self._extra else None
        self._in_use.pop(pending.slot, None)
        with self._lock:
            self._free.append(pending.slot)
        return counts_PLC, extra

    @property
    def device_bytes(self) -> int:
        """Memory held on the device."""
        return int(4 * (self.counts_PLC.numel() + self._ring.numel() + 1))
