"""Triton kernels of the choice of replicas (:mod:`eplb.runtime.ep.tables`).

Shape letters: E logical experts, V ranks of this process, T tokens, K top-k, P = T x K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eplb.replicas import STEP_STRIDE, UNIT_BITS, step_offset

__all__ = ["choose_slots"]

_PAIRS = 256


@triton.jit  # type: ignore[untyped-decorator]
def _keys(  # type: ignore[no-untyped-def]
    topk, keys, num_tokens, top_k, stride, num_experts, num_sources, B: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) * B + tl.arange(0, B)
    inside = pair < num_tokens * top_k
    token = pair // top_k
    expert = tl.load(topk + token.to(tl.int64) * stride + pair % top_k, mask=inside, other=-1)
    source = token.to(tl.int64) * num_sources // num_tokens
    key = tl.where(expert < 0, num_sources * num_experts, expert + source * num_experts)
    tl.store(keys + pair, key.to(keys.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _choose(  # type: ignore[no-untyped-def]
    sorted_keys, order, firsts, bounds, slots, offsets, out, num_pairs, num_experts, num_sources,
    width, num_bounds, step, stride: tl.constexpr, step_is_there: tl.constexpr, bits: tl.constexpr,
    depth: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) * B + tl.arange(0, B)
    inside = pair < num_pairs
    none = num_sources * num_experts
    key = tl.load(sorted_keys + pair, mask=inside, other=0).to(tl.int64)
    first = tl.load(firsts + key, mask=inside, other=0)
    count = tl.maximum(tl.load(firsts + key + 1, mask=inside, other=1) - first, 1)
    routed = inside & (key < none)
    offset = tl.load(offsets + key // num_experts * width + key % num_experts, mask=routed, other=0)
    if step_is_there:
        step = tl.load(step) * stride
    shift = (offset + step) & ((1 << bits) - 1)
    place = (((pair - first).to(tl.int64) << bits) + shift) // count
    wanted = (key << bits) + place
    # The last bound that is not above: halves of the table, down to one.
    low = tl.zeros([B], tl.int64)
    high = low + num_bounds
    for _ in range(depth):
        middle = (low + high) // 2
        above = tl.load(bounds + middle, mask=routed & (middle < high), other=0) > wanted
        low = tl.where(above | (middle >= high), low, middle)
        high = tl.where(above, middle, high)
    slot = tl.load(slots + low, mask=routed, other=-1)
    at = tl.load(order + pair, mask=inside, other=0)
    tl.store(out + at, slot, mask=inside)


def choose_slots(
    topk_TK: torch.Tensor,
    block: torch.Tensor,
    edges: torch.Tensor,
    num_experts: int,
    step: int | torch.Tensor,
) -> torch.Tensor:
    """Return the slot of each token for each of its experts, int64 [T, K].

    Parameters
    ----------
    topk_TK : Tensor of int
    block : Tensor of int64, shape [3, V, ...]
        Of the tables.
    edges : Tensor of int, shape [V * E + 2]
        0, 1, 2 and so on.
    num_experts : int
    step : int or Tensor of int64, shape [1]
    """
    (T, top_k), (_, V, width) = topk_TK.shape, block.shape
    P, num_bounds = T * top_k, V * width
    out_TK = torch.empty(T, top_k, dtype=torch.int64, device=topk_TK.device)
    if not P:
        return out_TK
    grid = (triton.cdiv(P, _PAIRS),)
    now, is_there = (step, True) if isinstance(step, torch.Tensor) else (step_offset(step), False)
    key_P = torch.empty(P, dtype=edges.dtype, device=topk_TK.device)
    _keys[grid](topk_TK, key_P, T, top_k, topk_TK.stride(0), num_experts, V, B=_PAIRS)
    sorted_P, order_P = torch.sort(key_P, stable=True)
    first_E = torch.searchsorted(sorted_P, edges)
    _choose[grid](
        sorted_P, order_P, first_E, block[0], block[1], block[2], out_TK, P, num_experts, V, width,
        num_bounds, now, stride=STEP_STRIDE,
        step_is_there=is_there, bits=UNIT_BITS, depth=num_bounds.bit_length(), B=_PAIRS,
    )  # fmt: skip
    return out_TK
