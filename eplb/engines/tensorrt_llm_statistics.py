"""Loads that TensorRT-LLM records: a folder of ``meta_info.json`` and ``rank*.safetensors``.

Source: NVIDIA/TensorRT-LLM, examples/wide_ep/ep_load_balancer/utils.py, load_expert_statistic.
Each rank's file maps ``{iteration}_{layer}`` to counts [experts] of the tokens of that rank; the
sum over ranks is the load. Layers are decoder ids. Files ``*_raw.safetensors`` hold choices of
single tokens, not counts. Shape letters: W windows, L layers, E logical experts.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eplb.engines.engine import MAX_EXPERTS, quoted, whole_number
from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.source import Source, parsing
from eplb.strict_json import parse_json

__all__ = ["META", "read_statistics"]

META = "meta_info.json"
_RANK_FILE = re.compile(r"rank\d{1,6}\.safetensors")
_KEY = re.compile(r"(\d{1,9})_(\d{1,6})")


def read_statistics(source: Source) -> LoadProfile:
    """Read recorded loads, one window an iteration.

    Raises
    ------
    InvalidInput
        The folder is not such a recording, ranks disagree, or the package ``safetensors`` is not
        installed.
    """
    meta = source.path / META
    with parsing(Source(path=meta, array=None, name=f"{source.name}/{META}"), "JSON file"):
        content = parse_json(meta.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "num_experts" not in content:
        raise InvalidInput(f"{source.name}/{META} must be an object with 'num_experts'")
    num_experts = whole_number(content["num_experts"], "num_experts", source, 1, MAX_EXPERTS)
    files = sorted(p for p in source.path.iterdir() if _RANK_FILE.fullmatch(p.name))
    if not files:
        raise InvalidInput(f"{source.name} has no rank*.safetensors; copy those of all ranks")
    expected = content.get("ep_size", len(files))
    if expected != len(files):
        raise InvalidInput(
            f"{source.name} has {len(files)} rank*.safetensors and {META} says ep_size "
            f"{quoted(expected)}; copy those of all ranks"
        )
    totals: dict[tuple[int, int], NDArray[np.int64]] = {}
    for path in files:
        # A rank without tokens in an iteration has no counts for it.
        for key, count in _rank_counts(path, num_experts).items():
            totals[key] = totals[key] + count if key in totals else count
    iterations = sorted({iteration for iteration, _ in totals})
    layers = sorted({layer for _, layer in totals})
    if len(totals) != len(iterations) * len(layers):
        raise InvalidInput(f"{source.name}: not every iteration has every layer; record again")
    counts_WLE = np.array([[totals[w, layer] for layer in layers] for w in iterations])
    top_k = content.get("num_experts_per_token")
    return LoadProfile.from_counts(
        counts_WLE,
        layer_ids=layers,
        metadata={"engine": "tensorrt-llm", "ranks": len(files), "top_k": top_k},
        source=source.name,
    )


def _rank_counts(path: Path, num_experts: int) -> dict[tuple[int, int], NDArray[np.int64]]:
    """Return the counts of a rank by iteration and layer."""
    try:
        from safetensors.numpy import load_file  # noqa: PLC0415
    except ImportError:
        raise InvalidInput(
            f"reading {path.name} needs the package safetensors; install it with pip install "
            "'eplb-toolkit[tensorrt-llm]'"
        ) from None
    source = Source(path=path, array=None, name=path.name)
    counts = {}
    with parsing(source, "safetensors file"):
        for key, values in load_file(path).items():
            found = _KEY.fullmatch(key)
            if found is None:
                raise InvalidInput(
                    f"{path.name}: key {key[:40]!r} is not an iteration and a layer such as 100_3"
                )
            if values.shape != (num_experts,) or values.dtype.kind not in "iu":
                raise InvalidInput(
                    f"{path.name}: {key} must be {num_experts} whole numbers, got {values.dtype} "
                    f"of {list(values.shape)}"
                )
            counts[int(found[1]), int(found[2])] = values.astype(np.int64)
    return counts
