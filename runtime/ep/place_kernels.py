"""Triton kernels of :mod:`eplb.runtime.ep.places`.

Shape letters: T tokens, K top-k, P parts, N rows, B bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eplb.runtime.ep.kernels import as_words
from eplb.runtime.ep.places import Places

__all__ = ["pack_rows", "place_rows"]

_TOKENS = 32
_COLUMNS = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _first_of_parts(part, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether no earlier slot of the token is of the same part, [tokens, K]."""
    place = tl.arange(0, K)
    same = part[:, :, None] == part[:, None, :]
    earlier = place[None, None, :] < place[None, :, None]
    return tl.sum((same & earlier).to(tl.int32), axis=2) == 0


@triton.jit  # type: ignore[untyped-decorator]
def _mark(  # type: ignore[no-untyped-def]
    slots, parts, needed, pairs, num_tokens, top_k, slot_stride, first_slot, slots_per_part,
    num_parts, B: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    token, place = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, K)
    inside = (token[:, None] < num_tokens) & (place[None, :] < top_k)
    slot = tl.load(slots + token[:, None] * slot_stride + place[None, :], mask=inside, other=-1)
    part = tl.where(slot >= 0, (slot - first_slot) // slots_per_part, num_parts).to(tl.int32)
    tl.store(parts + token[:, None] * top_k + place[None, :], part, mask=inside)
    wanted = _first_of_parts(part, K) & (part < num_parts)
    tl.store(needed + part * num_tokens + token[:, None], 1, mask=wanted)
    number = tl.histogram(tl.reshape(part, (B * K,)), P)
    bins = tl.arange(0, P)
    tl.atomic_add(pairs + bins, number.to(tl.int64), mask=bins < num_parts)


@triton.jit  # type: ignore[untyped-decorator]
def _place(  # type: ignore[no-untyped-def]
    parts, ends, order, index, num_tokens, top_k, num_parts, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    token, place = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, K)
    inside = (token[:, None] < num_tokens) & (place[None, :] < top_k)
    at = token[:, None] * top_k + place[None, :]
    part = tl.load(parts + at, mask=inside, other=num_parts)
    wanted = _first_of_parts(part, K) & (part < num_parts)
    row = tl.load(ends + part * num_tokens + token[:, None], mask=wanted, other=0) - 1
    lower = wanted[:, None, :] & (part[:, None, :] < part[:, :, None])
    rank = tl.sum(lower.to(tl.int32), axis=2)
    tl.store(index + token[:, None] * top_k + rank, row, mask=wanted)
    tl.store(order + token[:, None] * top_k + rank, part, mask=wanted)


def place_rows(
    slot_TK: torch.Tensor, first_slot: int, slots_per_part: int, num_parts: int
) -> Places:
    """Find the rows of a batch."""
    (T, top_k), P, device = slot_TK.shape, num_parts, slot_TK.device
    part_TK = torch.empty(T, top_k, dtype=torch.int32, device=device)
    order_TK = torch.full_like(part_TK, P)
    index_TK = torch.full((T, top_k), -1, dtype=torch.int64, device=device)
    # One memory for both, so that it is cleared once.
    cleared = torch.zeros(P * T + 2 * P, dtype=torch.int32, device=device)
    pairs_P, needed_PT = cleared[: 2 * P].view(torch.int64), cleared[2 * P :]
    if T == 0:
        return Places(part_TK, order_TK, index_TK, torch.zeros_like(pairs_P), pairs_P)
    grid, K = (triton.cdiv(T, _TOKENS),), triton.next_power_of_2(top_k)
    _mark[grid](
        slot_TK, part_TK, needed_PT, pairs_P, T, top_k, slot_TK.stride(0), first_slot,
        slots_per_part, P, B=_TOKENS, K=K, P=triton.next_power_of_2(P + 1),
    )  # fmt: skip
    end_PT = needed_PT.cumsum(0, dtype=torch.int64)
    _place[grid](part_TK, end_PT, order_TK, index_TK, T, top_k, P, B=_TOKENS, K=K)
    last_P = end_PT.view(P, T)[:, -1]
    rows_P = last_P.diff(prepend=last_P.new_zeros(1))
    return Places(part_TK, order_TK, index_TK, rows_P, pairs_P)


@triton.jit  # type: ignore[untyped-decorator]
def _pack(  # type: ignore[no-untyped-def]
    tokens, slots, weights, parts, order, index, out, out_slots, out_weights, width,
    token_stride, slot_stride, weight_stride, out_stride, out_slot_stride, out_weight_stride,
    top_k: tl.constexpr, K: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    inside = column < width
    value = tl.load(tokens + token * token_stride + column, mask=inside)
    for k in tl.static_range(top_k):
        row = tl.load(index + token * top_k + k)
        tl.store(out + row * out_stride + column, value, mask=inside & (row >= 0))
    if tl.program_id(1) == 0:
        place = tl.arange(0, K)
        there = place < top_k
        slot = tl.load(slots + token * slot_stride + place, mask=there, other=-1)
        part = tl.load(parts + token * top_k + place, mask=there, other=-1)
        weight = tl.load(weights + token * weight_stride + place, mask=there, other=0.0)
        for k in tl.static_range(top_k):
            row = tl.load(index + token * top_k + k)
            sent = there & (row >= 0)
            kept = tl.where(part == tl.load(order + token * top_k + k), slot, -1).to(tl.int32)
            tl.store(out_slots + row * out_slot_stride + place, kept, mask=sent)
            tl.store(out_weights + row * out_weight_stride + place, weight, mask=sent)


def pack_rows(
    places: Places,
    bytes_TB: torch.Tensor,
    slot_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    bytes_NB: torch.Tensor,
    slot_NK: torch.Tensor,
    weight_NK: torch.Tensor,
) -> None:
    """Write every row of a batch."""
    num_tokens, top_k = slot_TK.shape
    if not num_tokens or not len(bytes_NB):
        return
    tokens, out = as_words(bytes_TB, bytes_NB)
    _pack[num_tokens, triton.cdiv(out.shape[1], _COLUMNS)](
        tokens, slot_TK, weight_TK, places.part_TK, places.order_TK, places.index_TK, out, slot_NK,
        weight_NK, out.shape[1], tokens.stride(0), slot_TK.stride(0), weight_TK.stride(0),
        out.stride(0), slot_NK.stride(0), weight_NK.stride(0),
        top_k=top_k, K=triton.next_power_of_2(top_k), columns=_COLUMNS,
    )  # fmt: skip
