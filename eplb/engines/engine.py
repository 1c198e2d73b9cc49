"""What the converters have to know of a serving engine: one interface, filled in by each module.

Shape letters: L layers, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from eplb.arrays import IntArray
from eplb.errors import InvalidInput
from eplb.model import UNKNOWN_MODEL, MoEModel
from eplb.plan import Plan
from eplb.slots import Placement
from eplb.source import Source
from eplb.topology import Topology

__all__ = [
    "DENSE",
    "MOE_AND_MTP",
    "MOE_ORDINALS",
    "Engine",
    "EnginePlan",
    "check_keys",
    "int_rows",
    "model_path",
    "num_redundant",
    "quoted",
    "whole_number",
]

# What the rows of an engine's file stand for.
DENSE = "every decoder layer, dense ones too"
MOE_AND_MTP = "layers with experts by decoder id, multi-token prediction included"
MOE_ORDINALS = "layers with experts, counted from 0, multi-token prediction left out"

# Far above any model, and small enough for every engine's 32-bit ids.
MAX_EXPERTS = 1 << 20

# A key that only one engine's files have, to name the engine of a file given for another's.
_TELLTALES = {
    "physical_to_logical_map": "sglang",
    "logical_count": "sglang",
    "record_type": "vllm",
    "initial_global_assignments": "tensorrt-llm",
    "layer_updates_per_iter": "tensorrt-llm",
    "moe_layer_count": "vllm-ascend",
    "schema": "this project (see eplb export)",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EnginePlan:
    """What a plan file of an engine holds.

    Parameters
    ----------
    phys_to_log_LS : array of int, shape [L, S]
        Logical expert in each slot, rank by rank; -1 for an empty one.
    layer_ids : tuple of int
        Rows as the engine numbers them.
    num_experts : int
    notes : tuple of str
        What the file cannot tell.
    """

    phys_to_log_LS: IntArray
    layer_ids: tuple[int, ...]
    num_experts: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A serving engine at the release whose source was read.

    Parameters
    ----------
    name, release : str
    suffixes : tuple of str
        Of its plan files.
    rows : str
        ``DENSE``, ``MOE_AND_MTP`` or ``MOE_ORDINALS``.
    empty_slots : bool
        Whether its file can leave a slot empty.
    shared_ranks : str, optional
        Why two replicas of an expert on one rank cannot be written; ``None`` if they can.
    encode : callable
        (placement, topology, suffix) to bytes. The placement has the rows the engine wants.
    read : callable
        (source, num_ranks) to an :class:`EnginePlan`.
    remarks : callable
        What the engine will do otherwise than the plan says, one text each.
    launch : callable
        (plan, placement as written, path of the file, path of the plan) to the lines to start the
        engine with.
    """

    name: str
    release: str
    suffixes: tuple[str, ...]
    rows: str
    empty_slots: bool
    shared_ranks: str | None
    encode: Callable[[Placement, Topology, str], bytes]
    read: Callable[[Source, int], EnginePlan]
    remarks: Callable[[Plan], tuple[str, ...]]
    launch: Callable[[Plan, Placement, str, str], tuple[str, ...]]


def num_redundant(plan: Plan) -> int:
    """Return the slots of a layer beyond one an expert."""
    return plan.topology.num_slots - plan.model.num_experts


def model_path(model: MoEModel) -> str:
    """Return what stands for the checkpoint in a command to launch an engine."""
    return "MODEL" if model.name == UNKNOWN_MODEL else f"MODEL-{model.name}"


def quoted(value: object) -> str:
    """Return a value as an error shows it, whatever its size."""
    text = f"a {type(value).__name__}" if isinstance(value, (list, dict)) else _text(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(value: object) -> str:
    # Python refuses to print whole numbers of thousands of digits.
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a whole number of {value.bit_length()} bits"
    return repr(value)


def check_keys(
    document: object, required: tuple[str, ...], optional: tuple[str, ...], source: Source, at: str
) -> Mapping[Any, Any]:
    """Return a mapping that has the required keys and no others than the optional ones.

    Raises
    ------
    InvalidInput
        It is no mapping, or its keys are not those.
    """
    where = f"{source.name}{at}"
    if not isinstance(document, Mapping):
        raise InvalidInput(f"{where}: expected the keys {', '.join(required)}, got "
                           f"{quoted(document)}")  # fmt: skip
    for key in document:
        if key not in (*required, *optional):
            other = _TELLTALES.get(key) if isinstance(key, str) else None
            hint = f"; this looks like a file of {other}" if other else ""
            expected = ", ".join((*required, *optional))
            raise InvalidInput(f"{where}: key {quoted(key)} is not one of {expected}{hint}")
    for key in required:
        if key not in document:
            raise InvalidInput(f"{where}: key {key!r} is missing; expected {', '.join(required)}")
    return document


def whole_number(value: object, name: str, source: Source, least: int, most: int) -> int:
    """Return a whole number within limits.

    Raises
    ------
    InvalidInput
        It is not one.
    """
    if type(value) is not int or not least <= value <= most:
        raise InvalidInput(
            f"{source.name}: {name} must be a whole number from {least} to {most}, got "
            f"{quoted(value)}"
        )
    return value


def int_rows(rows: object, name: str, source: Source, *, empty: bool = False) -> list[list[int]]:
    """Return rows of expert ids, all of one length.

    Raises
    ------
    InvalidInput
        They are no lists of ids, or of different lengths.
    """
    if not isinstance(rows, list) or not rows:
        raise InvalidInput(f"{source.name}: {name} must be a list of layers, got {quoted(rows)}")
    for i, row in enumerate(rows):
        if not isinstance(row, list) or not row:
            raise InvalidInput(
                f"{source.name}: {name}[{i}] must be a list of expert ids, got {quoted(row)}"
            )
        if len(row) != len(rows[0]):
            raise InvalidInput(
                f"{source.name}: {name}[{i}] has {len(row)} slots and {name}[0] has "
                f"{len(rows[0])}; every layer needs the same number"
            )
        for slot, expert in enumerate(row):
            whole_number(
                expert, f"{name}[{i}], slot {slot}", source, -1 if empty else 0, MAX_EXPERTS
            )
    return rows
