"""What a swap needs before it can begin: batches, tables and digest of the new plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from eplb.arrays import IntArray
from eplb.plan import Plan
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.moves import Arrivals, swap_batches
from eplb.runtime.staged_plan import StagedPlan
from eplb.runtime.turns import Turns

__all__ = ["Prepared", "Swap", "TablesOf", "prepare"]

TablesOf = Callable[[Plan, int, EPGroup], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A swap's batches, the new plan's digest, and its tables in the order of layers."""

    digest: str
    batches: Sequence[Arrivals]
    tables: Sequence[Any]


@dataclass(slots=True, kw_only=True)
class Swap:
    """The swap under way on this process.

    ``is_abort_asked`` may be set by any thread; ``why`` is this process' own reason to roll back.
    """

    plan: Plan
    prepared: Future[Prepared]
    deadline_s: float
    begun_s: float
    is_returning: bool = False
    is_published: bool = False
    is_abort_asked: bool = False
    why: str | None = None


def prepare(
    group: EPGroup,
    old_LS: IntArray,
    plan: Plan,
    *,
    spare_rows: int,
    rows_per_step: int | None,
    tables_of: TablesOf,
    plan_file: StagedPlan | None = None,
) -> Prepared:
    """Work out a swap from the slots in force to a plan, on a thread beside serving.

    Batches and tables are its pieces of work (:mod:`eplb.runtime.turns`).

    Raises
    ------
    MigrationFailed
        A layer does not fit into the spare rows.
    """
    if group.device.type == "cuda":
        torch.cuda.set_device(group.device)
    turns = Turns()
    arrivals = swap_batches(
        old_LS, plan.placement.phys_to_log_LS,
        slots_per_rank=plan.topology.slots_per_rank,
        ranks_per_process=group.ranks_per_process,
        ranks_per_node=group.ranks_per_node,
        spare_rows=spare_rows,
        rows_per_step=rows_per_step,
    )  # fmt: skip
    batches = list(turns.between(arrivals))
    digest = plan.digest()
    turns.rest()
    tables = list(
        turns.between(tables_of(plan, layer_id, group) for layer_id in plan.placement.layer_ids)
    )
    if plan_file is not None:
        plan_file.stage(plan)
    if group.device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    return Prepared(digest=digest, batches=batches, tables=tables)
