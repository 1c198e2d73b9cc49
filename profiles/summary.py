"""What a profile holds, in figures: how skewed its layers are, and how far its loads drift.

Shape letters: W windows, L layers, E experts, C scenarios.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eplb.arrays import FloatArray
from eplb.load_profile import LoadProfile

__all__ = ["LayerSkew", "ProfileSummary", "drift", "summarise"]

NUM_HOTTEST = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSkew:
    """How unevenly one layer's load falls on its experts, over all windows.

    Parameters
    ----------
    layer_id : int
    max_over_mean : float
        Load of the hottest expert over the mean: the imbalance of one expert a rank.
    top_10_percent : float
        Part of the load on the hottest tenth of the experts.
    idle_experts : int
        Experts without any load.
    hottest : tuple of (expert, part of the load)
    """

    layer_id: int
    max_over_mean: float
    top_10_percent: float
    idle_experts: int
    hottest: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSummary:
    """What ``eplb profile show`` prints.

    Parameters
    ----------
    num_windows, num_layers, num_experts : int
    layers : tuple of LayerSkew
    rows_mean : float
        Token-expert pairs of a layer in a window.
    window_drift : float
        Drift from a window to the next, mean; 0 with one window.
    half_drift : float
        Drift from the first half of the windows to the second; 0 with one window.
    scenario_drift : mapping of (scenario, scenario) to float
    windows_of_scenario, phases : mapping of name to number of windows
    """

    source: str
    num_windows: int
    num_layers: int
    num_experts: int
    layer_ids: tuple[int, ...]
    rows_mean: float
    layers: tuple[LayerSkew, ...]
    window_drift: float
    half_drift: float
    scenario_drift: Mapping[tuple[str, str], float]
    windows_of_scenario: Mapping[str, int]
    phases: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        figures: dict[str, Any] = {n: getattr(self, n) for n in self.__dataclass_fields__}
        figures["layers"] = {
            str(layer.layer_id): {
                "max_over_mean": layer.max_over_mean,
                "top_10_percent": layer.top_10_percent,
                "idle_experts": layer.idle_experts,
                "hottest": [{"expert": e, "part": part} for e, part in layer.hottest],
            }
            for layer in self.layers
        }
        figures["scenario_drift"] = [
            {"from": a, "to": b, "drift": value} for (a, b), value in self.scenario_drift.items()
        ]
        figures["windows_of_scenario"] = dict(self.windows_of_scenario)
        figures["phases"] = dict(self.phases)
        return figures


def drift(a_LE: FloatArray, b_LE: FloatArray) -> float:
    """Return the part of the load that falls on other experts, from 0 to 1, mean over layers.

    This is the total variation distance, half the sum of absolute differences, of loads that each
    add up to 1 in a layer. Layers without load on one side do not count.
    """
    total_a, total_b = a_LE.sum(axis=1), b_LE.sum(axis=1)
    both = (total_a > 0) & (total_b > 0)
    if not both.any():
        return 0.0
    part_a = a_LE[both] / total_a[both, np.newaxis]
    part_b = b_LE[both] / total_b[both, np.newaxis]
    return float(np.abs(part_a - part_b).sum(axis=1).mean() / 2)


def summarise(profile: LoadProfile) -> ProfileSummary:
    """Describe a profile."""
    counts_WLE = profile.counts_WLE
    half = profile.num_windows // 2
    steps = [drift(a, b) for a, b in itertools.pairwise(counts_WLE)]
    scenario_W = np.array(profile.scenario_W)
    load_CLE = {name: counts_WLE[scenario_W == name].sum(axis=0) for name in profile.scenarios}
    names = list(load_CLE)
    return ProfileSummary(
        source=profile.source,
        num_windows=profile.num_windows,
        num_layers=profile.num_layers,
        num_experts=profile.num_experts,
        layer_ids=profile.layer_ids,
        rows_mean=float(counts_WLE.sum() / (profile.num_windows * profile.num_layers)),
        layers=tuple(
            _skew(layer_id, load_E)
            for layer_id, load_E in zip(profile.layer_ids, profile.mean_load_LE(), strict=True)
        ),
        window_drift=float(np.mean(steps)) if steps else 0.0,
        half_drift=(
            drift(counts_WLE[:half].sum(axis=0), counts_WLE[half:].sum(axis=0)) if half else 0.0
        ),
        scenario_drift={
            (a, b): drift(load_CLE[a], load_CLE[b])
            for i, a in enumerate(names)
            for b in names[i + 1 :]
        },
        windows_of_scenario={name: int((scenario_W == name).sum()) for name in names},
        phases={phase: profile.phase_W.count(phase) for phase in dict.fromkeys(profile.phase_W)},
    )


def _skew(layer_id: int, load_E: FloatArray) -> LayerSkew:
    falling = np.argsort(-load_E, kind="stable")
    part_E = load_E / load_E.sum()
    tenth = max(1, round(len(load_E) / 10))
    return LayerSkew(
        layer_id=layer_id,
        max_over_mean=float(part_E.max() * len(part_E)),
        top_10_percent=float(part_E[falling[:tenth]].sum()),
        idle_experts=int((load_E == 0).sum()),
        hottest=tuple((int(e), float(part_E[e])) for e in falling[:NUM_HOTTEST]),
    )
