"""vLLM-Ascend: the expert map of ``eplb_config.expert_map_path``, JSON.

Source: vllm-ascend 0.23.0, vllm_ascend/eplb/core/eplb_utils.py (expert_file_to_tensor,
generate_log2phy_map) and ascend_config.py (EplbConfig). Layers are counted by the order in which
they are made, the draft layer of multi-token prediction comes after ``moe_layer_count`` and gets
the number of slots of layer 0 without a placement. Recorded loads are a bare tensor
[layers, experts], which :mod:`eplb.engines.sglang_dump` reads.

Shape letters: L layers, R ranks, S slots, K slots of a rank.
"""

from __future__ import annotations

import json
import shlex

import numpy as np

from eplb.engines.engine import (
    MOE_ORDINALS,
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
from eplb.strict_json import parse_json
from eplb.topology import Topology

__all__ = ["VLLM_ASCEND"]


def _encode(placement: Placement, topology: Topology, suffix: str) -> bytes:
    slots_LRK = placement.phys_to_log_LS.reshape(
        placement.num_layers, topology.num_ranks, topology.slots_per_rank
    )
    layers = [
        {
            "layer_id": layer_id,
            "device_count": topology.num_ranks,
            "device_list": [
                {"device_id": rank, "device_expert": experts} for rank, experts in enumerate(ranks)
            ],
        }
        for layer_id, ranks in enumerate(slots_LRK.tolist())
    ]
    document = {"moe_layer_count": placement.num_layers, "layer_list": layers}
    return json.dumps(document, indent=1).encode()


def _read(source: Source, num_ranks: int) -> EnginePlan:
    with parsing(source, "JSON file"):
        document = parse_json(source.path.read_text(encoding="utf-8"))
    document = check_keys(document, ("moe_layer_count", "layer_list"), (), source, "")
    layers = document["layer_list"]
    if not isinstance(layers, list) or not layers or document["moe_layer_count"] != len(layers):
        raise InvalidInput(
            f"{source.name}: moe_layer_count is {quoted(document['moe_layer_count'])} and "
            f"layer_list has {len(layers) if isinstance(layers, list) else 'no'} layers; they "
            "must agree, and be at least 1"
        )
    rows = [_row(layer, i, num_ranks, source) for i, layer in enumerate(layers)]
    rows_LS = np.array(int_rows(rows, "layer_list", source), np.int64)
    return EnginePlan(
        phys_to_log_LS=rows_LS,
        layer_ids=tuple(range(len(rows_LS))),
        num_experts=int(rows_LS.max()) + 1,
    )


def _row(layer: object, index: int, num_ranks: int, source: Source) -> list[int]:
    at = f", layer_list[{index}]"
    layer = check_keys(layer, ("layer_id", "device_count", "device_list"), (), source, at)
    whole_number(layer["layer_id"], f"layer_list[{index}].layer_id", source, index, index)
    devices = layer["device_list"]
    if not isinstance(devices, list) or layer["device_count"] != len(devices):
        raise InvalidInput(
            f"{source.name}{at}: device_count is {quoted(layer['device_count'])} and device_list "
            f"has {len(devices) if isinstance(devices, list) else 'no'} devices; they must agree"
        )
    if len(devices) != num_ranks:
        raise InvalidInput(
            f"{source.name}{at} has {len(devices)} devices for {num_ranks} ranks; correct --nodes "
            "and --ranks-per-node"
        )
    row: list[int] = []
    for j, entry in enumerate(devices):
        there = f"{at}.device_list[{j}]"
        device = check_keys(entry, ("device_id", "device_expert"), (), source, there)
        whole_number(device["device_id"], f"{there[2:]}.device_id", source, j, j)
        experts = device["device_expert"]
        if not isinstance(experts, list) or not experts:
            raise InvalidInput(
                f"{source.name}{there}: device_expert must be a list of expert ids, got "
                f"{quoted(experts)}"
            )
        if len(row) != j * len(experts):
            raise InvalidInput(
                f"{source.name}{there}: device_expert has {len(experts)} experts and device 0 has "
                f"{len(row) // j}; every device needs the same number"
            )
        row += experts
    return row


def _remarks(plan: Plan) -> tuple[str, ...]:
    """Tell which replica a rank uses: generate_log2phy_map picks one for good."""
    remark = (
        "each rank sends all its tokens of an expert to one replica, number rank % replicas, not "
        f"{plan.split!r}: even only where the number of replicas divides the number of ranks"
    )
    return (remark,)


def _launch(plan: Plan, placement: Placement, path: str, plan_path: str) -> tuple[str, ...]:
    config = json.dumps({"eplb_config": {"expert_map_path": path}})
    serve = (
        f"vllm serve {model_path(plan.model)} --enable-expert-parallel "
        f"--data-parallel-size {plan.topology.num_ranks}"
    )
    return (f"{serve} --additional-config {shlex.quote(config)}",)


VLLM_ASCEND = Engine(
    name="vllm-ascend",
    release="0.23.0",
    suffixes=(".json",),
    rows=MOE_ORDINALS,
    empty_slots=False,
    shared_ranks=(
        "its table of a rank has one place an expert, so the slots of every rank after it would "
        "be counted wrongly"
    ),
    encode=_encode,
    read=_read,
    remarks=_remarks,
    launch=_launch,
)
