"""SGLang: ``--init-expert-location`` files, ``.pt`` and ``.json``.

Source: sglang 0.5.23, srt/eplb/expert_location.py, compute_initial_expert_location_metadata. The
file is a dict with ``physical_to_logical_map`` [decoder layers, slots] and no other key, since the
dict is passed on as keyword arguments. Dense layers have rows too, and each row has to hold every
expert: the loader divides by the number of its slots. A draft model of multi-token prediction gets
no placement (ExpertLocationDispatchInfo.init_new returns none for it).
Recorder dumps are read by :mod:`eplb.engines.sglang_dump`. Shape letters: L layers, S slots.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

import numpy as np

from eplb.engines.engine import (
    DENSE,
    Engine,
    EnginePlan,
    check_keys,
    int_rows,
    model_path,
    num_redundant,
)
from eplb.errors import InvalidInput
from eplb.plan import Plan
from eplb.slots import Placement
from eplb.source import Source, parsing
from eplb.strict_json import parse_json
from eplb.topology import Topology
from eplb.torch_zip import load_pt
from eplb.torch_zip_writer import dump_pt

__all__ = ["SGLANG"]

_KEY = "physical_to_logical_map"


def _encode(placement: Placement, topology: Topology, suffix: str) -> bytes:
    if suffix == ".pt":
        return dump_pt({_KEY: placement.phys_to_log_LS})
    return json.dumps({_KEY: placement.phys_to_log_LS.tolist()}, separators=(",", ":")).encode()


def _read(source: Source, num_ranks: int) -> EnginePlan:
    if source.suffix == ".pt":
        content: Any = load_pt(source)
    else:
        with parsing(source, "JSON file"):
            content = parse_json(source.path.read_text(encoding="utf-8"))
    if isinstance(content, dict) and ("logical_count" in content or "records" in content):
        raise InvalidInput(
            f"{source.name} holds recorded loads and no placement; plan it with `eplb plan "
            f"{source.name}`"
        )
    values = check_keys(content, (_KEY,), (), source, "")[_KEY]
    if isinstance(values, np.ndarray):
        if values.ndim != 2 or values.dtype.kind not in "iu" or 0 in values.shape:
            raise InvalidInput(
                f"{source.name}: {_KEY} must be whole numbers [layers, slots], got "
                f"{values.dtype} of {list(values.shape)}"
            )
        values = values.tolist()
    rows_LS = np.array(int_rows(values, _KEY, source), np.int64)
    return EnginePlan(
        phys_to_log_LS=rows_LS,
        layer_ids=tuple(range(len(rows_LS))),
        num_experts=int(rows_LS.max()) + 1,
    )


def _remarks(plan: Plan) -> tuple[str, ...]:
    """Tell what becomes of the split rule: see _compute_logical_to_all_physical_map there."""
    if plan.split == "nearest":
        remark = (
            "a rank without a replica uses the first one of its node, where the plan counts on "
            "all replicas of the node"
        )
    else:
        keeps = "keep it with the plug-in" if plan.split == "even" else "plan for nearest"
        remark = (
            f"a map from a file is split by nearness, not {plan.split!r}, where an all-to-all "
            "backend is on (under static and dynamic dispatch alike), and evenly without one: "
            f"check the balance with `eplb evaluate --split nearest`, or {keeps} (see "
            "docs/engines/sglang.md)"
        )
    return (remark,)


def _launch(plan: Plan, placement: Placement, path: str, plan_path: str) -> tuple[str, ...]:
    topology = plan.topology
    start = (
        f"python -m sglang.launch_server --model-path {model_path(plan.model)} "
        f"--tp-size {topology.num_ranks} --ep-size {topology.num_ranks} "
        f"--nnodes {topology.num_nodes} --ep-num-redundant-experts {num_redundant(plan)} "
        "--init-expert-location"
    )
    start_with_file = f"{start} {shlex.quote(path)}"
    if plan.split == "nearest":
        return (f"{start_with_file} --moe-a2a-backend deepep --ep-dispatch-algorithm static",)
    plugged = f"EPLB_POLICY={shlex.quote(plan_path)} {start} RECORDED.pt"
    return (
        "# with an all-to-all backend, split by nearness",
        f"{start_with_file} --moe-a2a-backend deepep --ep-dispatch-algorithm static",
        "# with one, split evenly: the plug-in of eplb-toolkit, installed beside SGLang, answers",
        "# with the plan; RECORDED.pt is a dump of the recorder, whose loads it then ignores",
        f"{plugged} --moe-a2a-backend deepep --ep-dispatch-algorithm dynamic",
        "# without one, split evenly",
        f"{start_with_file} --moe-a2a-backend none --ep-dispatch-algorithm dynamic",
    )


SGLANG = Engine(
    name="sglang",
    release="0.5.23",
    suffixes=(".pt", ".json"),
    rows=DENSE,
    empty_slots=False,
    shared_ranks=(
        "with an all-to-all backend the weights of the second replica are not loaded, and tokens "
        "are still sent to it"
    ),
    encode=_encode,
    read=_read,
    remarks=_remarks,
    launch=_launch,
)
