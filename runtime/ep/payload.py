"""What a token's activations travel as: BF16, FP8 with scales, or FP32, as rows of bytes.

FP8 is E4M3 with one float32 scale for each 128 values, as DeepSeek-V3 dispatches (DeepSeek-V3
technical report, arXiv:2412.19437, section 3.3: tiles of 1 x 128, scale = largest value / 448).
Shape letters: N tokens, H hidden size, B bytes, G blocks of 128 values.
"""

from __future__ import annotations

import torch

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
            # Scales are float32 and want to lie at multiples of their size.
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
        hidden, scales_at = self.hidden_size, -(-self.hidden_size // 4) * 4
        bytes_NB = torch.empty(len(x_NH), self.num_bytes, dtype=torch.uint8, device=x_NH.device)
        blocks_NGB = torch.nn.functional.pad(x_NH.float(), (0, -hidden % BLOCK)).unflatten(
            1, (-1, BLOCK)
        )
        scale_NG = blocks_NGB.abs().amax(dim=2).clamp_(min=1e-30) / FP8_MAX
        scaled = (blocks_NGB / scale_NG[:, :, None]).flatten(1)[:, :hidden]
        bytes_NB[:, :hidden] = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        bytes_NB[:, scales_at:].view(torch.float32).copy_(scale_NG)
        return bytes_NB

    def decode(self, bytes_NB: torch.Tensor) -> torch.Tensor:
        """Return the tokens that bytes stand for, [N, H] of ``dtype``."""
        if not len(bytes_NB):
            return torch.empty(0, self.hidden_size, dtype=self.dtype, device=bytes_NB.device)
        if self.kind != "fp8":
            return bytes_NB.view(self.dtype)
        hidden, scales_at = self.hidden_size, -(-self.hidden_size // 4) * 4
        values_NH = bytes_NB[:, :hidden].view(torch.float8_e4m3fn).float()
        scale_NG = bytes_NB[:, scales_at:].contiguous().view(torch.float32)
        blocks = torch.nn.functional.pad(values_NH, (0, -hidden % BLOCK)).unflatten(1, (-1, BLOCK))
        return (blocks * scale_NG[:, :, None]).flatten(1)[:, :hidden].to(self.dtype)
