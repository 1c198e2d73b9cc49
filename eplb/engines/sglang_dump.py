"""Dumps of SGLang's expert distribution recorder (srt/eplb/expert_distribution.py, 0.5.23).

The recorder writes one of two things. ``stat`` modes give ``logical_count [buffer, L, E]``, summed
over ranks: a ring buffer, so unused rows are all zero and rows are not in order of time.
``per_pass`` and ``per_token`` modes give one file a rank: a list of records with the rank's own
part of ``global_physical_count [L, S]``, and the map from physical to logical experts at the end.
Layers are absolute: dense ones have rows of zeros.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.source import Source, parsing
from eplb.strict_json import parse_json
from eplb.torch_zip import load_pt
from eplb.torch_zip_writer import dump_pt

__all__ = ["read_json", "read_pt", "to_json", "to_pt"]

# Far above any model there is; keeps a damaged layer id from asking for terabytes of zeros.
MAX_LAYERS = 1 << 14


def read_json(source: Source) -> LoadProfile:
    """Read an object with ``logical_count`` of the shape ``[L, E]`` or ``[steps, L, E]``."""
    with parsing(source, "JSON file"):
        content = parse_json(source.path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "logical_count" not in content:
            raise InvalidInput(
                f"{source.name} has no 'logical_count'; give a dump of SGLang's expert "
                "distribution recorder"
            )
        return _from_logical_count(content["logical_count"], source)


def read_pt(source: Source) -> LoadProfile:
    """Read a dump in any of the recorder's modes, or a bare tensor of counts."""
    content = load_pt(source)
    with parsing(source, "recorder dump"):
        if isinstance(content, np.ndarray):
            return LoadProfile.from_counts(content, source=source.name)
        if isinstance(content, Mapping) and "logical_count" in content:
            return _from_logical_count(content["logical_count"], source)
        if isinstance(content, Mapping) and "records" in content:
            return _from_records(content, source)
        raise InvalidInput(
            f"{source.name} has neither 'logical_count' nor 'records'; give a dump of SGLang's "
            "expert distribution recorder, or a tensor [layers, experts]"
        )


def to_json(profile: LoadProfile) -> bytes:
    """Return loads as ``logical_count``, with rows of zeros for layers that have none."""
    counts = _whole(absolute_layers(profile))
    return json.dumps({"logical_count": counts.tolist()}, separators=(",", ":")).encode()


def to_pt(profile: LoadProfile) -> bytes:
    """Return loads as the recorder's ``stat`` mode dumps them, which SGLang plans for at start."""
    return dump_pt({"logical_count": _whole(absolute_layers(profile))})


def _whole(counts: NDArray[Any]) -> NDArray[Any]:
    """Return whole counts as such, others as they are."""
    return counts.astype(np.int64) if (counts == np.floor(counts)).all() else counts


def absolute_layers(profile: LoadProfile) -> NDArray[Any]:
    """Return counts with a row for every decoder layer up to the last, shape [W, layers, E].

    Raises
    ------
    InvalidInput
        Layer ids are too large for that.
    """
    if profile.layer_ids[-1] >= MAX_LAYERS:
        raise InvalidInput(
            f"{profile.source} has a layer {profile.layer_ids[-1]}, and this format has a row for "
            f"every layer up to the last, {MAX_LAYERS} at most; write .npz or .csv"
        )
    shape = (profile.num_windows, profile.layer_ids[-1] + 1, profile.num_experts)
    counts = np.zeros(shape)
    counts[:, profile.layer_ids] = profile.counts_WLE
    return counts


def _from_logical_count(values: Any, source: Source) -> LoadProfile:
    metadata: dict[str, Any] = {"engine": "sglang"}
    profile = LoadProfile.from_counts(values, metadata=metadata, source=source.name)
    if profile.num_windows > 1:
        metadata["window_order"] = "unknown: the recorder's buffer is a ring"
    return replace(profile, metadata=metadata)


def _rank_of(records: list[Any]) -> int | None:
    rank = records[0].get("rank")
    return rank if isinstance(rank, int) else None


def _from_records(content: Mapping[str, Any], source: Source) -> LoadProfile:
    records, phys_to_log = content["records"], content.get("last_physical_to_logical_map")
    if not isinstance(records, list) or not records or not isinstance(phys_to_log, np.ndarray):
        raise InvalidInput(
            f"{source.name} needs a list of records and a last_physical_to_logical_map; record "
            "again, or use the recorder's stat mode"
        )
    if phys_to_log.ndim != 2 or phys_to_log.dtype.kind not in "iu" or phys_to_log.min() < 0:
        raise InvalidInput(f"{source.name}: last_physical_to_logical_map must be [layers, slots]")
    num_experts = int(phys_to_log.max()) + 1
    if num_experts > phys_to_log.shape[1]:
        raise InvalidInput(f"{source.name}: the map names more experts than there are slots")
    # Micro-batches of a forward pass have records of their own.
    passes: dict[Any, NDArray[Any]] = {}
    for record in records:
        count = record["global_physical_count"]
        if count.shape != phys_to_log.shape:
            raise InvalidInput(
                f"{source.name}: a record counts {list(count.shape)} and the map is "
                f"{list(phys_to_log.shape)}; both must be [layers, slots]"
            )
        pass_id = record.get("forward_pass_id")
        logical = passes.setdefault(pass_id, np.zeros((len(phys_to_log), num_experts)))
        np.add.at(logical, (np.arange(len(phys_to_log))[:, np.newaxis], phys_to_log), count)
    return LoadProfile.from_counts(
        np.stack(list(passes.values())),
        metadata={
            "engine": "sglang",
            "recorded_by_rank": _rank_of(records),
            "assumes": "the placement at the end of the recording held throughout",
        },
        source=source.name,
    )
