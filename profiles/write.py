"""Write a profile in the format that its file name says."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb.engines.sglang_dump import absolute_layers, to_json, to_pt
from eplb.errors import unknown_name
from eplb.files import write_atomic
from eplb.load_profile import LoadProfile
from eplb.profiles.csv_file import to_csv

__all__ = ["WRITERS", "write_profile"]


def write_profile(profile: LoadProfile, path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Write a profile, atomically.

    Returns
    -------
    lost : tuple of str
        What the profile has and the format cannot hold.

    Raises
    ------
    InvalidInput
        Unknown format, or the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise unknown_name(f"profile format of {os.fspath(path)}:", suffix, WRITERS)
    encode, kept = WRITERS[suffix]
    write_atomic(path, encode(profile))
    has = {
        "scenario": set(profile.scenario_W) != {"default"},
        "phase": set(profile.phase_W) != {"mixed"},
        "tokens": profile.tokens_W is not None,
        "time_s": profile.time_s_W is not None,
        "metadata": bool(profile.metadata),
    }
    return tuple(name for name, present in has.items() if present and name not in kept)


def _to_npz(profile: LoadProfile) -> bytes:
    arrays: dict[str, Any] = {
        "counts": _smallest(profile.counts_WLE),
        "layer_ids": np.array(profile.layer_ids, np.int64),
        "scenario": np.array(profile.scenario_W, np.str_),
        "phase": np.array(profile.phase_W, np.str_),
    }
    if profile.tokens_W is not None:
        arrays["tokens"] = profile.tokens_W
    if profile.time_s_W is not None:
        arrays["time_s"] = profile.time_s_W
    if profile.metadata:
        arrays["metadata"] = np.array(json.dumps(dict(profile.metadata), sort_keys=True))
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def _to_npy(profile: LoadProfile) -> bytes:
    stream = io.BytesIO()
    np.save(stream, _smallest(absolute_layers(profile)))
    return stream.getvalue()


def _smallest(counts: NDArray[Any]) -> NDArray[Any]:
    """Return whole counts in the smallest type that holds them, others as they are."""
    if counts.max() < 2**53 and (counts == np.floor(counts)).all():
        return counts.astype(np.min_scalar_type(int(counts.max())))
    return counts


Writer = Callable[[LoadProfile], bytes]
WRITERS: dict[str, tuple[Writer, frozenset[str]]] = {
    ".csv": (to_csv, frozenset({"scenario", "phase"})),
    ".json": (to_json, frozenset()),
    ".npy": (_to_npy, frozenset()),
    ".npz": (_to_npz, frozenset({"scenario", "phase", "tokens", "time_s", "metadata"})),
    ".pt": (to_pt, frozenset()),
}
