"""Keeps the experts that some tokens of each step chose in all layers, on the device.

Which tokens is decided by a low-discrepancy sequence and not by a random generator: the model's
own random numbers stay what they were, and captured graphs choose anew at each replay.
Shape letters: L layers, T tokens, K top-k, N samples of a step, B rows of the buffer.
"""

from __future__ import annotations

import torch

__all__ = ["Sampler"]

# Multiples of the golden ratio's fractional part are spread evenly modulo 1 (Weyl).
GOLDEN = 0.6180339887498949
BUFFER_TOKENS = 1024


class Sampler:
    """A ring of sampled tokens, the newest of a window.

    Parameters
    ----------
    num_samples : int
        Tokens of each step, N.
    num_layers, top_k, num_experts : int
    device : torch.device
    """

    def __init__(
        self, num_samples: int, num_layers: int, top_k: int, num_experts: int, device: torch.device
    ) -> None:
        self._num_samples = num_samples
        self._num_experts = num_experts
        self._capacity = BUFFER_TOKENS // num_samples * num_samples
        with torch.inference_mode(False):
            self._routings_BLK = torch.full(
                (self._capacity, num_layers, top_k), -1, dtype=torch.int16, device=device
            )
            self._rows_N = torch.arange(num_samples, device=device)
            self._fraction_N = (self._rows_N.double() * GOLDEN) % 1
        for tensor in (self._routings_BLK, self._rows_N, self._fraction_N):
            torch._dynamo.mark_static_address(tensor)

    def add(self, layer_idx: int, ids_TK: torch.Tensor, weight_TK: torch.Tensor | None) -> None:
        """Keep this step's samples of one layer; masked tokens and what is no expert as -1."""
        if ids_TK.shape[0] == 0 or ids_TK.shape[1] != self._routings_BLK.shape[2]:
            return
        at_N = (self._fraction_N * ids_TK.shape[0]).long()
        ids_NK = ids_TK[at_N]
        real = (ids_NK >= 0) & (ids_NK < self._num_experts)
        if weight_TK is not None:
            real &= weight_TK[at_N] != 0
        ids_NK = torch.where(real, ids_NK, -1).to(torch.int16)
        self._routings_BLK[:, layer_idx].index_copy_(0, self._rows_N, ids_NK)

    def advance(self) -> None:
        """Go on to other tokens and other rows for the next step."""
        self._rows_N.add_(self._num_samples).remainder_(self._capacity)
        self._fraction_N.add_(self._num_samples * GOLDEN).remainder_(1)

    def take(self) -> torch.Tensor:
        """Return the samples since the last call, shape [B, L, K]; rows of -1 hold none."""
        routings_BLK = self._routings_BLK.clone()
        self._routings_BLK.fill_(-1)
        return routings_BLK

    @property
    def device_bytes(self) -> int:
        """Memory held on the device."""
        return 2 * self._routings_BLK.numel() + 16 * self._num_samples
