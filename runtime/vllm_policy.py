"""A plug-in for vLLM: its rebalancing calls our solver, or brings in a plan.

vLLM loads the entry point ``vllm.general_plugins`` in each of its processes. Its policies are a
closed dict (vllm/distributed/eplb/policy/__init__.py, 0.33.0), whose keys the configuration checks,
and asynchronous rebalancing is only allowed with the one named ``default``: so that is the name
under which our policy goes, and only where ``EPLB_POLICY`` asks for it.
"""

from __future__ import annotations

import inspect
import logging
import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from eplb.engines.engine import MOE_ORDINALS
from eplb.errors import InvalidInput
from eplb.runtime.engine_policy import VARIABLE, EnginePolicy, Request, policy_of

if TYPE_CHECKING:
    import torch

__all__ = ["make_policy", "register"]

_PARAMETERS = (
    "weight", "num_replicas", "num_groups", "num_nodes", "num_ranks", "old_global_expert_indices",
)  # fmt: skip

logger = logging.getLogger(__name__)


def register() -> None:
    """Put our policy in place of vLLM's own, where ``EPLB_POLICY`` is set.

    Raises
    ------
    InvalidInput, PlacementInvalid
        The variable names no policy or plan, or this vLLM asks its policies otherwise than the
        release this was written for.
    """
    place = policy_of(os.environ, MOE_ORDINALS)
    if place is None:
        return
    policies = import_module("vllm.distributed.eplb.policy")
    asked = inspect.signature(policies.AbstractEplbPolicy.rebalance_experts).parameters
    if tuple(asked) != _PARAMETERS or "default" not in policies.EPLB_POLICIES:
        raise InvalidInput(
            f"vLLM {version('vllm')} calls its policies with ({', '.join(asked)}), which this "
            f"eplb-toolkit does not know; unset {VARIABLE}, or use vLLM 0.33"
        )
    policies.EPLB_POLICIES["default"] = make_policy(place, policies.AbstractEplbPolicy)
    logger.info("experts are placed by eplb-toolkit: %s=%s", VARIABLE, os.environ[VARIABLE])


def make_policy(place: EnginePolicy, base: type) -> type:
    """Return a policy class of vLLM that asks ``place``."""

    def rebalance_experts(
        cls: type,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        import torch  # noqa: PLC0415

        current = old_global_expert_indices
        placed_LS = place(
            Request(
                load_LE=weight.double().cpu().numpy(),
                num_slots=num_replicas,
                num_ranks=num_ranks,
                num_nodes=num_nodes,
                num_groups=num_groups,
                current_LS=None if current is None else current.cpu().numpy().astype(np.int64),
            )
        )
        return torch.from_numpy(np.ascontiguousarray(placed_LS))

    return type("EplbToolkitPolicy", (base,), {"rebalance_experts": classmethod(rebalance_experts)})
