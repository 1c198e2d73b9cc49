"""Triton kernels of the layer on GPUs: one pass over memory where torch would take several.

:mod:`eplb.runtime.ep.rows`, :mod:`eplb.runtime.ep.payload` and :mod:`eplb.runtime.ep.experts` hold
the same functions in plain torch, for the CPU, and call these on a GPU.
Shape letters: N, M rows, T tokens, J rows of a token, B bytes, H hidden size, G blocks, I inner.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eplb.runtime.ep.payload import BLOCK, FP8_MAX

__all__ = [
    "as_words",
    "decode_fp8",
    "encode_fp8",
    "gated_silu",
    "gather_rows",
    "mark_unsound",
    "sum_rows",
]

_COLUMNS = 1024
# The widest words first; rows of bytes are copied in the widest that they divide into.
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_BLOCKS_AT_ONCE = 8


def as_words(*rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return rows of bytes as rows of the widest words that all of them divide into."""
    places = [
        place for part in rows for place in (part.shape[1], part.stride(0), part.storage_offset())
    ]
    word = next(w for w in _WORDS if all(place % w.itemsize == 0 for place in places))
    return tuple(part.view(word) for part in rows)


@triton.jit  # type: ignore[untyped-decorator]
def _gather_rows(  # type: ignore[no-untyped-def]
    rows, index, out, row_stride, out_stride, width,
    columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    source = tl.load(index + row)
    value = tl.load(rows + source * row_stride + column, mask=column < width)
    tl.store(out + row * out_stride + column, value, mask=column < width)


def gather_rows(rows_NB: torch.Tensor, index_M: torch.Tensor, out_MB: torch.Tensor) -> None:
    """Write ``rows_NB[index_M]`` to ``out_MB``."""
    num_rows = len(out_MB)
    if not num_rows:
        return
    rows, out = as_words(rows_NB, out_MB)
    _gather_rows[num_rows, triton.cdiv(out.shape[1], _COLUMNS)](
        rows, index_M, out, rows.stride(0), out.stride(0), out.shape[1], columns=_COLUMNS
    )


@triton.jit  # type: ignore[untyped-decorator]
def _sum_rows(  # type: ignore[no-untyped-def]
    rows, index, weight, out, row_stride, index_stride,
    weight_stride, hidden, num_parts: tl.constexpr, weighted: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = column < hidden
    total = tl.zeros([columns], dtype=tl.float32)
    for part in tl.static_range(num_parts):
        row = tl.load(index + token * index_stride + part)
        value = tl.load(rows + row * row_stride + column, mask=inside & (row >= 0), other=0.0)
        value = value.to(tl.float32)
        if weighted:
            value *= tl.load(weight + token * weight_stride + part)
        # Weights of places without a row may be anything.
        total += tl.where(row >= 0, value, 0.0)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=inside)


def sum_rows(
    rows_NH: torch.Tensor,
    index_TJ: torch.Tensor,
    weight_TJ: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the sum of each token's rows, times their weights, [T, H]."""
    num_tokens, num_parts = index_TJ.shape
    hidden = rows_NH.shape[1]
    out_TH = torch.empty(num_tokens, hidden, dtype=dtype, device=rows_NH.device)
    if num_tokens:
        _sum_rows[num_tokens, triton.cdiv(hidden, _COLUMNS)](
            rows_NH, index_TJ, index_TJ if weight_TJ is None else weight_TJ, out_TH,
            rows_NH.stride(0), index_TJ.stride(0),
            0 if weight_TJ is None else weight_TJ.stride(0), hidden,
            num_parts=num_parts, weighted=weight_TJ is not None, columns=_COLUMNS,
        )  # fmt: skip
    return out_TH


@triton.jit  # type: ignore[untyped-decorator]
def _gated_silu(gate_up, out, inner, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = column < inner
    gate = tl.load(gate_up + row * 2 * inner + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + column, mask=inside).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * inner + column, value.to(out.dtype.element_ty), mask=inside)


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(g) * u`` of rows ``[g, u]``, shape [P, I]."""
    gate_up = gate_up.contiguous()
    num_rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, inner)
    if num_rows:
        _gated_silu[num_rows, triton.cdiv(inner, _COLUMNS)](gate_up, out, inner, columns=_COLUMNS)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _encode_fp8(  # type: ignore[no-untyped-def]
    x, out, scales, x_stride, out_stride, scale_stride, hidden,
    blocks, largest: tl.constexpr, at_once: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * at_once + tl.arange(0, at_once)
    column = block[:, None] * width + tl.arange(0, width)[None, :]
    inside = column < hidden
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), axis=1), 1e-30) / largest
    scaled = (value / scale[:, None]).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + column, scaled, mask=inside)
    tl.store(scales + row * scale_stride + block, scale, mask=block < blocks)


def encode_fp8(x_NH: torch.Tensor, values_NH: torch.Tensor, scale_NG: torch.Tensor) -> None:
    """Write FP8 values and a scale for each block of 128."""
    num_rows, blocks = scale_NG.shape
    _encode_fp8[num_rows, triton.cdiv(blocks, _BLOCKS_AT_ONCE)](
        x_NH, values_NH, scale_NG, x_NH.stride(0), values_NH.stride(0), scale_NG.stride(0),
        x_NH.shape[1], blocks, largest=FP8_MAX, at_once=_BLOCKS_AT_ONCE, width=BLOCK,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _decode_fp8(  # type: ignore[no-untyped-def]
    values, scales, out, value_stride, scale_stride, hidden,
    blocks, at_once: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * at_once + tl.arange(0, at_once)
    column = block[:, None] * width + tl.arange(0, width)[None, :]
    inside = column < hidden
    scale = tl.load(scales + row * scale_stride + block, mask=block < blocks, other=0.0)
    value = tl.load(values + row * value_stride + column, mask=inside, other=0.0).to(tl.float32)
    value *= scale[:, None]
    tl.store(out + row * hidden + column, value.to(out.dtype.element_ty), mask=inside)


def decode_fp8(values_NH: torch.Tensor, scale_NG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return FP8 values times their scales, [N, H]."""
    (num_rows, hidden), blocks = values_NH.shape, scale_NG.shape[1]
    out_NH = torch.empty(num_rows, hidden, dtype=dtype, device=values_NH.device)
    _decode_fp8[num_rows, triton.cdiv(blocks, _BLOCKS_AT_ONCE)](
        values_NH, scale_NG, out_NH, values_NH.stride(0), scale_NG.stride(0), hidden, blocks,
        at_once=_BLOCKS_AT_ONCE, width=BLOCK,
    )  # fmt: skip
    return out_NH


@triton.jit  # type: ignore[untyped-decorator]
def _mark_unsound(x, fault, number, process, B: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    value = tl.load(x + at, mask=at < number, other=0.0).to(tl.float32)
    # Zero, unless the value is infinite or not a number.
    if tl.sum((value - value == 0.0).to(tl.int32)) < B:
        tl.atomic_min(fault, process)


def mark_unsound(x: torch.Tensor, fault: torch.Tensor, process: int) -> None:
    """Lower ``fault``, int64, to this process' number if a value is not finite."""
    if x.numel():
        grid = (triton.cdiv(x.numel(), 4 * _COLUMNS),)
        _mark_unsound[grid](x, fault, x.numel(), process, B=4 * _COLUMNS)
