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

__all__ = ["is_topology_file", "named_topology", "read_topology", "with_bandwidths"]

_COUNTS = ("num_nodes", "ranks_per_node", "slots_per_rank")


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
        the file has too must be the same. Without ``slots_per_rank`` on either side it is 1.

    Raises
    ------
    InvalidInput
        The file is missing, is no topology, or contradicts the counts.
    """
    name = os.fspath(path)
    document = read_mapping(path, "topology", "a YAML mapping with num_nodes and so on")
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key not in Topology.__dataclass_fields__:
            known = Topology.__dataclass_fields__
            warnings.warn(
                f"{name}: {unknown_name('key in the topology', str(key), known)} (ignored)",
                stacklevel=2,
            )
        elif value is not None:
            values[key] = _value(key, value)
    for key in _COUNTS:
        asked = counts.get(key)
        if asked is not None and values.setdefault(key, asked) != asked:
            raise InvalidInput(
                f"{name}: {key} is {values[key]!r} and {asked} was asked for; give the same, or "
                "the file of that cluster"
            )
    values.setdefault("slots_per_rank", max(_numbers(values.get("rank_slots")), default=1))
    missing = [key for key in _COUNTS if key not in values]
    if missing:
        raise InvalidInput(f"{name}: {missing[0]} is missing; add it")
    try:
        return Topology(**values)
    except EplbError as error:
        raise type(error)(f"{name}: {error}") from None


def named_topology(name: str, **counts: int | None) -> Topology:
    """Return a preset or the topology of a file, with these counts.

    Raises
    ------
    InvalidInput
        There is no such preset or file, or a count is missing or contradicts the file.
    """
    if is_topology_file(name):
        return read_topology(name, **counts)
    if counts.get("num_nodes") is None:
        raise InvalidInput(f"--nodes is missing; the preset {name} is of a node")
    return topology_preset(
        name,
        num_nodes=counts["num_nodes"] or 1,
        ranks_per_node=counts.get("ranks_per_node"),
        slots_per_rank=counts.get("slots_per_rank") or 1,
    )


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
        other, source = read_topology(name), f"file {name}"
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
