"""Compares recordings of one model, and adds up those of ranks that ran together.

Shape letters: W windows, L layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile, merge_profiles
from eplb.profiles.summary import drift

__all__ = ["LayerDrift", "add_profiles", "compare_profiles"]

NUM_CHANGES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDrift:
    """How one layer's load moved.

    Parameters
    ----------
    layer_id : int
    drift : float
        Part of the load that falls on other experts.
    gained, lost : tuple of (expert, part of the load)
        Experts whose part grew and shrank most.
    """

    layer_id: int
    drift: float
    gained: tuple[tuple[int, float], ...]
    lost: tuple[tuple[int, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "drift": self.drift,
            "gained": [{"expert": e, "part": part} for e, part in self.gained],
            "lost": [{"expert": e, "part": part} for e, part in self.lost],
        }


def compare_profiles(old: LoadProfile, new: LoadProfile) -> tuple[LayerDrift, ...]:
    """Return the drift of each layer between the mean loads of two recordings.

    Raises
    ------
    InvalidInput
        They are not of one model.
    """
    merge_profiles([old, new])  # says what does not fit
    found = []
    for layer, layer_id in enumerate(old.layer_ids):
        before_E, after_E = old.mean_load_LE()[layer], new.mean_load_LE()[layer]
        change_E = after_E / after_E.sum() - before_E / before_E.sum()
        rising = np.argsort(change_E, kind="stable")
        found.append(
            LayerDrift(
                layer_id=layer_id,
                drift=drift(before_E[np.newaxis], after_E[np.newaxis]),
                gained=tuple(
                    (int(e), float(change_E[e]))
                    for e in rising[::-1][:NUM_CHANGES]
                    if change_E[e] > 0
                ),
                lost=tuple(
                    (int(e), float(change_E[e])) for e in rising[:NUM_CHANGES] if change_E[e] < 0
                ),
            )
        )
    return tuple(found)


def add_profiles(parts: Sequence[LoadProfile]) -> LoadProfile:
    """Add up recordings window by window: of ranks that ran together and were not reduced.

    Raises
    ------
    InvalidInput
        They differ in layers, experts, or the number or labels of windows.
    """
    merge_profiles(parts)  # says what does not fit
    first = parts[0]
    for part in parts[1:]:
        if (part.num_windows, part.phase_W) != (first.num_windows, first.phase_W):
            raise InvalidInput(
                f"{part.source} and {first.source} cannot be added: {part.num_windows} and "
                f"{first.num_windows} windows, or other phases; cut them with --windows, or merge "
                "them without --add"
            )
    tokens = [part.tokens_W for part in parts if part.tokens_W is not None]
    return replace(
        first,
        counts_WLE=np.sum([part.counts_WLE for part in parts], axis=0),
        tokens_W=np.sum(tokens, axis=0) if len(tokens) == len(parts) else None,
        metadata={**first.metadata, "added_from": [part.source for part in parts]},
        source=", ".join(part.source for part in parts),
    )
