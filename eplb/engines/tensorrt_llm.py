"""TensorRT-LLM: the YAML of ``moe_config.load_balancer``, and recorded expert statistics.

Source: NVIDIA/TensorRT-LLM, tensorrt_llm/llmapi/llm_args.py, MoeLoadBalancerConfig (a strict
pydantic model: unknown keys are refused; a layer that is not in a given map is a KeyError). Read on
the main branch, as released wheels are not on the package index. Shape letters: L layers, S slots.
"""

from __future__ import annotations

import json

import numpy as np
import yaml

from eplb.engines.engine import (
    MOE_AND_MTP,
    Engine,
    EnginePlan,
    check_keys,
    int_rows,
    model_path,
    quoted,
    whole_number,
)
from eplb.errors import InvalidInput
from eplb.plan import Plan
from eplb.slots import Placement
from eplb.source import Source, parsing
from eplb.strict_yaml import StrictLoader
from eplb.topology import MAX_SLOTS, Topology

__all__ = ["TENSORRT_LLM"]

_MAX_LAYERS = 1 << 16


def _encode(placement: Placement, topology: Topology, suffix: str) -> bytes:
    lines = ["initial_global_assignments:"]
    for layer_id, row in zip(placement.layer_ids, placement.phys_to_log_LS.tolist(), strict=True):
        lines.append(f"  {layer_id}: [{', '.join(map(str, row))}]")
    lines += [f"num_slots: {placement.num_slots}", "layer_updates_per_iter: 0", ""]
    return "\n".join(lines).encode("ascii")


def _read(source: Source, num_ranks: int) -> EnginePlan:
    with parsing(source, "YAML file"):
        document = yaml.load(source.path.read_bytes(), Loader=StrictLoader)  # noqa: S506
    keys = ("num_slots", "initial_global_assignments")
    document = check_keys(document, keys, ("layer_updates_per_iter",), source, "")
    num_slots = whole_number(document["num_slots"], "num_slots", source, 1, MAX_SLOTS)
    layers = document["initial_global_assignments"]
    if not isinstance(layers, dict) or not layers:
        raise InvalidInput(
            f"{source.name}: initial_global_assignments must map layer ids to expert ids, got "
            f"{quoted(layers)}"
        )
    for layer_id in layers:
        whole_number(layer_id, "a layer id of initial_global_assignments", source, 0, _MAX_LAYERS)
    ids = sorted(layers)
    rows = int_rows([layers[i] for i in ids], "initial_global_assignments", source)
    if len(rows[0]) != num_slots:
        raise InvalidInput(
            f"{source.name}: num_slots is {num_slots} and layer {ids[0]} has {len(rows[0])} slots; "
            "they must agree"
        )
    updates = document.get("layer_updates_per_iter", 0)
    updates = whole_number(updates, "layer_updates_per_iter", source, 0, _MAX_LAYERS)
    rows_LS = np.array(rows, np.int64)
    return EnginePlan(
        phys_to_log_LS=rows_LS,
        layer_ids=tuple(ids),
        num_experts=int(rows_LS.max()) + 1,
        notes=(f"layer_updates_per_iter is {updates}: the engine changes this placement",)
        if updates
        else (),
    )


def _remarks(plan: Plan) -> tuple[str, ...]:
    if plan.split == "even":
        return ()
    return (f"replicas take tokens in turn, evenly, not {plan.split!r}",)


def _launch(plan: Plan, placement: Placement, path: str, plan_path: str) -> tuple[str, ...]:
    num_ranks = plan.topology.num_ranks
    serve = (
        f"trtllm-llmapi-launch trtllm-serve {model_path(plan.model)} --tp_size {num_ranks} "
        f"--ep_size {num_ranks} --extra_llm_api_options options.yaml"
    )
    return (
        "# options.yaml",
        "enable_attention_dp: true",
        "moe_config:",
        "  backend: WIDEEP",
        f"  load_balancer: {json.dumps(path)}",
        "# on every rank, under mpirun or srun",
        serve,
    )


TENSORRT_LLM = Engine(
    name="tensorrt-llm",
    release="main branch",
    suffixes=(".yaml", ".yml"),
    rows=MOE_AND_MTP,
    empty_slots=False,
    shared_ranks=None,
    encode=_encode,
    read=_read,
    remarks=_remarks,
    launch=_launch,
)
