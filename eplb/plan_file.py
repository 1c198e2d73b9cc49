"""Plan files: YAML that people can read and programs can trust.

The layout is documented in docs/plan-file.md. A file is written whole or not at all, and what it
decides is covered by a digest that is checked on reading.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from eplb.errors import EplbError, InvalidInput, PlacementInvalid, unknown_name
from eplb.files import write_atomic
from eplb.model import MoEModel
from eplb.plan import PLAN_SCHEMA, Plan, Quality, content_digest
from eplb.slots import Placement
from eplb.split import SPLIT_RULES
from eplb.strict_yaml import read_mapping
from eplb.topology import Topology

__all__ = ["read_plan", "write_plan"]

_DECIDES = ("schema", "model", "topology", "split", "objective", "layers")
_KNOWN = (*_DECIDES, "split_weights", "quality", "provenance", "digest")


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan as YAML, atomically.

    Raises
    ------
    InvalidInput
        The file cannot be written; an old file is left as it was.
    """
    content = plan.content()
    layers, split_weights = content.pop("layers"), content.pop("split_weights", None)
    text = _dump(content) + "layers:\n"
    for layer_id, slots in layers.items():
        text += f"  {layer_id}: [{', '.join(map(str, slots))}]\n"
    if split_weights is not None:
        text += "split_weights:\n"
        for layer_id, weights in split_weights.items():
            text += f"  {layer_id}: [{', '.join(map(_float, weights))}]\n"
    rest: dict[str, Any] = {}
    if plan.quality is not None:
        rest["quality"] = plan.quality.to_dict()
    rest["provenance"] = dict(plan.provenance)
    rest["digest"] = plan.digest()
    write_atomic(path, (text + _dump(rest)).encode())


def _float(value: float) -> str:
    """Return a number to its last bit, which the digest needs; YAML takes 1e-09 for text."""
    mantissa, mark, exponent = repr(value).partition("e")
    return mantissa + ".0" * (bool(mark) and "." not in mantissa) + mark + exponent


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan and check it.

    A plan without a digest is read with a warning, as one written by hand.

    Raises
    ------
    InvalidInput
        The file is missing, is not a plan, has another schema, or its digest does not match.
    PlacementInvalid
        A layer has the wrong length, an unknown expert, or lacks one.
    """
    name = os.fspath(path)
    document = read_mapping(path, "plan", f"a YAML mapping with schema {PLAN_SCHEMA}")
    try:
        return _plan_of(document)
    except EplbError as error:
        raise type(error)(f"{name}: {error}") from None


def _plan_of(document: Mapping[Any, Any]) -> Plan:
    schema = document.get("schema")
    if schema != PLAN_SCHEMA:
        raise InvalidInput(
            f"schema is {_short(schema)}; this version reads {PLAN_SCHEMA}. "
            "Use the version of eplb-toolkit that wrote the plan, or plan again"
        )
    for key in document:
        if key not in _KNOWN:
            warnings.warn(
                f"{unknown_name('key in the plan', str(key), _KNOWN)} (ignored)", stacklevel=3
            )
    layers = _mapping(document, "layers")
    placement_rows = _rows(layers)
    model = _value_object(MoEModel, _mapping(document, "model"), "model", layer_ids=tuple(layers))
    topology = _value_object(Topology, _mapping(document, "topology"), "topology")
    _check_digest(document)
    for layer_id, slots in placement_rows.items():
        if len(slots) != topology.num_slots:
            raise PlacementInvalid(
                f"layer {layer_id} has {len(slots)} slots; {topology.num_ranks} ranks x "
                f"{topology.slots_per_rank} slots need {topology.num_slots}"
            )
    split = document.get("split", "even")
    if not isinstance(split, str) or split not in SPLIT_RULES:
        name = split if isinstance(split, str) else _short(split)
        raise unknown_name("split rule", name, SPLIT_RULES)
    objective = _mapping(document, "objective", required=False)
    for key in objective:
        if key != "statistic":
            warnings.warn(
                f"{unknown_name('key in objective', str(key), ('statistic',))} (ignored)",
                stacklevel=3,
            )
    statistic = objective.get("statistic", "mean")
    weights = _split_weights(document, placement_rows)
    return Plan(
        model=model,
        topology=topology,
        split=split,
        statistic=str(statistic),
        placement=Placement(
            phys_to_log_LS=np.array(list(placement_rows.values()), np.int64),
            layer_ids=tuple(layers),
            num_experts=model.num_experts,
            split_weights_LS=None if weights is None else np.array(weights, np.float64),
        ),
        quality=_quality(document),
        provenance=_mapping(document, "provenance", required=False),
    )


def _rows(layers: Mapping[Any, Any]) -> dict[int, list[int]]:
    if not layers:
        raise InvalidInput("layers is empty; a plan places at least one layer")
    previous = -1
    for layer_id, slots in layers.items():
        if type(layer_id) is not int or layer_id <= previous:
            raise InvalidInput(
                "layers must be keyed by decoder layer ids from 0 on in increasing order; found "
                f"{_short(layer_id)}" + (f" after {previous}" if previous >= 0 else "")
            )
        previous = layer_id
        if type(slots) is not list or not slots:
            raise PlacementInvalid(f"layer {layer_id} must be a list of expert ids")
        for slot, expert in enumerate(slots):
            if type(expert) is not int or not -(2**31) <= expert < 2**31:
                raise PlacementInvalid(
                    f"layer {layer_id}, slot {slot}: {_short(expert)} is not an expert id"
                )
    return dict(layers)


def _split_weights(
    document: Mapping[Any, Any], rows: Mapping[int, list[int]]
) -> list[list[float]] | None:
    weights = _mapping(document, "split_weights", required=False)
    if not weights:
        return None
    if list(weights) != list(rows):
        raise InvalidInput("split_weights must name the layers that layers names, in this order")
    for layer_id, values in weights.items():
        if type(values) is not list or len(values) != len(rows[layer_id]):
            raise PlacementInvalid(
                f"split_weights of layer {layer_id} must be a list of {len(rows[layer_id])} "
                "fractions, one a slot"
            )
        for slot, value in enumerate(values):
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise PlacementInvalid(
                    f"split_weights of layer {layer_id}, slot {slot}: {_short(value)} is no "
                    "fraction from 0 to 1"
                )
    return list(weights.values())


def _check_digest(document: Mapping[Any, Any]) -> None:
    if "digest" not in document:
        warnings.warn("the plan has no digest, so nothing shows whether it is whole", stacklevel=4)
        return
    content = {k: v for k, v in document.items() if k not in ("quality", "provenance", "digest")}
    try:
        expected = content_digest(content)
    except (TypeError, ValueError):
        raise InvalidInput("the plan holds values that JSON cannot express") from None
    if document["digest"] != expected:
        raise InvalidInput(
            f"the digest is {_short(document['digest'])} and the content gives {expected}; the "
            "file was changed or damaged. Fetch it again, plan again, or remove the digest line "
            "of a plan that you changed on purpose"
        )


def _quality(document: Mapping[Any, Any]) -> Quality | None:
    values = _mapping(document, "quality", required=False)
    if not values:
        return None
    figures = {}
    for field, declared in Quality.__dataclass_fields__.items():
        value: Any = values.get(field)
        if value is None and declared.default is None:
            continue
        # Compared as it is: a whole number in a file can be too large for a float.
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise InvalidInput(f"quality.{field} must be a finite number, got {_short(value)}")
        figures[field] = float(value)
    return Quality(**figures)


def _value_object(kind: Any, values: Mapping[Any, Any], section: str, **given: Any) -> Any:
    """Build a value object from a section; keys it does not have are ignored with a warning."""
    fields = {name: field for name, field in kind.__dataclass_fields__.items() if name not in given}
    known = dict(given)
    for key, value in values.items():
        if key not in fields:
            warnings.warn(
                f"{unknown_name(f'key in {section}', str(key), fields)} (ignored)", stacklevel=5
            )
        elif value is not None:
            is_list = type(value) is list and "tuple" in str(fields[key].type)
            known[key] = tuple(value) if is_list else value
    missing = [n for n in ("name",) if section == "model" and n not in known]
    missing += [n for n in _required(section) if n not in known]
    if missing:
        raise InvalidInput(f"{section}.{missing[0]} is missing; add it")
    for key, value in known.items():
        if type(value) not in (int, float, str, tuple):
            raise InvalidInput(f"{section}.{key} must be a number or text, got {_short(value)}")
    try:
        return kind(**known)
    except TypeError as error:
        raise InvalidInput(f"{section}: {error}") from None


def _required(section: str) -> tuple[str, ...]:
    if section == "model":
        return ("num_experts",)
    return ("num_nodes", "ranks_per_node", "slots_per_rank")


def _mapping(document: Mapping[Any, Any], key: str, *, required: bool = True) -> dict[Any, Any]:
    value = document.get(key)
    if value is None and not required:
        return {}
    if not isinstance(value, dict):
        state = "missing" if value is None else f"{_short(value)}, not a mapping"
        raise InvalidInput(f"{key} is {state}; see the plan layout in the docs")
    return value


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, (list, dict)) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """YAML's safe dumper without anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _dump(values: Mapping[str, Any]) -> str:
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, default_flow_style=None,
                          width=100)  # fmt: skip
    return text
