"""The ``batch`` rule while serving: each step's tokens divide over replicas as is best for it.

All ranks know the step's counts of experts and find the same fractions from them, by exact
coordinate descent on the sum of squared rank loads, whose minimum also has the smallest maximum: in
turns each replicated expert's tokens are poured anew over its ranks, like water over a floor of the
ranks' other loads. Experts that share no rank make a *phase* and are poured at once.
The exact optimum, for evaluation, is :mod:`eplb.batch_split`.
Shape letters: E logical experts, S slots, R ranks, F phases, M experts of a phase, X ranks of an
expert, V ranks of this process.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from eplb.arrays import IntArray
from eplb.replicas import UNIT_BITS

__all__ = ["SWEEPS", "BatchPhases", "begin_of_replicas", "first_on_rank"]

# Each expert is poured this often. Where replicas join all ranks in a long chain, which searched
# placements do not, 0.1% of the largest load is lost to the optimum, and at most 1%.
SWEEPS = 20


@dataclass(frozen=True, slots=True, eq=False)
class BatchPhases:
    """Replicated experts of a placement, in phases, on the device; padding is -1.

    Parameters
    ----------
    expert_FM : Tensor of int64
        Logical expert.
    rank_FMX : Tensor of int64
        Rank of each of its replicas; one replica a rank.
    at_FR : Tensor of int64
        For each rank which of the phase's M x X replicas it has.
    place_FMX : Tensor of int64
        Where the replica is in the slots' tables (:class:`eplb.replicas.ReplicaBounds`).
    single_E : Tensor of int64
        The rank of an expert that is on one rank only, R for the others.
    num_ranks : int
    """

    expert_FM: torch.Tensor
    rank_FMX: torch.Tensor
    at_FR: torch.Tensor
    place_FMX: torch.Tensor
    single_E: torch.Tensor
    num_ranks: int

    @classmethod
    def of_slots(
        cls,
        phys_to_log_S: IntArray,
        slot_X: IntArray,
        num_experts: int,
        slots_per_rank: int,
        device: torch.device,
    ) -> BatchPhases:
        """Divide a layer's replicated experts into phases.

        ``slot_X`` are the slots in use, in order of expert; of an expert one on a rank.
        """
        num_ranks = len(phys_to_log_S) // slots_per_rank
        expert_X, rank_X = phys_to_log_S[slot_X], slot_X // slots_per_rank
        first_E = np.searchsorted(expert_X, np.arange(num_experts + 1))
        count_E = np.diff(first_E)
        single_E = np.where(count_E == 1, rank_X[first_E[:-1]], num_ranks)
        # Experts of many ranks first: they are the hardest to fit into a phase.
        phases: list[list[int]] = []
        taken: list[set[int]] = []
        for expert in sorted(np.flatnonzero(count_E > 1).tolist(), key=lambda e: -count_E[e]):
            ranks = set(rank_X[first_E[expert] : first_E[expert + 1]].tolist())
            phase = next((f for f, busy in enumerate(taken) if not busy & ranks), len(phases))
            if phase == len(phases):
                phases.append([])
                taken.append(set())
            phases[phase].append(expert)
            taken[phase] |= ranks
        M = max(map(len, phases), default=1)
        X = int(count_E.max())
        expert_FM = np.full((len(phases), M), -1)
        rank_FMX = np.full((len(phases), M, X), -1)
        place_FMX = np.full((len(phases), M, X), -1)
        at_FR = np.full((len(phases), num_ranks), -1)
        for f, experts in enumerate(phases):
            for m, expert in enumerate(experts):
                places = np.arange(first_E[expert], first_E[expert + 1])
                expert_FM[f, m] = expert
                rank_FMX[f, m, : len(places)] = rank_X[places]
                place_FMX[f, m, : len(places)] = places
                at_FR[f, rank_X[places]] = m * X + np.arange(len(places))

        def there(array: IntArray) -> torch.Tensor:
            return torch.from_numpy(array).to(device, torch.int64)

        return cls(
            expert_FM=there(expert_FM),
            rank_FMX=there(rank_FMX),
            at_FR=there(at_FR),
            place_FMX=there(place_FMX),
            single_E=there(single_E),
            num_ranks=num_ranks,
        )


def first_on_rank(phys_to_log_S: IntArray, num_experts: int, slots_per_rank: int) -> IntArray:
    """Return for each slot 1 where it is the first of its expert on its rank, else 0."""
    rank_S = np.arange(len(phys_to_log_S)) // slots_per_rank
    _, first = np.unique(rank_S * (num_experts + 1) + phys_to_log_S, return_index=True)
    chosen = np.zeros(len(phys_to_log_S), dtype=np.int64)
    chosen[first] = 1
    return np.where(phys_to_log_S >= 0, chosen, 0)


def begin_of_replicas(phases: BatchPhases, count_E: torch.Tensor) -> torch.Tensor:
    """Return where each replica begins on its expert's unit interval, int64 [F, M, X].

    Parameters
    ----------
    phases : BatchPhases
    count_E : Tensor of int64
        Tokens of each expert in the step, over all ranks.
    """
    load_R1 = torch.zeros(phases.num_ranks + 1, dtype=torch.float32, device=count_E.device)
    load_R1.scatter_add_(0, phases.single_E, count_E.float())
    if not len(phases.expert_FM):
        return torch.zeros_like(phases.rank_FMX)
    if count_E.is_cuda:
        from eplb.runtime.ep import batch_kernel  # noqa: PLC0415  (Triton is there with GPUs only)

        return batch_kernel.begin_of_replicas(phases, count_E, load_R1)
    return _begin(phases, count_E, load_R1[:-1])


def _begin(phases: BatchPhases, count_E: torch.Tensor, load_R: torch.Tensor) -> torch.Tensor:
    """Pour in plain torch, on the CPU, which is the meaning of the kernel."""
    there_FMX = phases.rank_FMX >= 0
    rank_FMX = phases.rank_FMX.clamp(min=0)
    count_FM = torch.where(phases.expert_FM >= 0, count_E[phases.expert_FM.clamp(min=0)], 0).float()
    part_FMX = there_FMX * (count_FM / there_FMX.sum(dim=2).clamp(min=1))[:, :, None]
    load_R = load_R.index_add(0, rank_FMX.flatten(), part_FMX.flatten())
    for _ in range(SWEEPS):
        for f in range(len(rank_FMX)):
            other_MX = torch.where(there_FMX[f], load_R[rank_FMX[f]] - part_FMX[f], torch.inf)
            # The level over the k lowest ranks is (tokens + their loads) / k; the lowest level is
            # that of the ranks which the water reaches.
            low_MXX = other_MX[:, None, :] <= other_MX[:, :, None]
            sum_MX = torch.where(low_MXX & there_FMX[f][:, None, :], other_MX[:, None, :], 0).sum(2)
            level_MX = (count_FM[f, :, None] + sum_MX) / low_MXX.sum(2)
            level_M = torch.where(there_FMX[f], level_MX, torch.inf).amin(1)
            poured_MX = torch.where(there_FMX[f], (level_M[:, None] - other_MX).clamp(min=0), 0)
            load_R = load_R.index_add(0, rank_FMX[f].flatten(), (poured_MX - part_FMX[f]).flatten())
            part_FMX[f] = poured_MX
    return _as_begin(part_FMX)


def _as_begin(part_FMX: torch.Tensor) -> torch.Tensor:
    whole_FM1 = part_FMX.sum(2, keepdim=True).clamp(min=1e-6)
    # Whole numbers before they are added up, so that they increase.
    length_FMX = (part_FMX.double() / whole_FM1.double() * (1 << UNIT_BITS)).long()
    return (length_FMX.cumsum(2) - length_FMX).clamp(max=(1 << UNIT_BITS) - 1)
