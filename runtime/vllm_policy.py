"""A plug-in for vLLM: its rebalancing calls our solver, brings in a plan, or records its loads.

vLLM loads the entry point ``vllm.general_plugins`` in each of its processes. Its policies are a
closed dict (vllm/distributed/eplb/policy/__init__.py, 0.33.0), whose keys the configuration checks,
and asynchronous rebalancing is only allowed with the one named ``default``: so that is the name
under which our policy goes, and only where ``EPLB_POLICY`` asks for it. With ``EPLB_RECORD`` the
loads that any policy gets are appended to a file, since this release writes none.

Shape letters: L layers, E logical experts, S slots.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eplb.engines.engine import MOE_ORDINALS
from eplb.engines.vllm import load_record
from eplb.errors import InvalidInput
from eplb.runtime.engine_policy import VARIABLE, EnginePolicy, Request, policy_of

if TYPE_CHECKING:
    import torch

__all__ = ["RECORD_VARIABLE", "make_policy", "make_recorder", "register"]

RECORD_VARIABLE = "EPLB_RECORD"

_PARAMETERS = (
    "weight", "num_replicas", "num_groups", "num_nodes", "num_ranks", "old_global_expert_indices",
)  # fmt: skip

# Below vLLM's own logger, so that its handler shows what is said here.
logger = logging.getLogger("vllm.eplb_toolkit")


def register() -> None:
    """Put our policy in place of vLLM's own, or around it, where the environment asks for it.

    Raises
    ------
    InvalidInput, PlacementInvalid
        ``EPLB_POLICY`` names no policy or plan, or this vLLM asks its policies otherwise than the
        release this was written for.
    """
    place = policy_of(os.environ, MOE_ORDINALS)
    record = os.environ.get(RECORD_VARIABLE)
    if place is None and not record:
        return
    policies = import_module("vllm.distributed.eplb.policy")
    asked = inspect.signature(policies.AbstractEplbPolicy.rebalance_experts).parameters
    if tuple(asked) != _PARAMETERS or "default" not in policies.EPLB_POLICIES:
        raise InvalidInput(
            f"vLLM {version('vllm')} calls its policies with ({', '.join(asked)}), which this "
            f"eplb-toolkit does not know; unset {VARIABLE} and {RECORD_VARIABLE}, or use vLLM 0.33"
        )
    policy = policies.EPLB_POLICIES["default"]
    if place is not None:
        policy = make_policy(place, policies.AbstractEplbPolicy)
        logger.info("experts are placed by eplb-toolkit: %s=%s", VARIABLE, os.environ[VARIABLE])
    if record:
        policy = make_recorder(policy, Path(record))
        logger.info("loads are recorded by eplb-toolkit: %s=%s", RECORD_VARIABLE, record)
    policies.EPLB_POLICIES["default"] = policy


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


def make_recorder(policy: Any, path: Path) -> type:
    """Return a policy class that appends the loads it gets to a file and asks ``policy``.

    One rank writes, since all of them get the same. A draft model is a model of its own and asks
    on its own, so each model has a file: ``loads.jsonl`` becomes ``loads.58x256.jsonl``.
    """
    calls: dict[Path, int] = {}

    def rebalance_experts(cls: type, weight: torch.Tensor, *sizes: Any, **more: Any) -> Any:
        file = path.with_suffix(f".{'x'.join(map(str, weight.shape))}{path.suffix}")
        calls[file] = calls.get(file, -1) + 1
        # Before it serves, vLLM asks once without loads.
        if _is_first_rank() and bool((weight > 0).any()):
            record = load_record(calls[file], weight.double().cpu().numpy())
            try:
                with file.open("a", encoding="ascii") as stream:
                    stream.write(json.dumps(record) + "\n")
            except OSError as error:
                logger.warning("cannot record loads in %s: %s", file, error.strerror)
        return policy.rebalance_experts(weight, *sizes, **more)

    return type("RecordingPolicy", (policy,), {"rebalance_experts": classmethod(rebalance_experts)})


def _is_first_rank() -> bool:
    from torch import distributed  # noqa: PLC0415

    return not distributed.is_initialized() or distributed.get_rank() == 0
