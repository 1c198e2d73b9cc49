"""After ranks died: every expert back on the ranks that are left, by as few transfers as it takes.

An expert that a surviving rank holds needs nothing. One that none holds (it is *lost*) is loaded
from the checkpoint, once, in the place of a redundant replica: no repair loads less, since each
lost expert has to come from outside, and no transfer between ranks is needed at all. Which replicas
make way, and where lost experts go, is chosen by what it costs in balance; moves beyond that,
within a limit, only improve the balance.

Shape letters: L layers, E logical experts, S slots, R ranks, K slots of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InfeasibleProblem, InvalidInput
from eplb.load_profile import LoadProfile
from eplb.placement.fractions import best_fractions
from eplb.placement.in_service import put_back, reduced_placement, reduced_topology
from eplb.placement.migration import Migration, find_migration
from eplb.placement.refill import layer_loads, refill
from eplb.plan import Plan
from eplb.problem import Problem
from eplb.slots import EMPTY, Placement, replica_count
from eplb.topology import Topology

__all__ = ["Repair", "improved", "new_fractions", "repair"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Repair:
    """A plan for the ranks that are left, and how to get there.

    Parameters
    ----------
    plan : Plan
        Ranks keep their numbers; the dead ones are out of service in its topology.
    lost : Migration
        What has to be loaded from the checkpoint (``layer_M``, ``rank_M``, ``slot_M`` and
        ``expert_M``), from what survived to where every expert is live again.
    moves : Migration
        From there to the plan: transfers between ranks that improve the balance. All have a
        source.
    min_loads : int
        Experts that no surviving rank holds, over all layers: no repair brings in fewer.
    """

    plan: Plan
    lost: Migration
    moves: Migration
    min_loads: int


def repair(
    plan: Plan,
    dead_ranks: Sequence[int],
    profile: LoadProfile | None = None,
    *,
    max_moves: int = 0,
) -> Repair:
    """Repair a plan whose ranks died.

    Parameters
    ----------
    plan : Plan
        In force when they died.
    dead_ranks : sequence of int
        Besides those that its topology has out of service.
    profile : LoadProfile, optional
        Loads to balance, of layers of the plan; without one every expert counts alike.
    max_moves : int
        Experts that may be sent between ranks, over all layers, to improve the balance.

    Raises
    ------
    InvalidInput
        A rank does not exist, the limit is negative, or moves are asked for where ranks differ in
        speed or without a profile.
    InfeasibleProblem
        The ranks that are left have fewer slots than there are experts, or none is left.
    """
    topology = _without(plan.topology, dead_ranks, plan.model.num_experts)
    if max_moves < 0:
        raise InvalidInput(f"max_moves must be at least 0, got {max_moves}")
    if max_moves and profile is None:
        raise InvalidInput("moves beyond what is lost follow loads; give a profile of them")
    placement = plan.placement
    old_LRK = placement.phys_to_log_LS.reshape(placement.num_layers, topology.num_ranks, -1)
    survivor_LRK = np.where(topology.has_slot_RK, old_LRK, EMPTY)
    load_WLE = layer_loads(plan, profile, topology)
    found = refill(load_WLE, survivor_LRK, topology, max_fills=max_moves)
    new_LRK = found.filled_LRK
    if profile is not None and max_moves > found.num_filled:
        new_LRK = improved(new_LRK, plan, profile, topology, max_moves=max_moves - found.num_filled)
    new_LS = new_LRK.reshape(placement.num_layers, -1)
    new_placement = replace(
        placement,
        phys_to_log_LS=new_LS,
        split_weights_LS=new_fractions(plan, new_LS, topology, profile),
    )
    survivors = replica_count(survivor_LRK.reshape(len(new_LS), -1), plan.model.num_experts)
    return Repair(
        plan=replace(
            plan,
            topology=topology,
            placement=new_placement,
            quality=None,
            provenance={"solver": "repair"},
        ),
        lost=find_migration(survivor_LRK, found.restored_LRK),
        moves=find_migration(found.restored_LRK, new_LRK),
        min_loads=int(np.count_nonzero(survivors == 0)),
    )


def _without(topology: Topology, dead_ranks: Sequence[int], num_experts: int) -> Topology:
    """Return the topology with these ranks out of service."""
    strange = [r for r in dead_ranks if not 0 <= r < topology.num_ranks]
    if strange:
        raise InvalidInput(
            f"rank {strange[0]} does not exist; the plan has ranks 0 to {topology.num_ranks - 1}"
        )
    out = set(topology.ranks_out_of_service).union(int(r) for r in dead_ranks)
    if len(out) == topology.num_ranks:
        raise InfeasibleProblem("no rank is left; start anew with eplb plan")
    left = replace(topology, ranks_out_of_service=tuple(out))
    if left.num_usable_slots < num_experts:
        num_ranks = len(left.ranks_in_service)
        raise InfeasibleProblem(
            f"the {num_ranks} ranks that are left have {left.num_usable_slots} slots for "
            f"{num_experts} experts; give them more with eplb resize (--slots-per-rank "
            f"{-(-num_experts // num_ranks)})"
        )
    return left


def improved(
    slots_LRK: IntArray,
    plan: Plan,
    profile: LoadProfile,
    topology: Topology,
    *,
    max_moves: int,
) -> IntArray:
    """Return the slots after the moves, within the limit, that lower the imbalance most."""
    from eplb.placement.replan import replan  # noqa: PLC0415  (numba)

    if topology.rank_speed is not None:
        raise InvalidInput(
            "moves are searched for ranks of one speed, and rank_speed says that they differ; "
            "leave --max-moves out"
        )
    ranks, rows = topology.ranks_in_service, plan.placement.rows(profile.layer_ids)
    problem = Problem(
        profile=profile,
        model=replace(plan.model, layer_ids=profile.layer_ids),
        topology=Topology(
            num_nodes=1, ranks_per_node=len(ranks), slots_per_rank=topology.slots_per_rank
        ),
        # Moves keep replicas apart anyway; demanded, it would forbid slots that stay empty.
        distinct_ranks=False,
    )
    inner = Placement(
        phys_to_log_LS=slots_LRK[rows][:, ranks].reshape(len(rows), -1),
        layer_ids=profile.layer_ids,
        num_experts=plan.model.num_experts,
    )
    found = replan(problem, inner, max_moves=max_moves).placement
    better_LRK = slots_LRK.copy()
    better_LRK[np.array(rows)[:, np.newaxis], ranks] = found.phys_to_log_LS.reshape(
        len(rows), len(ranks), -1
    )
    return better_LRK


def new_fractions(
    plan: Plan, new_LS: IntArray, topology: Topology, profile: LoadProfile | None
) -> FloatArray | None:
    """Return the fractions of slots under ``weighted``: the best for the loads, or even ones."""
    if plan.placement.split_weights_LS is None:
        return None
    bare = replace(plan.placement, phys_to_log_LS=new_LS, split_weights_LS=None)
    inner = reduced_placement(bare, topology)
    flat = reduced_topology(topology)
    load_WLE = layer_loads(plan, profile, topology)
    fractions = [
        best_fractions(load_E[np.newaxis], np.ones(1), row_S, flat.num_ranks)[0]
        for load_E, row_S in zip(load_WLE.mean(axis=0), inner.phys_to_log_LS, strict=True)
    ]
    return put_back(replace(inner, split_weights_LS=np.stack(fractions)), topology).split_weights_LS
