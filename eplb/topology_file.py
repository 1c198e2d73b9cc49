"""Topology files: the counts, links and ranks of a cluster as it was measured.

YAML with the fields of :class:`eplb.topology.Topology`, of which ``num_nodes`` and
``ranks_per_node`` have to be there; ``eplb selftest --write-topology`` writes them.
"""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from eplb.errors import EplbError, InvalidInput, unknown_name
from eplb.strict_yaml import read_mapping
from eplb.topology import TOPOLOGY_PRESETS, Topology, topology_preset

__all__ = ["is_topology_file", "read_topology", "with_bandwidths"]

# Of a cluster, and the options that say them.
_COUNTS = {
    "num_nodes": "--nodes",
    "ranks_per_node": "--ranks-per-node",
    "slots_per_rank": "--slots-per-rank",
}


def is_topology_file(name: str) -> bool:
    """Tell whether this names a file, and not a preset."""
    return name not in TOPOLOGY_PRESETS and (os.sep in name or bool(Path(name).suffix))


def read_topology(path: str | os.PathLike[str], **counts: int | None) -> Topology:
    """Read a topology file.

    Parameters
    ----------
    path : path
    **counts : int, optional
        ``num_nodes``, ``ranks_per_node`` and ``slots_per_rank``, where they are known: a count that
        the file has too must be the same.

    Raises
    ------
    InvalidInput
        The file is missing, is no topology, or contradicts the counts.
    """
    name = os.fspath(path)
    values = _fields(path)
    for key in _COUNTS:
        asked = counts.get(key)
        if asked is not None and values.setdefault(key, asked) != asked:
            raise InvalidInput(
                f"{name}: {key} is {values[key]!r} and {asked} was asked for; give the same, or "
                "the file of that cluster"
            )
    if "rank_slots" in values:
        values.setdefault("slots_per_rank", max(_numbers(values["rank_slots"]), default=0))
    for key, option in _COUNTS.items():
        if key not in values:
            raise InvalidInput(f"{name}: {key} is missing; add it, or give {option}")
    return _topology(name, values)


def with_bandwidths(topology: Topology, name: str | None) -> tuple[Topology, str]:
    """Return a topology with the bandwidths of a preset or file, and words for where they are from.

    Without a name they stay those of the plan.

    Raises
    ------
    InvalidInput
        There is no such preset or file.
    """
    if name is None:
        return topology, "plan"
    if is_topology_file(name):
        # Its bandwidths alone are asked for, whatever the counts.
        other = _topology(name, dict.fromkeys(_COUNTS, 1) | _fields(name))
        source = f"file {name}"
    else:
        other, source = topology_preset(name, num_nodes=1, slots_per_rank=1), f"preset {name}"
    return (
        replace(
            topology,
            intra_node_bytes_per_s=other.intra_node_bytes_per_s,
            inter_node_bytes_per_s=other.inter_node_bytes_per_s,
        ),
        source,
    )


def _fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a file says of a topology."""
    name, known = os.fspath(path), Topology.__dataclass_fields__
    document = read_mapping(path, "topology", "a YAML mapping with num_nodes and so on")
    for key in document:
        if key not in known:
            text = unknown_name("key in the topology", str(key), known)
            warnings.warn(f"{name}: {text} (ignored)", stacklevel=3)
    return {k: _value(k, v) for k, v in document.items() if k in known and v is not None}


def _topology(name: str, values: dict[str, Any]) -> Topology:
    try:
        return Topology(**values)
    except EplbError as error:
        raise type(error)(f"{name}: {error}") from None


def _value(key: str, value: object) -> object:
    if type(value) is list:
        return tuple(value)
    if type(value) is str and key.endswith("_per_s"):
        # YAML takes 3.1e11, without a sign in it, for text.
        with suppress(ValueError):
            return float(value)
    return value


def _numbers(values: object) -> list[int]:
    return [n for n in values if type(n) is int] if isinstance(values, tuple) else []
