"""One window's counts as the arrays of a profile file, with what looks wrong about them.

Pure functions over arrays. Shape letters: N sources, P phases, L layers, E experts, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb.load_profile import PHASES

__all__ = ["WindowShape", "window_arrays"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowShape:
    """What the columns of counters stand for.

    Parameters
    ----------
    layer_ids : tuple of int
        Layers of the decoder, then those of multi-token prediction.
    num_main : int
        How many are of the decoder.
    num_experts, num_columns : int
        Ids below ``num_experts`` are experts, those up to ``num_columns`` identity experts; two
        more columns hold ids beyond and negative ids.
    top_k : mapping of layer index to int
        Experts of a token; 0 where no token has been seen.
    """

    layer_ids: tuple[int, ...]
    num_main: int
    num_experts: int
    num_columns: int
    top_k: Mapping[int, int]


def window_arrays(
    counts_NPLC: NDArray[np.int64],
    shape: WindowShape,
    *,
    steps: int,
    time_s: float,
    scenario: str,
    keep_sources: bool,
    routings: NDArray[np.int16] | None,
) -> tuple[dict[str, NDArray[Any]] | None, dict[str, str]]:
    """Return the arrays of a window, an entry for each phase that had tokens.

    Returns
    -------
    arrays : dict, optional
        None where no token was routed.
    notes : dict of kind to text
        What a user should hear once.
    """
    num_experts, main = shape.num_experts, slice(0, shape.num_main)
    counts_PLC = counts_NPLC.sum(axis=0)
    used = np.flatnonzero(counts_PLC[:, main, :num_experts].any(axis=(1, 2)))
    notes = _notes(counts_PLC, shape)
    if not len(used):
        return None, notes
    arrays: dict[str, NDArray[Any]] = {
        "counts": counts_PLC[used][:, main, :num_experts],
        "phase": np.array([PHASES[p] for p in used]),
        "scenario": np.array([scenario] * len(used)),
        "steps": np.full(len(used), steps, np.int64),
        "time_s": np.full(len(used), time_s),
    }
    tokens_PL = _tokens(counts_PLC, shape)
    if tokens_PL is not None:
        arrays["tokens"] = tokens_PL[used][:, main].max(axis=1)
    if shape.num_main < len(shape.layer_ids):
        arrays["mtp_counts"] = counts_PLC[used][:, shape.num_main :, :num_experts]
    if keep_sources:
        by_source = counts_NPLC[:, used][:, :, main, :num_experts]
        arrays["source_counts"] = by_source.swapaxes(0, 1)
    if routings is not None:
        arrays["routings"] = routings[(routings >= 0).any(axis=(1, 2))]
    return arrays, notes


def _tokens(counts_PLC: NDArray[np.int64], shape: WindowShape) -> NDArray[np.int64] | None:
    """Return how many tokens each layer routed, without those that were not routed."""
    top_k_L = np.array([shape.top_k[i] for i in range(len(shape.layer_ids))])
    if not top_k_L[: shape.num_main].all():
        return None
    rows_PL = counts_PLC[:, :, :-1].sum(axis=2)
    tokens_PL: NDArray[np.int64] = -(-rows_PL // np.maximum(top_k_L, 1))
    return tokens_PL


def _notes(counts_PLC: NDArray[np.int64], shape: WindowShape) -> dict[str, str]:
    notes = {}
    beyond_L = counts_PLC[:, :, shape.num_columns].sum(axis=0)
    if beyond_L.any():
        layer = int(beyond_L.argmax())
        notes["beyond"] = (
            f"layer {shape.layer_ids[layer]} was given expert ids at or above "
            f"{shape.num_columns}; they are not counted ({int(beyond_L.sum())} in this window)"
        )
    rows_L = counts_PLC[:, : shape.num_main, :-1].sum(axis=(0, 2))
    silent = [shape.layer_ids[i] for i in np.flatnonzero(rows_L == 0)]
    if silent and len(silent) < shape.num_main:
        notes[f"silent {silent}"] = (
            f"layers {silent} routed no token while others did; a layer that was compiled before "
            "the recorder was attached is not seen (torch.compiler.reset() lets it)"
        )
    heard = rows_L[rows_L > 0]
    if len(heard) and heard.max() > heard.min() and heard.max() % heard.min() == 0:
        layer = int(rows_L.argmax())
        notes["multiple"] = (
            f"layer {shape.layer_ids[layer]} routed {heard.max() // heard.min()} times the tokens "
            "of others; if it is not called so often, two layers report one id"
        )
    return notes
