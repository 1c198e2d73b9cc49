"""What changes between two placements: the experts that ranks have to fetch, and what that costs.

An expert that stays on its rank costs no network, in whatever slot it comes to lie. Numbering ranks
and slots so that most stay is :mod:`eplb.placement.keep_slots`; in what order the rest is sent, and
from where, :mod:`eplb.placement.schedule`.

Shape letters: L layers, S slots, R ranks, K slots of a rank, M moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eplb.arrays import IntArray, frozen_array
from eplb.errors import InvalidInput, PlacementInvalid
from eplb.plan import Plan
from eplb.topology import Topology

__all__ = ["Migration", "find_migration", "plan_slots"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Migration:
    """Two placements on the ranks of both, and the experts that ranks lack.

    Parameters
    ----------
    old_LRK, new_LRK : array of int64, shape [L, R, K]
        Logical expert in each slot, -1 where there is none. Ranks that only one side has are empty
        on the other.
    layer_M, rank_M, slot_M, expert_M : array of int64, shape [M]
        Row of the layer, rank that fetches, its slot within the rank, and the logical expert; in
        the order of the slots.
    """

    old_LRK: IntArray
    new_LRK: IntArray
    layer_M: IntArray
    rank_M: IntArray
    slot_M: IntArray
    expert_M: IntArray

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            object.__setattr__(self, name, frozen_array(getattr(self, name), np.int64))

    @property
    def num_moves(self) -> int:
        """Experts that ranks have to fetch."""
        return len(self.expert_M)

    @property
    def num_ranks(self) -> int:
        """R, ranks of the larger side."""
        return int(self.old_LRK.shape[1])


def find_migration(old_LRK: IntArray, new_LRK: IntArray) -> Migration:
    """Compare two placements rank by rank.

    Parameters
    ----------
    old_LRK, new_LRK : array of int, shape [L, R, K]
        R and K may differ: ranks are matched by number, and what one side lacks is empty.

    Raises
    ------
    InvalidInput
        The sides have different numbers of layers.
    """
    if len(old_LRK) != len(new_LRK):
        raise InvalidInput(
            f"the old placement has {len(old_LRK)} layers and the new one {len(new_LRK)}; compare "
            "plans of the same layers"
        )
    shape = tuple(max(a, b) for a, b in zip(old_LRK.shape, new_LRK.shape, strict=True))
    old, new = (_padded(rows, shape) for rows in (old_LRK, new_LRK))
    there_LRK = (new[..., np.newaxis] == old[:, :, np.newaxis]).any(axis=3)
    layer_M, rank_M, slot_M = np.nonzero(~there_LRK & (new >= 0))
    return Migration(
        old_LRK=old,
        new_LRK=new,
        layer_M=layer_M,
        rank_M=rank_M,
        slot_M=slot_M,
        expert_M=new[layer_M, rank_M, slot_M],
    )


def plan_slots(old: Plan, new: Plan) -> tuple[IntArray, IntArray, Topology]:
    """Return the slots [L, R, K] of two plans of one model, and the topology that has both.

    Raises
    ------
    InvalidInput
        The plans are of different models, or of nodes of different sizes.
    PlacementInvalid
        They are of different layers.
    """
    if old.model.num_experts != new.model.num_experts or old.model.name != new.model.name:
        raise InvalidInput(
            f"the old plan is for {old.model.name} ({old.model.num_experts} experts) and the new "
            f"one for {new.model.name} ({new.model.num_experts}); compare plans of one model"
        )
    if old.placement.layer_ids != new.placement.layer_ids:
        raise PlacementInvalid(
            "the plans are of different layers; plan both for the same recording's layers"
        )
    if old.topology.ranks_per_node != new.topology.ranks_per_node:
        raise InvalidInput(
            f"nodes have {old.topology.ranks_per_node} ranks in the old plan and "
            f"{new.topology.ranks_per_node} in the new one, so ranks cannot be told to be the "
            "same; plan with equal --ranks-per-node"
        )
    larger = max((new.topology, old.topology), key=lambda topology: topology.num_nodes)
    old_LRK, new_LRK = (
        plan.placement.phys_to_log_LS.reshape(
            plan.placement.num_layers, plan.topology.num_ranks, -1
        )
        for plan in (old, new)
    )
    return old_LRK, new_LRK, larger


def _padded(rows_LRK: IntArray, shape: tuple[int, ...]) -> IntArray:
    padded = np.full(shape, -1, np.int64)
    padded[:, : rows_LRK.shape[1], : rows_LRK.shape[2]] = rows_LRK
    return padded
