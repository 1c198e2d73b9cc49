"""After ranks died: a new group of the survivors, which goes on from the repaired plan.

The loss has been agreed on (:mod:`eplb.runtime.liveness`). Experts that a survivor holds are moved
between survivors where the repaired plan wants them; what only dead ranks held is loaded from the
checkpoint. All arrive in spare rows and are checked against the digests taken when the weights were
first loaded, so a checkpoint of another revision is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from eplb.arrays import IntArray
from eplb.errors import EplbError, InvalidInput, MigrationFailed
from eplb.load_profile import LoadProfile
from eplb.placement.repair import repair
from eplb.plan import Plan
from eplb.runtime.batch_work import BatchWork, Loader
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.equipment import Equipment
from eplb.runtime.liveness import Liveness
from eplb.runtime.manager import PlacementManager
from eplb.runtime.moves import CHECKPOINT, arriving_slots, rows_per_process, swap_batches
from eplb.topology import Topology

__all__ = ["Recovery", "plan_of_survivors", "recover", "regroup"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Recovery:
    """What serving goes on with.

    Parameters
    ----------
    group : EPGroup
        Of the survivors, numbered anew.
    manager : PlacementManager
        Attached to the same layers.
    liveness : Liveness
        Of the new group, with the options of the old one.
    plan : Plan
        In force, in the survivors' numbers.
    repaired : Plan
        The same in the old numbers, with the dead ranks out of service: for the next start of the
        whole cluster.
    num_loaded : int
        Experts that this process loaded from the checkpoint.
    """

    group: EPGroup
    manager: PlacementManager
    liveness: Liveness
    plan: Plan
    repaired: Plan
    num_loaded: int


def recover(
    manager: PlacementManager,
    liveness: Liveness,
    load: Loader,
    *,
    profile: LoadProfile | None = None,
    max_moves: int = 0,
    timeout_s: float | None = None,
) -> Recovery:
    """Form a group of the survivors and put the repaired plan in force. Collective among them.

    Parameters
    ----------
    manager : PlacementManager
        Of the group that lost processes; it is closed.
    liveness : Liveness
        That told so; it is closed.
    load : callable
        From an absolute layer id and a logical expert to its tensors.
    profile, max_moves
        As for :func:`eplb.placement.repair.repair`.
    timeout_s : float, optional
        Of the new group's collectives; by default the old one's.

    Raises
    ------
    InfeasibleProblem
        The survivors have too few slots.
    MigrationFailed
        A row did not arrive, or the checkpoint has other weights.
    """
    loss = liveness.loss
    assert loss is not None, "nothing is lost"
    group, layers = manager.group, manager.layers
    manager.settle(loss.digest)
    per_process = group.ranks_per_process
    dead = [p * per_process + i for p in loss.dead for i in range(per_process)]
    old = manager.plan
    repaired = repair(old, dead, profile, max_moves=max_moves).plan
    plan = plan_of_survivors(repaired)
    manager.close()
    made = regroup(group, liveness, plan.topology, timeout_s=timeout_s)
    held_LS = _without_ranks(old.placement.phys_to_log_LS, old.topology.num_ranks, dead)
    num_loaded = _restore(manager, made, held_LS, plan, load)
    for layer in layers:
        layer.join(made, manager.tables_of(plan, layer.layer_id, made))
    successor = manager.successor(made, liveness.successor(made))
    successor.attach(layers, plan)
    assert successor.liveness is not None
    return Recovery(made, successor, successor.liveness, plan, repaired, num_loaded)


def _restore(
    manager: PlacementManager, group: EPGroup, held_LS: IntArray, plan: Plan, load: Loader
) -> int:
    """Bring each slot of the survivors what the plan wants there; returns how many were loaded."""
    layers, per_rank = manager.layers, plan.topology.slots_per_rank
    # Serving stands still, so a layer whose lost experts are many must not fail for want of rows.
    wanted_LS = plan.placement.phys_to_log_LS
    count_LP = rows_per_process(arriving_slots(held_LS, wanted_LS), layers[0].slots.num_slots)
    spare_rows = max(manager.spare_rows, int(count_LP.max()))
    equipment = Equipment.connect(
        group, layers, manager.checksum_LE, lambda _, layer, slot: layers[layer].slots.rows[slot],
        spare_rows=spare_rows, bytes_per_s=None, timeout_s=group.timeout_s,
        host=manager.host,
    )  # fmt: skip
    work, num_loaded = equipment.work, 0
    batches = swap_batches(
        held_LS, wanted_LS, slots_per_rank=per_rank,
        ranks_per_process=group.ranks_per_process, ranks_per_node=group.ranks_per_node,
        spare_rows=spare_rows,
    )  # fmt: skip
    try:
        for batch in batches:
            received = batch.received_by(group.process, layers[0].slots.num_slots)
            num_loaded += int((batch.source_M[received] == CHECKPOINT).sum())
            for stage in (
                lambda batch=batch: work.move(0, batch, load), work.check, work.put_in,
            ):  # fmt: skip
                _together(group, work, stage)
            work.end()
    finally:
        equipment.close()
    return num_loaded


def _together(group: EPGroup, work: BatchWork, stage: Callable[[], None]) -> None:
    """Run one stage on all processes, and raise on all what fails on one.

    Raises
    ------
    MigrationFailed
    """
    failure = ""
    try:
        stage()
        deadline = time.monotonic() + group.timeout_s
        while not work.poll():
            work.lane.pump()
            if time.monotonic() > deadline:
                failure = f"rows did not arrive within {group.timeout_s:g} s"
                break
            time.sleep(0.0005)
    except EplbError as error:
        failure = str(error)
    except Exception as error:  # noqa: BLE001  (reading a checkpoint is serving code's)
        failure = f"{type(error).__name__}: {error}"
    failed = {p: text for p, text in enumerate(group.gather_text(failure)) if text}
    if failed:
        process, text = next(iter(failed.items()))
        raise MigrationFailed(
            f"recovery failed on process {process}: {text}; restart from the repaired plan"
        )


def regroup(
    group: EPGroup, liveness: Liveness, topology: Topology, *, timeout_s: float | None = None
) -> EPGroup:
    """Return a group of the survivors in its place. Collective among them.

    Raises
    ------
    InvalidInput
        The group is not torch's default group.
    ServingFailed
        The survivors do not find each other.
    """
    loss = liveness.loss
    assert loss is not None, "nothing is lost"
    backend = str(dist.get_backend(group.process_group))
    if group.process_group != dist.group.WORLD:
        raise InvalidInput("only torch's default group can be formed anew; serve with that one")
    timeout_s = timeout_s or group.timeout_s
    has_nodes = group.node_group is not None and topology.num_nodes > 1
    store = liveness.meeting_store()
    dist.destroy_process_group()
    dist.init_process_group(
        backend,
        store=PrefixStore("eplb", store),
        rank=loss.survivors.index(group.process),
        world_size=len(loss.survivors),
        timeout=timedelta(seconds=timeout_s),
        device_id=group.device if backend == "nccl" else None,
    )
    world = dist.group.WORLD
    assert world is not None
    made = EPGroup(
        world,
        PrefixStore("eplb-calls", store),
        num_ranks=topology.num_ranks,
        ranks_per_node=topology.ranks_per_node,
        device=group.device,
        timeout_s=timeout_s,
        nodes=has_nodes,
    )
    # All are here, so nobody needs the old group's heartbeats any more.
    made.barrier()
    liveness.close()
    return made


def plan_of_survivors(repaired: Plan) -> Plan:
    """Return a plan without the ranks that are out of service; the others are numbered anew.

    Nodes stay where all of them lost equally many ranks. Otherwise each rank counts as a node of
    its own where there was more than one, since nodes of unequal size have no numbers to name.
    """
    topology, placement = repaired.topology, repaired.placement
    in_service = topology.ranks_in_service
    node_of = in_service // topology.ranks_per_node
    sizes = np.bincount(node_of)
    sizes = sizes[sizes > 0]
    if topology.num_nodes == 1 or len(set(sizes.tolist())) == 1:
        num_nodes, ranks_per_node = len(sizes), int(sizes[0])
    else:
        num_nodes, ranks_per_node = len(in_service), 1

    def kept(array_LS: np.ndarray) -> np.ndarray:
        array_LRK = array_LS.reshape(len(array_LS), topology.num_ranks, -1)
        return array_LRK[:, in_service].reshape(len(array_LS), -1)

    weights_LS = placement.split_weights_LS
    return replace(
        repaired,
        topology=replace(
            topology,
            num_nodes=num_nodes,
            ranks_per_node=ranks_per_node,
            ranks_out_of_service=(),
            rank_slots=_of(topology.rank_slots, in_service),
            rank_speed=_of(topology.rank_speed, in_service),
        ),
        placement=replace(
            placement,
            phys_to_log_LS=kept(placement.phys_to_log_LS),
            split_weights_LS=None if weights_LS is None else kept(weights_LS),
        ),
    )


def _of(values: tuple[_T, ...] | None, ranks: IntArray) -> tuple[_T, ...] | None:
    return None if values is None else tuple(values[int(rank)] for rank in ranks)


def _without_ranks(slots_LS: IntArray, num_ranks: int, dead: Sequence[int]) -> IntArray:
    """Return the slots of the ranks that are left."""
    slots_LRK = slots_LS.reshape(len(slots_LS), num_ranks, -1)
    left: IntArray = np.delete(slots_LRK, list(dead), axis=1).reshape(len(slots_LS), -1)
    return left
