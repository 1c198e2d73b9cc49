"""What a token's activations travel as: BF16, FP8 with scales, or FP32, as rows of bytes.

FP8 is E4M3 with one float32 scale for each 128 values, as DeepSeek-V3 dispatches (DeepSeek-V3
technical report, arXiv:2412.19437, section 3.3: tiles of 1 x 128, scale = largest value / 448).
Shape letters: N tokens, H hidden size, B bytes, G blocks of 128 values.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from eplb.errors import unknown_name

__all__ = ["BLOCK", "PAYLOADS", "Payload"]

BLOCK = 128
FP8_MAX = 448.0
PAYLOADS = ("fp32", "bf16", "fp8")
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


class Payload:
    """How activations of one width are written to bytes and read back.

    Parameters
    ----------
    kind : str
        ``fp32``, ``bf16`` or ``fp8``.
    hidden_size : int

    Attributes
    ----------
    num_bytes : int
        Of a token.
    dtype : dtype
        What they are read back as, and what experts' outputs travel as.

    Raises
    ------
    InvalidInput
        The kind is unknown.
    """

    def __init__(self, kind: str, hidden_size: int) -> None:
        if kind not in PAYLOADS:
            raise unknown_name("payload", kind, PAYLOADS)
        self.kind = kind
        self.hidden_size = hidden_size
        self.dtype = _TYPES[kind]
        blocks = -(-hidden_size // BLOCK)
        self.num_bytes = (
            -(-hidden_size // 4) * 4 + 4 * blocks
            if kind == "fp8"
            else hidden_size * self.dtype.itemsize
        )

    def encode(self, x_NH: torch.Tensor) -> torch.Tensor:
        """Return the bytes of tokens, uint8 [N, B]."""
        if not len(x_NH):
            # Strides of tensors without elements do not allow views of another type.
            return torch.empty(0, self.num_bytes, dtype=torch.uint8, device=x_NH.device)
        if self.kind != "fp8":
            return x_NH.to(self.dtype).contiguous().view(torch.uint8)
        bytes_NB = torch.empty(len(x_NH), self.num_bytes, dtype=torch.uint8, device=x_NH.device)
        values_NH, scale_NG = self.fp8_parts(bytes_NB)
        if x_NH.is_cuda:
            from eplb.runtime.ep import kernels  # noqa: PLC0415  (Triton is there with GPUs only)

            kernels.encode_fp8(x_NH.contiguous(), values_NH, scale_NG)
            return bytes_NB
        blocks_NGB = self._blocks(x_NH.float())
        scale_NG.copy_(blocks_NGB.abs().amax(dim=2).clamp_(min=1e-30) / FP8_MAX)
        scaled_NH = (blocks_NGB / scale_NG[:, :, None]).flatten(1)[:, : self.hidden_size]
        values_NH.copy_(scaled_NH.to(torch.float8_e4m3fn))
        return bytes_NB

    def decode(self, bytes_NB: torch.Tensor) -> torch.Tensor:
        """Return the tokens that bytes stand for, [N, H] of ``dtype``."""
        if not len(bytes_NB):
            return torch.empty(0, self.hidden_size, dtype=self.dtype, device=bytes_NB.device)
        if self.kind != "fp8":
            return bytes_NB.view(self.dtype)
        values_NH, scale_NG = self.fp8_parts(bytes_NB)
        if bytes_NB.is_cuda:
            from eplb.runtime.ep import kernels  # noqa: PLC0415

            return kernels.decode_fp8(values_NH, scale_NG, self.dtype)
        scaled_NGB = self._blocks(values_NH.float()) * scale_NG[:, :, None]
        return scaled_NGB.flatten(1)[:, : self.hidden_size].to(self.dtype)

    def fp8_parts(self, bytes_NB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return FP8 values [N, H] and scales [N, G] in rows of bytes, as views."""
        # Scales are float32 and lie at multiples of their size.
        scales_at = -(-self.hidden_size // 4) * 4
        values_NH = bytes_NB[:, : self.hidden_size].view(torch.float8_e4m3fn)
        return values_NH, bytes_NB[:, scales_at:].view(torch.float32)

    def _blocks(self, values_NH: torch.Tensor) -> torch.Tensor:
        """Return values in blocks of 128, the last one filled up with zeros, [N, G, 128]."""
        padded = functional.pad(values_NH, (0, -self.hidden_size % BLOCK))
        return padded.view(len(values_NH), -1, BLOCK)
