"""A plug-in for SGLang: rebalancing and planning at start call our solver, or bring in a plan.

SGLang loads the entry point ``sglang.srt.plugins`` in each of its processes, and its hook registry
(srt/plugins/hook_registry.py, 0.5.23) replaces functions by name. All its algorithms go through
``eplb_algorithms.rebalance_experts``, at start for ``--init-expert-location`` with
``logical_count``, and while it serves with ``--enable-eplb``. Placements made there keep all
replicas for every rank, where a map from a file is cut down to the nearest one.

Shape letters: L layers, E logical experts, S slots.
"""

from __future__ import annotations

import inspect
import logging
import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from eplb.arrays import IntArray
from eplb.engines.engine import DENSE
from eplb.errors import InvalidInput
from eplb.runtime.engine_policy import VARIABLE, EnginePolicy, Request, policy_of
from eplb.slots import log_to_phys, replica_count

if TYPE_CHECKING:
    import torch

__all__ = ["make_algorithm", "register"]

_MODULE = "sglang.srt.eplb.eplb_algorithms"
_PARAMETERS = (
    "tokens_per_expert", "num_physical_experts", "num_local_physical_experts", "num_groups",
    "num_nodes", "algorithm",
)  # fmt: skip

logger = logging.getLogger(__name__)


def register() -> None:
    """Put our solver in place of SGLang's algorithms, where ``EPLB_POLICY`` is set.

    Raises
    ------
    InvalidInput, PlacementInvalid
        The variable names no policy or plan, or this SGLang calls its algorithms otherwise than
        the release this was written for.
    """
    place = policy_of(os.environ, DENSE)
    if place is None:
        return
    asked = inspect.signature(import_module(_MODULE).rebalance_experts).parameters
    if tuple(asked) != _PARAMETERS:
        raise InvalidInput(
            f"SGLang {version('sglang')} calls its algorithms with ({', '.join(asked)}), which "
            f"this eplb-toolkit does not know; unset {VARIABLE}, or use SGLang 0.5.23"
        )
    hooks = import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(
        f"{_MODULE}.rebalance_experts", make_algorithm(place), hooks.HookType.REPLACE
    )
    logger.info("experts are placed by eplb-toolkit: %s=%s", VARIABLE, os.environ[VARIABLE])


def make_algorithm(place: EnginePolicy) -> Any:
    """Return a function that SGLang can call for its own and that asks ``place``."""

    def rebalance_experts(
        tokens_per_expert: torch.Tensor,
        num_physical_experts: int,
        num_local_physical_experts: int,
        num_groups: int | None,
        num_nodes: int,
        algorithm: object,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch  # noqa: PLC0415

        load_LE = tokens_per_expert.double().sum(dim=0).cpu().numpy()
        placed_LS = place(
            Request(
                load_LE=load_LE,
                num_slots=num_physical_experts,
                num_ranks=num_physical_experts // num_local_physical_experts,
                num_nodes=num_nodes,
                num_groups=num_groups or 1,
                current_LS=_placement_in_force((len(load_LE), num_physical_experts)),
            )
        )
        num_experts = load_LE.shape[1]
        tables = (
            placed_LS,
            log_to_phys(placed_LS, num_experts),
            replica_count(placed_LS, num_experts),
        )
        first, second, third = (torch.from_numpy(np.ascontiguousarray(t)) for t in tables)
        return first, second, third

    return rebalance_experts


def _placement_in_force(shape: tuple[int, int]) -> IntArray | None:
    """Return what the server serves with, where it serves already and in the same slots."""
    module = import_module("sglang.srt.eplb.expert_location")
    metadata = module.get_global_expert_location_metadata()
    if metadata is None or tuple(metadata.physical_to_logical_map_cpu.shape) != shape:
        return None
    current_LS: IntArray = metadata.physical_to_logical_map_cpu.numpy().astype(np.int64)
    return current_LS
