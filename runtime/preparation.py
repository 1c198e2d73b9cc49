"""What a swap needs before it can begin: batches, tables and digest of the new plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from eplb.arrays import IntArray
from eplb.errors import InvalidInput
from eplb.plan import Plan
from eplb.runtime.batch_work import SwapLayer
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.layer import EPMoELayer
from eplb.runtime.moves import Arrivals, swap_batches
from eplb.runtime.staged_plan import StagedPlan

__all__ = ["Prepared", "Swap", "TablesOf", "layers_of", "prepare"]

TablesOf = Callable[[Plan, int, EPGroup], Any]
T = TypeVar("T")

# Preparing then takes the lock for a tenth of the time.
RESTS_PER_WORK = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A swap's batches, the new plan's digest, and its tables in the order of layers."""

    digest: str
    batches: Sequence[Arrivals]
    tables: Sequence[Any]


@dataclass(slots=True, kw_only=True)
class Swap:
    """The swap under way on this process."""

    plan: Plan
    prepared: Future[Prepared]
    deadline_s: float
    begun_s: float
    is_returning: bool = False
    is_published: bool = False


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

    Between any two batches or tables it rests: see :class:`Turns`.

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


class Turns:
    """Rests of a thread that share Python's lock with the thread that serves.

    A thread that computes in Python gives the lock to one that asks for it after 5 ms only, and the
    serving thread asks anew for each operation that it launches. So work is done in pieces of about
    a millisecond, each followed by a rest in which serving has the lock to itself.
    """

    def __init__(self) -> None:
        self._since_s = time.thread_time()

    def rest(self) -> None:
        """Sleep in proportion to what this thread has worked since the last rest."""
        time.sleep((time.thread_time() - self._since_s) * RESTS_PER_WORK)
        self._since_s = time.thread_time()

    def between(self, pieces: Iterable[T]) -> Iterator[T]:
        """Give the pieces as they are worked out, and rest behind each."""
        for piece in pieces:
            self.rest()
            yield piece


def layers_of(model: nn.Module | Iterable[SwapLayer]) -> dict[int, SwapLayer]:
    """Return the layers by their id."""
    layers: Iterable[SwapLayer] = (
        [module for module in model.modules() if isinstance(module, EPMoELayer)]
        if isinstance(model, nn.Module)
        else model
    )
    found: dict[int, SwapLayer] = {}
    for layer in layers:
        if layer.layer_id in found:
            raise InvalidInput(f"two layers have the id {layer.layer_id}; attach each once")
        found[layer.layer_id] = layer
    if not found:
        raise InvalidInput("the model has no expert-parallel layer; give the layers themselves")
    return found
