"""The pouring of :mod:`eplb.runtime.ep.batch_split` as one Triton program: a few microseconds.

Shape letters: E logical experts, R ranks, F phases, M experts of a phase, X ranks of an expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eplb.replicas import UNIT_BITS
from eplb.runtime.ep.batch_split import SWEEPS, BatchPhases

__all__ = ["begin_of_replicas"]


# A phase: other loads of the ranks, the level of the water, what is poured, and the new loads.
@triton.jit  # type: ignore[untyped-decorator]
def _pour(  # type: ignore[no-untyped-def]
    experts, ranks, at, counts, loads, parts, begins, num_phases, num_ranks, num_members, width,
    sweeps, unit, R: tl.constexpr, M: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    rank = tl.arange(0, R)
    load = tl.load(loads + rank, mask=rank < num_ranks, other=0.0)
    member, column = tl.arange(0, M), tl.arange(0, X)
    inside = (member[:, None] < num_members) & (column[None, :] < width)
    cell = member[:, None] * width + column[None, :]
    for f in range(num_phases):
        held = tl.load(ranks + f * num_members * width + cell, mask=inside, other=-1)
        expert = tl.load(experts + f * num_members + member, mask=member < num_members, other=-1)
        count = tl.load(counts + tl.maximum(expert, 0)).to(tl.float32)
        count = tl.where(expert >= 0, count, 0.0)
        there = held >= 0
        number = tl.maximum(tl.sum(there.to(tl.float32), axis=1), 1.0)
        part = tl.where(there, (count / number)[:, None], 0.0)
        tl.store(parts + f * M * X + member[:, None] * X + column[None, :], part)
        place = tl.load(at + f * num_ranks + rank, mask=rank < num_ranks, other=-1)
        # Places are of rows of `width`; here rows are of X.
        place_x = tl.maximum(place, 0) // width * X + tl.maximum(place, 0) % width
        added = tl.gather(tl.reshape(part, (M * X,)), place_x.to(tl.int32), 0)
        load += tl.where(place >= 0, added, 0.0)
    for _ in range(sweeps):
        for f in range(num_phases):
            held = tl.load(ranks + f * num_members * width + cell, mask=inside, other=-1)
            expert = tl.load(
                experts + f * num_members + member, mask=member < num_members, other=-1
            )
            count = tl.load(counts + tl.maximum(expert, 0)).to(tl.float32)
            count = tl.where(expert >= 0, count, 0.0)
            there = held >= 0
            at_part = parts + f * M * X + member[:, None] * X + column[None, :]
            part = tl.load(at_part)
            where = tl.reshape(tl.maximum(held, 0), (M * X,)).to(tl.int32)
            other = tl.reshape(tl.gather(load, where, 0), (M, X)) - part
            other = tl.where(there, other, float("inf"))
            low = other[:, None, :] <= other[:, :, None]
            known = low & there[:, None, :]
            floor = tl.sum(tl.where(known, other[:, None, :], 0.0), axis=2)
            level = (count[:, None] + floor) / tl.sum(low.to(tl.float32), axis=2)
            level = tl.min(tl.where(there, level, float("inf")), axis=1)
            poured = tl.where(there, tl.maximum(level[:, None] - other, 0.0), 0.0)
            tl.store(at_part, poured)
            place = tl.load(at + f * num_ranks + rank, mask=rank < num_ranks, other=-1)
            place_x = tl.maximum(place, 0) // width * X + tl.maximum(place, 0) % width
            change = tl.gather(tl.reshape(poured - part, (M * X,)), place_x.to(tl.int32), 0)
            load += tl.where(place >= 0, change, 0.0)
    for f in range(num_phases):
        part = tl.load(parts + f * M * X + member[:, None] * X + column[None, :])
        whole = tl.maximum(tl.sum(part, axis=1), 1e-6).to(tl.float64)
        length = (part.to(tl.float64) / whole[:, None] * unit).to(tl.int64)
        begin = tl.minimum(tl.cumsum(length, axis=1) - length, unit - 1)
        tl.store(begins + f * num_members * width + cell, begin, mask=inside)


def begin_of_replicas(
    phases: BatchPhases, count_E: torch.Tensor, load_R1: torch.Tensor
) -> torch.Tensor:
    """Return where each replica begins on its expert's unit interval, int64 [F, M, X]."""
    num_phases, num_members, width = phases.rank_FMX.shape
    M, X = triton.next_power_of_2(num_members), triton.next_power_of_2(width)
    parts = torch.empty(num_phases, M, X, dtype=torch.float32, device=count_E.device)
    begins = torch.empty_like(phases.rank_FMX)
    _pour[1,](
        phases.expert_FM, phases.rank_FMX, phases.at_FR, count_E, load_R1, parts, begins,
        num_phases, phases.num_ranks, num_members, width, SWEEPS, 1 << UNIT_BITS,
        R=triton.next_power_of_2(phases.num_ranks), M=M, X=X, num_warps=1 if M * X <= 64 else 4,
    )  # fmt: skip
    return begins
