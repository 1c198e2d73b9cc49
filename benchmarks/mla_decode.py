"""MLA decode attention in plain Triton: what the cost of a KV token in decode is measured with.

Absorbed form: queries [B, H, 576] against latent vectors [B, L, 576], whose first 512 values are
the values as well. The context is split over programs, whose results are joined afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["mla_decode"]


# fmt: off
@triton.jit  # type: ignore[untyped-decorator]
def _split(Q, KV, OUT, LSE, length, scale, splits,  # type: ignore[no-untyped-def]
           H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    # fmt: on
    batch, head, part = tl.program_id(0), tl.program_id(1) * BLOCK_H, tl.program_id(2)
    per_part = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    begin = part * per_part
    end = tl.minimum(begin + per_part, length)
    rows, wide, rope = tl.arange(0, BLOCK_H), tl.arange(0, 512), tl.arange(0, 64)
    query = Q + (batch * H + head + rows)[:, None] * 576
    q = tl.load(query + wide[None, :])
    q_rope = tl.load(query + 512 + rope[None, :])
    most = tl.full([BLOCK_H], -1e30, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    out = tl.zeros([BLOCK_H, 512], tl.float32)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        inside = at < end
        row = KV + (batch.to(tl.int64) * length + at)[:, None] * 576
        kv = tl.load(row + wide[None, :], mask=inside[:, None], other=0.0)
        kv_rope = tl.load(row + 512 + rope[None, :], mask=inside[:, None], other=0.0)
        score = tl.dot(q, tl.trans(kv)) + tl.dot(q_rope, tl.trans(kv_rope))
        score = tl.where(inside[None, :], score * scale, -1e30)
        higher = tl.maximum(most, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(weight, 1)
        out = out * shrink[:, None] + tl.dot(weight.to(kv.dtype), kv)
        most = higher
    place = (batch * splits + part) * H + head + rows
    tl.store(OUT + place[:, None] * 512 + wide[None, :], out / tl.maximum(total, 1e-30)[:, None])
    tl.store(LSE + place, most + tl.log2(tl.maximum(total, 1e-30)))


def mla_decode(q: Any, kv: Any, *, splits: int, block_h: int, block_n: int, warps: int,
               stages: int) -> Any:  # fmt: skip
    """Return attention outputs [B, H, 512] in float32."""
    batch, heads, width = q.shape
    out = torch.empty(batch, splits, heads, 512, device=q.device, dtype=torch.float32)
    lse = torch.empty(batch, splits, heads, device=q.device, dtype=torch.float32)
    # Scores in powers of two: exp2 is what the hardware has. 192 is the width before absorption.
    scale = 1.4426950408889634 / 192**0.5
    _split[(batch, heads // block_h, splits)](
        q, kv, out, lse, kv.shape[1], scale, splits, H=heads, BLOCK_H=block_h, BLOCK_N=block_n,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    assert width == 576
    weight = torch.softmax(lse * 0.6931471805599453, dim=1)
    return (out * weight[..., None]).sum(dim=1)
