"""vLLM: the file formats proposed for it, and how a plan gets into a release that has none.

Release 0.33.0 reads no placement from a file; :mod:`eplb.runtime.vllm_policy` brings a plan in
through its rebalancing. The formats here are those of the open pull request 41141 of
vllm-project/vllm: ``initial_mapping_path`` (JSON) and ``expert_load_stats_path`` (JSON lines).
Layers are counted among those with experts; a draft model of multi-token prediction is a model of
its own.

Shape letters: W windows, L layers, E logical experts, S slots.
"""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.engines.engine import (
    MAX_EXPERTS,
    MOE_ORDINALS,
    Engine,
    EnginePlan,
    check_keys,
    int_rows,
    model_path,
    num_redundant,
    quoted,
    whole_number,
)
from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.plan import Plan
from eplb.slots import Placement
from eplb.source import Source, parsing
from eplb.strict_json import parse_json
from eplb.topology import MAX_SLOTS, Topology

__all__ = ["VLLM", "load_record", "read_statistics"]

_MAPPING, _LOADS = "eplb_initial_mapping", "eplb_load_stats"
# Of the same files, without loads in them.
_OTHER_RECORDS = ("eplb_load_meta", "session_metadata", "bench_run_start")
_VERSION = 1


def _encode(placement: Placement, topology: Topology, suffix: str) -> bytes:
    document = {
        "record_type": _MAPPING,
        "version": _VERSION,
        "num_redundant_experts": placement.num_slots - placement.num_experts,
        "num_slots": placement.num_slots,
        "initial_global_assignments": {
            str(i): row for i, row in enumerate(placement.phys_to_log_LS.tolist())
        },
    }
    return json.dumps(document, separators=(",", ":")).encode()


def _read(source: Source, num_ranks: int) -> EnginePlan:
    with parsing(source, "JSON file"):
        document = parse_json(source.path.read_text(encoding="utf-8"))
    keys = ("record_type", "version", "num_redundant_experts", "num_slots",
            "initial_global_assignments")  # fmt: skip
    document = check_keys(document, keys, (), source, "")
    _check_record(document, _MAPPING, source, "")
    num_slots = whole_number(document["num_slots"], "num_slots", source, 1, MAX_SLOTS)
    redundant = whole_number(
        document["num_redundant_experts"], "num_redundant_experts", source, 0, num_slots - 1
    )
    layers = document["initial_global_assignments"]
    if not isinstance(layers, dict) or set(layers) != {str(i) for i in range(len(layers))}:
        raise InvalidInput(
            f"{source.name}: initial_global_assignments must have the keys '0', '1' and so on, "
            "one for each layer with experts"
        )
    rows = [layers[str(i)] for i in range(len(layers))]
    rows_LS = np.array(int_rows(rows, "initial_global_assignments", source), np.int64)
    if rows_LS.shape[1] != num_slots:
        raise InvalidInput(
            f"{source.name}: num_slots is {num_slots} and layer 0 has {rows_LS.shape[1]} slots; "
            "they must agree"
        )
    return EnginePlan(
        phys_to_log_LS=rows_LS,
        layer_ids=tuple(range(len(rows_LS))),
        num_experts=num_slots - redundant,
    )


def read_statistics(source: Source) -> LoadProfile:
    """Read recorded loads, JSON lines, one window a record.

    Each record has the loads of physical experts and the map that was in force. A last line that
    was cut off, as by a server that was stopped, is left out with a warning.

    Raises
    ------
    InvalidInput
        A line is not a record of this version, or records disagree on their shape.
    """
    with parsing(source, "file of JSON lines"):
        lines = source.path.read_text(encoding="utf-8").splitlines(keepends=True)
    maps: list[IntArray] = []
    loads: list[FloatArray] = []
    steps: list[Any] = []
    for number, line in enumerate(lines, start=1):
        at = f", line {number}"
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                warnings.warn(f"{source.name}{at} was cut off and is left out", stacklevel=2)
                continue
            raise InvalidInput(
                f"{source.name}{at} is not JSON ({str(error)[:80]}); remove it, or record again"
            ) from None
        if not isinstance(record, dict) or "record_type" not in record:
            raise InvalidInput(f"{source.name}{at}: expected a record with 'record_type', got "
                               f"{quoted(record)}")  # fmt: skip
        if record["record_type"] in _OTHER_RECORDS:
            continue
        _check_record(record, _LOADS, source, at)
        map_LS, load_LS = _arrays(record, source, at)
        if maps and map_LS.shape != maps[0].shape:
            raise InvalidInput(
                f"{source.name}{at} has [layers, slots] {list(map_LS.shape)} and an earlier record "
                f"{list(maps[0].shape)}; keep recordings of different servers apart"
            )
        maps.append(map_LS)
        loads.append(load_LS)
        steps.append(record.get("step"))
    if not maps:
        raise InvalidInput(f"{source.name} has no record of the type {_LOADS!r}")
    return LoadProfile.from_counts(
        _logical(np.stack(loads), np.stack(maps)),
        metadata={
            "engine": "vllm",
            "layer_numbering": MOE_ORDINALS,
            "steps": [step for step in steps if type(step) is int],
        },
        source=source.name,
    )


def load_record(step: int, load_LE: FloatArray) -> dict[str, Any]:
    """Return a record of loads of logical experts, each in a slot of its own."""
    num_layers, num_experts = load_LE.shape
    return {
        "record_type": _LOADS,
        "version": _VERSION,
        "step": step,
        "expert_load": load_LE.astype(np.int64).tolist(),
        "p2l_map": [list(range(num_experts))] * num_layers,
    }


def _check_record(record: Mapping[str, Any], kind: str, source: Source, at: str) -> None:
    if record.get("record_type") != kind:
        raise InvalidInput(
            f"{source.name}{at}: record_type must be {kind!r}, got {quoted(record['record_type'])}"
        )
    if type(record.get("version")) is not int or record["version"] != _VERSION:
        raise InvalidInput(
            f"{source.name}{at}: version must be {_VERSION}, got {quoted(record.get('version'))}; "
            "a newer vLLM needs a newer eplb-toolkit"
        )


def _arrays(record: Mapping[str, Any], source: Source, at: str) -> tuple[Any, Any]:
    """Return the map and the loads of a record, both [L, S]."""
    arrays = []
    for key in ("p2l_map", "expert_load"):
        try:
            array = np.array(record.get(key))
        except (ValueError, OverflowError):
            array = np.array(None)
        if array.ndim != 2 or array.dtype.kind not in ("iu" if key == "p2l_map" else "iuf"):
            raise InvalidInput(
                f"{source.name}{at}: {key} must be numbers [layers, slots], all rows of one length"
            )
        arrays.append(array)
    map_LS, load_LS = arrays
    if map_LS.shape != load_LS.shape:
        raise InvalidInput(
            f"{source.name}{at}: p2l_map is {list(map_LS.shape)} and expert_load "
            f"{list(load_LS.shape)}; they must agree"
        )
    # -1: a slot that elastic expert parallelism took out of service.
    if map_LS.min() < -1 or map_LS.max() > MAX_EXPERTS:
        raise InvalidInput(f"{source.name}{at}: p2l_map has ids outside -1 to {MAX_EXPERTS}")
    return map_LS, load_LS


def _logical(load_WLS: Any, map_WLS: Any) -> FloatArray:
    """Return the loads of logical experts, summed over their slots, shape [W, L, E]."""
    num_windows, num_layers, _ = load_WLS.shape
    num_experts = int(map_WLS.max()) + 1
    load_WLE = np.zeros((num_windows, num_layers, num_experts + 1))
    window, layer = np.ogrid[:num_windows, :num_layers]
    np.add.at(load_WLE, (window[..., np.newaxis], layer[..., np.newaxis], map_WLS), load_WLS)
    return load_WLE[:, :, :-1]


def _remarks(plan: Plan) -> tuple[str, ...]:
    if plan.split == "even":
        return ()
    return (f"replicas are chosen by a hash of the token, evenly, not {plan.split!r}",)


def _launch(plan: Plan, placement: Placement, path: str, plan_path: str) -> tuple[str, ...]:
    serve = (
        f"vllm serve {model_path(plan.model)} --data-parallel-size {plan.topology.num_ranks} "
        "--enable-expert-parallel --enable-eplb --eplb-config"
    )
    slots: dict[str, Any] = {"num_redundant_experts": num_redundant(plan)}
    pending = {**slots, "initial_mapping_path": path, "disable_online_rebalancing": True}
    # A short interval, so that the first rearrangement, which brings the plan in, comes soon.
    now = {**slots, "window_size": 100, "step_interval": 400}
    return (
        "# vLLM 0.33.0 reads no placement: the plug-in of eplb-toolkit, installed beside it,",
        "# brings the plan in with the first rearrangement and keeps it",
        f"EPLB_POLICY={shlex.quote(plan_path)} {serve} {shlex.quote(json.dumps(now))}",
        "# a vLLM with pull request #41141",
        f"{serve} {shlex.quote(json.dumps(pending))}",
    )


VLLM = Engine(
    name="vllm",
    release="0.33.0",
    suffixes=(".json",),
    rows=MOE_ORDINALS,
    empty_slots=False,
    shared_ranks=None,
    encode=_encode,
    read=_read,
    remarks=_remarks,
    launch=_launch,
)
