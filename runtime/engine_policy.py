"""The solver as serving engines call it: loads and the placement in force in, a placement out.

Which one is chosen by the environment variable ``EPLB_POLICY``, which every process of an engine
inherits: ``global`` or ``hierarchical`` solve (DeepSeek's two policies), ``keep`` moves nothing, a
plan file is served as it is. Unset, the engine's own policy stays in force. The engines' sides are
:mod:`eplb.runtime.vllm_policy` and :mod:`eplb.runtime.sglang_algorithm`.

Shape letters: L layers, E logical experts, S slots.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray
from eplb.engines.layers import for_engine
from eplb.errors import InvalidInput, unknown_name
from eplb.placement.greedy import place_greedy
from eplb.placement.keep_slots import keep_slots
from eplb.plan import Plan
from eplb.plan_file import read_plan
from eplb.slots import initial_placement

__all__ = [
    "POLICIES",
    "VARIABLE",
    "EnginePolicy",
    "Request",
    "keep",
    "plan_policy",
    "policy_of",
    "solving_policy",
]

VARIABLE = "EPLB_POLICY"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """What an engine asks.

    Parameters
    ----------
    load_LE : array of float64, shape [L, E]
        Load of each logical expert; a layer may have none.
    num_slots, num_ranks, num_nodes : int
        Ranks divide slots, nodes divide ranks.
    num_groups : int
        Of group-limited routing.
    current_LS : array of int, shape [L, S], optional
        The placement in force, where the engine tells; -1 is a slot that holds nothing.
    """

    load_LE: FloatArray
    num_slots: int
    num_ranks: int
    num_nodes: int = 1
    num_groups: int = 1
    current_LS: IntArray | None = None


class EnginePolicy(Protocol):
    """Places experts for an engine."""

    def __call__(self, request: Request) -> IntArray:
        """Return the logical expert of each slot, shape [L, S]."""


def policy_of(environment: Mapping[str, str], rows: str) -> EnginePolicy | None:
    """Return the policy that ``EPLB_POLICY`` names, or none where it is unset.

    Parameters
    ----------
    environment : mapping
        Such as ``os.environ``.
    rows : str
        What the engine's rows stand for (:mod:`eplb.engines.engine`).

    Raises
    ------
    InvalidInput, PlacementInvalid
        The value is neither a policy nor a plan that can be read.
    """
    value = environment.get(VARIABLE)
    if not value:
        return None
    if value in POLICIES:
        return POLICIES[value]()
    if Path(value).suffix not in (".yaml", ".yml"):
        error = unknown_name(f"policy in {VARIABLE}:", value, POLICIES)
        raise InvalidInput(f"{error}, or the path of a plan (.yaml)")
    return plan_policy(read_plan(value), rows)


def solving_policy(*, hierarchical: bool) -> EnginePolicy:
    """Return a policy that solves for the loads and moves few experts.

    Parameters
    ----------
    hierarchical : bool
        Keep the experts of a routing group within a node. Where nodes do not divide groups, a
        warning says that the global policy is used, as in DeepSeek's code.
    """
    # Now, where a server starts, and not in its first rearrangement.
    import_module("scipy.optimize")

    def place(request: Request) -> IntArray:
        current_LS, whole_LS = request.current_LS, _in_force(request)
        idle_L = request.load_LE.sum(axis=1) <= 0
        num_experts = request.load_LE.shape[1]
        if whole_LS is not None and idle_L.all():
            return whole_LS.copy()
        num_nodes = request.num_nodes if hierarchical else 1
        if request.num_groups % num_nodes:
            logger.warning(
                "%s=hierarchical places whole groups on nodes, and %d groups cannot be divided "
                "over %d nodes: placing globally",
                VARIABLE, request.num_groups, num_nodes,
            )  # fmt: skip
            num_nodes = 1
        slots_per_rank = request.num_slots // request.num_ranks
        placed_LS, _ = place_greedy(
            _single(request.load_LE),
            num_slots=request.num_slots,
            num_ranks=request.num_ranks,
            num_nodes=num_nodes,
            num_groups=request.num_groups if num_nodes > 1 else 1,
            # More slots a rank than experts leave no choice.
            distinct_ranks=slots_per_rank <= num_experts // num_nodes,
        )
        if current_LS is None or current_LS.shape[1] != request.num_slots:
            return placed_LS
        placed_LS = keep_slots(placed_LS, current_LS, request.num_ranks, num_nodes)
        if whole_LS is not None:
            placed_LS[idle_L] = whole_LS[idle_L]
        return placed_LS

    return place


def keep(request: Request) -> IntArray:
    """Return the placement in force, or before there is one what engines start with."""
    whole_LS = _in_force(request)
    if whole_LS is not None:
        return whole_LS.copy()
    num_layers, num_experts = request.load_LE.shape
    start = initial_placement(range(num_layers), num_experts, request.num_slots)
    return start.phys_to_log_LS.copy()


def _in_force(request: Request) -> IntArray | None:
    """Return the placement in force if it has as many slots, and an expert in each."""
    current_LS = request.current_LS
    if current_LS is None or current_LS.shape[1] != request.num_slots or current_LS.min() < 0:
        return None
    return current_LS


def plan_policy(plan: Plan, rows: str) -> EnginePolicy:
    """Return a policy that always answers with the placement of a plan.

    A draft model of multi-token prediction asks on its own, for fewer layers: it gets those of the
    plan that come after the last decoder layer.
    """
    if not plan.topology.is_uniform:
        raise InvalidInput(
            "engines know no ranks out of service, or of different slots or speed; give a plan of "
            "the ranks in service alone"
        )
    main, remarks = for_engine(plan.placement, plan.model, rows)
    for remark in remarks:
        logger.info("%s", remark)
    row_of = {layer_id: row for row, layer_id in enumerate(plan.placement.layer_ids)}
    draft = [row for layer_id, row in row_of.items() if layer_id > main.layer_ids[-1]]
    choices = {len(main.phys_to_log_LS): main.phys_to_log_LS}
    if draft:
        choices.setdefault(len(draft), plan.placement.phys_to_log_LS[draft])

    def place(request: Request) -> IntArray:
        num_layers, num_experts = request.load_LE.shape
        asked = num_experts, request.num_slots, request.num_ranks
        planned = plan.model.num_experts, plan.topology.num_slots, plan.topology.num_ranks
        if asked != planned or num_layers not in choices:
            raise InvalidInput(
                f"the plan is for {planned[0]} experts in {planned[1]} slots of {planned[2]} ranks "
                f"and {' or '.join(map(str, choices))} layers; the engine has {asked[0]}, "
                f"{asked[1]}, {asked[2]} and {num_layers}; start it as `eplb export` prints"
            )
        return choices[num_layers].copy()

    return place


POLICIES: dict[str, Callable[[], EnginePolicy]] = {
    "global": lambda: solving_policy(hierarchical=False),
    "hierarchical": lambda: solving_policy(hierarchical=True),
    "keep": lambda: keep,
}


def _single(load_LE: FloatArray) -> NDArray[np.float32]:
    """Return loads that float32 can add up."""
    largest = float(load_LE.max(initial=0.0))
    scale = 1.0 if largest < 1e30 else 1e30 / largest
    return np.ascontiguousarray(load_LE * scale, np.float32)
