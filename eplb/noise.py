"""What single steps add to figures of totals: sampling noise that no placement can remove.

A step of T tokens is a small sample of the traffic, so even ranks that are balanced in expectation
are not in a step. Steps are drawn from each window's loads. Tokens of one text choose alike, which
makes loads vary more than independent choices would; where windows are steps themselves, the
factor of variance is measured between neighbours, and a step counts as so many fewer choices. Such
windows hold noise already, so steps are then drawn from the mean loads of their scenarios.

Shape letters: W windows, L layers, E logical experts, R ranks, D steps drawn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from eplb.arrays import IntArray
from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.metrics import imbalance, rank_load, relative_load, step_costs
from eplb.slots import Placement
from eplb.topology import Topology

__all__ = ["StepNoise", "dispersion", "step_noise"]

# Steps drawn in all, spread over windows.
NUM_STEPS = 64
# From this many windows of one scenario on neighbours tell the dispersion.
MIN_NEIGHBOURS = 8
# A recording is long enough to plan from if its own noise is below this imbalance.
ENOUGH = 0.01
# Windows of less than this many steps' tokens are steps themselves.
STEPS_OF_TOTALS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNoise:
    """Figures of steps of a given size.

    Parameters
    ----------
    tokens_per_step, steps : int
        Their size, and how many were drawn.
    dispersion : float
        Variance of loads over that of independent choices, at least 1; 1 where windows do not tell.
    imbalance_mean, imbalance_p95 : float
        As in :class:`eplb.metrics.Balance`, of the steps.
    floor : float or None
        What the same noise makes of perfectly balanced ranks. None under ``batch``, which moves
        tokens after the noise.
    recorded_choices : float
        Token-expert pairs a layer in the recording.
    recording_noise : float
        The floor of the recording taken as one step: what a plan may owe to chance.
    long_enough : bool
        ``recording_noise`` is below 1.01.
    """

    tokens_per_step: int
    steps: int
    dispersion: float
    imbalance_mean: float
    imbalance_p95: float
    floor: float | None
    recorded_choices: float
    recording_noise: float
    long_enough: bool

    def to_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return asdict(self)


def dispersion(profile: LoadProfile) -> float:
    """Return the variance of loads between neighbouring windows over that of independent choices.

    At least 1; 1 if no scenario has ``MIN_NEIGHBOURS`` windows. Drift from one window to the next
    counts as noise, so this is an upper estimate.
    """
    ratios = []
    for scenario in profile.scenarios:
        part = profile.of_scenario(scenario)
        if part.num_windows < MIN_NEIGHBOURS:
            continue
        total_WL1 = np.maximum(part.counts_WLE.sum(axis=2, keepdims=True), 1.0)
        share_WLE = part.counts_WLE / total_WL1
        change_WLE = np.diff(share_WLE, axis=0)
        mean_WLE = (share_WLE[1:] + share_WLE[:-1]) / 2
        expected_WLE = mean_WLE * (1 - mean_WLE) * (1 / total_WL1[1:] + 1 / total_WL1[:-1])
        ratios.append(float(np.square(change_WLE).sum() / max(expected_WLE.sum(), 1e-300)))
    return max(1.0, float(np.mean(ratios))) if ratios else 1.0


def step_noise(
    profile: LoadProfile,
    placement: Placement,
    topology: Topology,
    split: str,
    *,
    tokens_per_step: int,
    top_k: int,
    seed: int = 0,
) -> StepNoise:
    """Draw steps from a profile's windows and score a placement on them.

    Parameters
    ----------
    profile, placement, topology, split
        As for :func:`eplb.metrics.evaluate`.
    tokens_per_step : int
        Over all ranks.
    top_k : int
        Experts a token chooses.
    seed : int

    Raises
    ------
    InvalidInput
        A step of no tokens; or as :func:`eplb.metrics.rank_load`.
    """
    if tokens_per_step < 1:
        raise InvalidInput(f"tokens_per_step must be at least 1, got {tokens_per_step}")
    factor = dispersion(profile)
    recorded = float(profile.counts_WLE.sum(axis=2).sum(axis=0).min())
    window = float(np.median(profile.counts_WLE.sum(axis=2)))
    if window < STEPS_OF_TOTALS * tokens_per_step * top_k:
        profile = _scenario_means(profile)
    chosen = np.linspace(0, profile.num_windows - 1, NUM_STEPS).round().astype(int)
    drawn = _drawn(profile, chosen, tokens_per_step * top_k / factor, seed)
    ratio_DL = imbalance(rank_load(drawn, placement, topology, split), topology)
    # Noise is judged by rules that give each slot a fixed fraction; `even` stands in for `batch`.
    fixed = "even" if split == "batch" else split
    floor, recording = (
        _floor(profile, chosen, placement, topology, fixed, size / factor, seed)
        for size in (tokens_per_step * top_k, recorded)
    )
    return StepNoise(
        tokens_per_step=tokens_per_step,
        steps=len(chosen),
        dispersion=factor,
        imbalance_mean=float(np.nanmean(ratio_DL)),
        imbalance_p95=float(np.percentile(step_costs(ratio_DL), 95)),
        floor=None if split == "batch" else floor,
        recorded_choices=recorded,
        recording_noise=recording,
        long_enough=recording < 1 + ENOUGH,
    )


def _scenario_means(profile: LoadProfile) -> LoadProfile:
    """Return one window a scenario, with its mean load."""
    parts = [profile.of_scenario(scenario) for scenario in profile.scenarios]
    loads = np.zeros((len(parts), profile.num_layers, profile.num_experts))
    row_of = {layer_id: row for row, layer_id in enumerate(profile.layer_ids)}
    for load_LE, part in zip(loads, parts, strict=True):
        load_LE[[row_of[layer_id] for layer_id in part.layer_ids]] = part.mean_load_LE()
    return LoadProfile(
        counts_WLE=loads,
        layer_ids=profile.layer_ids,
        scenario_W=profile.scenarios,
        phase_W=tuple(part.phase_W[0] for part in parts),
        source=profile.source,
    )


def _drawn(profile: LoadProfile, chosen: IntArray, choices: float, seed: int) -> LoadProfile:
    """Return the chosen windows with counts drawn from their loads."""
    random = np.random.default_rng(seed)
    load_DLE = profile.counts_WLE[chosen]
    total_DL1 = load_DLE.sum(axis=2, keepdims=True)
    share_DLE = np.divide(load_DLE, total_DL1, out=np.zeros_like(load_DLE), where=total_DL1 > 0)
    # Rows without load would have to add up to 1 as well.
    share_DLE[..., 0] += 1.0 - share_DLE.sum(axis=2)
    count_DLE = random.multinomial(max(round(choices), 1), np.clip(share_DLE, 0.0, 1.0))
    return LoadProfile(
        counts_WLE=count_DLE * (total_DL1 > 0),
        layer_ids=profile.layer_ids,
        scenario_W=tuple(profile.scenario_W[w] for w in chosen),
        phase_W=tuple(profile.phase_W[w] for w in chosen),
        source=profile.source,
    )


def _floor(
    profile: LoadProfile,
    chosen: IntArray,
    placement: Placement,
    topology: Topology,
    split: str,
    choices: float,
    seed: int,
) -> float:
    """Return the mean imbalance of ranks that are balanced but for the noise of their loads."""
    drawn = _drawn(profile, chosen, choices, seed)
    relative = [
        relative_load(rank_load(side, placement, topology, split), topology)
        for side in (drawn, profile)
    ]
    noise_DLR = relative[0] - relative[1][chosen]
    return float(np.nanmean(1.0 + noise_DLR.max(axis=2)))
