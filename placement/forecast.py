"""The windows that ``replan`` fits: what the traffic is like now, and where it may go next.

Steps of a stream are mixes of a few kinds of traffic, whose loads the whole past tells (by the
factorization of :mod:`eplb.placement.windows`), while only its last steps tell in which mix they
come. So the last windows are fitted, recent ones most, and beside them mixes around the present
one. Other forecasts were tried on held-back steps and did not prove themselves: docs/migration.md
has the table.

Shape letters: W windows, L layers, E logical experts, F factors, M mixes.
"""

from __future__ import annotations

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.load_profile import LoadProfile, replace_windows
from eplb.placement.factors import factor_loads, factorize
from eplb.placement.windows import (
    FACTOR_LAYERS,
    MIN_STEPS,
    fit_windows,
    scaled_windows,
    window_weights,
)

__all__ = ["forecast_windows", "recent_windows", "traffic_parts"]

# The last windows that are fitted themselves, and how many windows old one is that counts 1/e.
RECENT_WINDOWS, MEMORY_WINDOWS = 50, 33
# Kinds of traffic, the windows that tell them, and those that tell the present mix.
NUM_FACTORS, FACTOR_WINDOWS, PRESENT_WINDOWS = 10, 480, 12
# Updates of the factors; more take longer than they are worth here.
FACTOR_STEPS = 60
# Mixes that are fitted, what they weigh in all, and how near the present one they are: the sum of
# the parameters of the Dirichlet distribution that they are drawn from.
NUM_MIXES, MIXES_WEIGHT, CONCENTRATION = 32, 0.5, 10.0
# Keeps the parameter of a kind that is absent now above 0.
_LEAST_PART = 1e-3 / CONCENTRATION


def forecast_windows(
    profile: LoadProfile, num_ranks: int, *, seed: int = 0
) -> tuple[FloatArray, FloatArray]:
    """Return loads to fit and what they count.

    Parameters
    ----------
    profile : LoadProfile
        The past, oldest window first within each scenario.
    num_ranks : int
    seed : int
        Of the mixes.

    Returns
    -------
    load_WLE : array of float64
        Each window and layer scaled to a mean rank load of 1.
    weight_WL : array of float64
        Adds up to 1.

    Notes
    -----
    Fewer than ``windows.MIN_STEPS`` windows are no stream: they all count the same, with the
    windows beside them that the ``search`` solver would add.
    """
    if profile.num_windows < MIN_STEPS:
        windows = fit_windows(profile, num_ranks, extend=True, seed=seed)
        return windows.load_WLE, windows.weight_WL
    load_WLE = scaled_windows(profile, num_ranks)
    age_W = _ages(profile)
    recent_W = age_W < RECENT_WINDOWS
    weight_WL = window_weights(load_WLE[recent_W])
    weight_WL *= np.exp(-age_W[recent_W] / MEMORY_WINDOWS)[:, np.newaxis]
    weight_WL /= weight_WL.sum()
    mix_MLE = _mixes(load_WLE[-FACTOR_WINDOWS:], age_W[-FACTOR_WINDOWS:], num_ranks, seed)
    mix_MLE = mix_MLE[mix_MLE.any(axis=(1, 2))]
    if not len(mix_MLE):
        return load_WLE[recent_W], weight_WL
    return (
        np.concatenate([load_WLE[recent_W], mix_MLE]),
        np.concatenate([weight_WL * (1 - MIXES_WEIGHT), window_weights(mix_MLE) * MIXES_WEIGHT]),
    )


def recent_windows(profile: LoadProfile) -> LoadProfile:
    """Return the last windows of each scenario, those that are fitted as they were recorded."""
    return replace_windows(profile, _ages(profile) < RECENT_WINDOWS)


def traffic_parts(load_WLE: FloatArray, num_factors: int) -> tuple[FloatArray, FloatArray]:
    """Return the part of each kind of traffic in each window, and the loads of each kind.

    Parameters
    ----------
    load_WLE : array of float64
        Scaled alike in all windows.
    num_factors : int

    Returns
    -------
    part_WF : array of float64
        Adds up to 1 in each window.
    factor_FLE : array of float32
        Loads, scaled as windows are.
    """
    num_windows, num_layers, num_experts = load_WLE.shape
    # Kinds of traffic are the same in all layers, so a few show them.
    shown = np.unique(np.linspace(0, num_layers - 1, FACTOR_LAYERS).round().astype(int))
    load_WLE = load_WLE.astype(np.float32)
    part_WF = factorize(
        load_WLE[:, shown].reshape(num_windows, -1), num_factors, steps=FACTOR_STEPS
    )
    factor_FX = factor_loads(load_WLE.reshape(num_windows, -1), part_WF)
    total_F = np.maximum(factor_FX.sum(axis=1), np.finfo(np.float32).tiny)
    part_WF = part_WF * total_F
    part_WF /= np.maximum(part_WF.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    total = load_WLE.sum() / num_windows
    factor_FX *= (total / total_F)[:, np.newaxis]
    return part_WF, factor_FX.reshape(-1, num_layers, num_experts)


def _ages(profile: LoadProfile) -> IntArray:
    """Return how many windows of its scenario came after each window."""
    scenario_W = np.array(profile.scenario_W)
    age_W = np.zeros(len(scenario_W), np.int64)
    for name in profile.scenarios:
        of = np.flatnonzero(scenario_W == name)
        age_W[of] = np.arange(len(of))[::-1]
    return age_W


def _mixes(load_WLE: FloatArray, age_W: IntArray, num_ranks: int, seed: int) -> FloatArray:
    """Return mixes of kinds of traffic that are around the present mix, [M, L, E]."""
    part_WF, factor_FLE = traffic_parts(load_WLE, min(NUM_FACTORS, len(load_WLE) // 2))
    present_F = part_WF[age_W < PRESENT_WINDOWS].mean(axis=0).astype(np.float64)
    random = np.random.default_rng(seed)
    part_MF = random.dirichlet(CONCENTRATION * (present_F + _LEAST_PART), size=NUM_MIXES)
    mix_MLE = np.tensordot(part_MF, factor_FLE, axes=1)
    total_ML1 = mix_MLE.sum(axis=2, keepdims=True)
    scaled: FloatArray = np.divide(
        mix_MLE * num_ranks, total_ML1, out=np.zeros_like(mix_MLE), where=total_ML1 > 0
    )
    return scaled
