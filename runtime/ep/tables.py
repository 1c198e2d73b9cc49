"""The placement of one layer as its processes use it, on the device.

:class:`PlacementTables` are made from a plan beside the running layer; putting them in force is
one copy into a block of memory that stays where it is.
Shape letters: E logical experts, S slots, V ranks of this process, T tokens, K top-k, P = T x K.
"""

from __future__ import annotations

import numpy as np
import torch

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput, PlacementInvalid
from eplb.plan import Plan
from eplb.replicas import (
    UNIT_BITS,
    replica_bounds,
    source_share,
    step_offset,
    token_offset,
)
from eplb.runtime.ep.agreement import check_plan_of_group
from eplb.runtime.ep.batch_split import BatchPhases, begin_of_replicas, first_on_rank
from eplb.runtime.ep.group import EPGroup

__all__ = ["PlacementTables", "count_experts"]

_UNIT = 1 << UNIT_BITS


class PlacementTables:
    """Which slot each token goes to, for the ranks of this process.

    Made by :meth:`of_plan`. All there is on the device is ``block``, int64 [3, V * S or more]:
    bounds of replicas (:mod:`eplb.replicas`), their slots, and offsets of tokens.

    Attributes
    ----------
    phys_to_log_S : array of int
        Logical expert in each slot of the layer, over all ranks.
    digest : str
        Of the plan.
    phases : BatchPhases or None
        Under ``batch``: what :meth:`fit_batch` needs.
    """

    def __init__(
        self,
        *,
        block: torch.Tensor,
        layer_id: int,
        phys_to_log_S: IntArray,
        num_experts: int,
        slots_per_rank: int,
        num_sources: int,
        split: str,
        digest: str,
        phases: BatchPhases | None = None,
    ) -> None:
        self.block = block
        self.layer_id = layer_id
        self.phys_to_log_S = phys_to_log_S
        self.num_experts = num_experts
        self.slots_per_rank = slots_per_rank
        self.num_sources = num_sources
        self.split = split
        self.digest = digest
        self.phases = phases
        # What few bits hold is sorted fast.
        last = num_sources * num_experts + 2
        small = torch.int16 if last < 1 << 15 else torch.int32
        self._edges = torch.arange(last, dtype=small, device=block.device)

    @classmethod
    def of_plan(
        cls, plan: Plan, layer_id: int, group: EPGroup, *, split: str | None = None
    ) -> PlacementTables:
        """Return the tables of one layer; nothing waits for the device.

        Parameters
        ----------
        plan : Plan
        layer_id : int
            Absolute decoder layer id.
        group : EPGroup
        split : str, optional
            Another rule than the plan's.

        Raises
        ------
        InvalidInput
            The plan's ranks or nodes are not the group's, or the rule is unknown.
        PlacementInvalid
            The layer is not in the plan.
        """
        check_plan_of_group(plan, group)
        if layer_id not in plan.placement.layer_ids:
            raise PlacementInvalid(
                f"layer {layer_id} is not in the plan, whose layers are "
                f"{plan.placement.layer_ids[0]} to {plan.placement.layer_ids[-1]}"
            )
        topology, placement, num_experts = plan.topology, plan.placement, plan.model.num_experts
        row = placement.layer_ids.index(layer_id)
        slots_S = placement.phys_to_log_LS[row]
        weights_S = None
        if placement.split_weights_LS is not None:
            weights_S = placement.split_weights_LS[row]
        rule = split or plan.split
        num_sources = group.ranks_per_process
        width = max(len(slots_S), num_experts)
        block = np.zeros((3, num_sources, width), dtype=np.int64)
        phases = None
        for source, rank in enumerate(group.ranks):
            if rule == "batch":
                # To begin with; every step moves the bounds.
                share_S = _one_a_rank(slots_S, num_experts, topology.slots_per_rank)
            else:
                share_S = source_share(slots_S, num_experts, topology, rule, rank, weights_S)
            bounds = replica_bounds(slots_S, share_S)
            used = len(bounds.slot_X)
            # Behind those in use: what no token reaches before it reaches the last slot's part.
            block[0, source, :] = (num_experts << UNIT_BITS) - 1
            block[0, source, :used] = bounds.bound_X
            block[0, source] += (source * num_experts) << UNIT_BITS
            block[1, source, :] = bounds.slot_X[-1]
            block[1, source, :used] = bounds.slot_X
            block[2, source, :num_experts] = token_offset(rank, layer_id, num_experts)
        if rule == "batch":
            phases = BatchPhases.of_slots(
                slots_S, bounds.slot_X, num_experts, topology.slots_per_rank, group.device
            )
        return cls(
            block=torch.from_numpy(block).to(group.device, non_blocking=True),
            layer_id=layer_id,
            phys_to_log_S=slots_S,
            num_experts=num_experts,
            slots_per_rank=topology.slots_per_rank,
            num_sources=num_sources,
            split=rule,
            digest=plan.digest(),
            phases=phases,
        )

    def clone(self) -> PlacementTables:
        """Return tables with a block of their own."""
        copy = object.__new__(PlacementTables)
        copy.__dict__.update(self.__dict__)
        copy.block = self.block.clone()
        return copy

    def install(self, other: PlacementTables) -> None:
        """Become ``other``: one copy on the current stream, behind steps that were launched before.

        Raises
        ------
        InvalidInput
            They are of another layer, shape or number of ranks.
        """
        same = self.layer_id, self.num_experts, self.slots_per_rank, self.block.shape
        its = other.layer_id, other.num_experts, other.slots_per_rank, other.block.shape
        if same != its:
            raise InvalidInput(
                f"tables of layer {other.layer_id} ({other.num_experts} experts, "
                f"{other.slots_per_rank} slots a rank) cannot replace those of layer "
                f"{self.layer_id} ({self.num_experts} experts, {self.slots_per_rank} slots a rank)"
            )
        self.block.copy_(other.block)
        self.phys_to_log_S, self.phases = other.phys_to_log_S, other.phases
        self.split, self.digest = other.split, other.digest

    def fit_batch(self, count_E: torch.Tensor) -> None:
        """Divide a step's tokens over replicas in the best way for it; for the rule ``batch``.

        ``count_E`` is int64 [E], over all ranks. Nothing waits for the device.
        """
        phases = self.phases
        assert phases is not None
        begin_FMX = begin_of_replicas(phases, count_E)
        expert_FM1 = phases.expert_FM[:, :, None]
        bound_FMX = (expert_FM1 << UNIT_BITS) + begin_FMX
        # What is padding goes to a place behind all.
        width = self.block.shape[2]
        place_P = torch.where(phases.place_FMX >= 0, phases.place_FMX, width).flatten()
        source_V1 = torch.arange(self.num_sources, device=count_E.device)[:, None]
        wide_VX = torch.nn.functional.pad(self.block[0], (0, 1))
        shifted_VP = bound_FMX.flatten() + (source_V1 * self.num_experts << UNIT_BITS)
        wide_VX.scatter_(1, place_P.expand(self.num_sources, -1), shifted_VP)
        self.block[0].copy_(wide_VX[:, :width])

    def choose_slots(self, topk_TK: torch.Tensor, step: int | torch.Tensor = 0) -> torch.Tensor:
        """Return the slot that each token goes to for each of its experts, int64 [T, K].

        Tokens belong to the process' ranks in equal parts, in order. The same function as
        :func:`eplb.replicas.choose_slots`; nothing waits for the device. On a GPU the step may be
        there, int64 [1].
        """
        if topk_TK.is_cuda:
            from eplb.runtime.ep import choice_kernels  # noqa: PLC0415

            return choice_kernels.choose_slots(
                topk_TK, self.block, self._edges, self.num_experts, step
            )
        step = int(step)
        num_tokens, top_k = topk_TK.shape
        E, V = self.num_experts, self.num_sources
        bound_VX, slot_VX = self.block[0].flatten(), self.block[1].flatten()
        offset_VE = self.block[2, :, :E].flatten()
        expert_TK = topk_TK.long()
        if V > 1:
            source_T = torch.arange(num_tokens, device=topk_TK.device) * V // max(num_tokens, 1)
            expert_TK = torch.where(expert_TK < 0, -1, expert_TK + source_T[:, None] * E)
        key_P = torch.where(expert_TK < 0, V * E, expert_TK).flatten()
        sorted_P, order_P = torch.sort(key_P, stable=True)
        first_E = torch.searchsorted(sorted_P, self._edges.long())
        count_E = first_E.diff().clamp_(min=1)
        place_P = torch.arange(len(key_P), device=key_P.device) - first_E[sorted_P]
        nth_P = torch.empty_like(key_P).scatter_(0, order_P, place_P)
        shift_E = torch.nn.functional.pad((offset_VE + step_offset(step)) % _UNIT, (0, 1))
        place_P = ((nth_P << UNIT_BITS) + shift_E[key_P]) // count_E[key_P]
        found_P = torch.searchsorted(bound_VX, (key_P << UNIT_BITS) + place_P, right=True) - 1
        slot_P = torch.where(key_P < V * E, slot_VX[found_P], -1)
        return slot_P.view(num_tokens, top_k)


def count_experts(topk_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return how many of these tokens each expert gets, int64 [E]; ids below 0 are none."""
    key_P = torch.where(topk_TK < 0, num_experts, topk_TK).flatten().long()
    count_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=key_P.device)
    return count_E.scatter_add_(0, key_P, torch.ones_like(key_P))[:-1]


def _one_a_rank(phys_to_log_S: IntArray, num_experts: int, slots_per_rank: int) -> FloatArray:
    """Return equal fractions of each expert's first slot on every rank that has it, shape [S]."""
    used_S = first_on_rank(phys_to_log_S, num_experts, slots_per_rank) > 0
    count_E = np.bincount(phys_to_log_S[used_S], minlength=num_experts)
    share_S: FloatArray = np.where(used_S, 1.0 / np.maximum(count_E[phys_to_log_S], 1), 0.0)
    return share_S
