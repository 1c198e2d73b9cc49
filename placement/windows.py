"""The windows that the ``search`` solver fits: recorded ones, and ones that may come.

A placement that is fitted to what was recorded loses on what was not. What proved itself on
held-back windows (see docs/searching.md) is to add loads that the recording makes likely:

- few windows (recorded totals of phases or customers): each scenario pushed away from each other,
  ``x + 0.3 (x - y)``. The largest rank load is convex in the loads, so mixes of scenarios are
  covered by the scenarios themselves; what lies just outside is not.
- many windows (steps): the windows are taken for mixes of a few kinds of traffic, whose loads are
  found by non-negative factorization, and mixes of these in other proportions are added. Several
  factorizations from different starts share the work.

Shape letters: W windows, L layers, E logical experts, F factors.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray
from eplb.load_profile import LoadProfile
from eplb.placement.factors import factor_loads, factorize

__all__ = ["FitWindows", "fit_windows", "scaled_windows", "window_weights"]

# More recorded windows than this are represented by as many of them.
MAX_WINDOWS = 192
# From this many windows on they are steps, and factors can be told apart.
MIN_STEPS = 24
# What added windows weigh in all.
ADDED_WEIGHT = 0.5
EXTRAPOLATION, MAX_PAIRS = 0.3, 30
NUM_FACTORS, NUM_FACTORIZATIONS, NUM_MIXES = 12, 4, 120
# Updates of the factors. Kinds that come out only after hundreds of them are the rare ones, and
# these are what unseen windows are made of.
FACTOR_STEPS = 250
# Concentrations of the Dirichlet distributions that mixes are drawn from: a few kinds at a time,
# and nearly one.
CONCENTRATIONS = (0.3, 0.1)
# Kinds of traffic are the same in all layers: a few layers show them.
FACTOR_LAYERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FitWindows:
    """Loads to fit.

    Parameters
    ----------
    load_WLE : array of float64
        Each window and layer scaled to a mean rank load of 1; all zero where there was no load.
    weight_WL : array of float64
        What a window of a layer counts; adds up to 1.
    kept : array of int64
        The recorded windows that come first; the others were added.
    notes : mapping
        What was kept of the recorded windows and what was added, as JSON values.
    """

    load_WLE: FloatArray
    weight_WL: FloatArray
    kept: IntArray
    notes: dict[str, int]


def scaled_windows(profile: LoadProfile, num_ranks: int) -> FloatArray:
    """Return counts scaled to a mean rank load of 1 in each window and layer, [W, L, E]."""
    return _scaled(profile.counts_WLE, num_ranks)


def window_weights(load_WLE: FloatArray) -> FloatArray:
    """Return the weights under which the sum of imbalances is ``imbalance_mean``, [W, L]."""
    loaded_WL: NDArray[np.bool_] = np.any(load_WLE, axis=2)
    weight_WL: FloatArray = np.divide(loaded_WL, loaded_WL.sum())
    return weight_WL


def fit_windows(
    profile: LoadProfile,
    num_ranks: int,
    *,
    extend: bool,
    seed: int,
    time_limit_s: float | None = None,
) -> FitWindows:
    """Choose the windows to fit.

    Parameters
    ----------
    profile : LoadProfile
    num_ranks : int
    extend : bool
        Add windows that may come.
    seed : int
    time_limit_s : float, optional
        Stop refining factors then; what comes before and after is quick.
    """
    deadline = np.inf if time_limit_s is None else time.perf_counter() + time_limit_s
    recorded_WLE = scaled_windows(profile, num_ranks)
    num_recorded = len(recorded_WLE)
    random = np.random.default_rng(seed)
    kept, count_K = _representatives(recorded_WLE, MAX_WINDOWS, random)
    load_WLE = recorded_WLE[kept]
    weight_WL = window_weights(load_WLE) * count_K[:, np.newaxis]
    weight_WL /= weight_WL.sum()
    added_WLE = load_WLE[:0]
    if extend:
        added_WLE = _added(load_WLE, profile, num_ranks, random, deadline)
    # Windows that share no layer with load say nothing together.
    added_WLE = added_WLE[added_WLE.any(axis=(1, 2))]
    if len(added_WLE):
        weight_WL = np.concatenate(
            [weight_WL * (1 - ADDED_WEIGHT), window_weights(added_WLE) * ADDED_WEIGHT]
        )
        load_WLE = np.concatenate([load_WLE, added_WLE])
    return FitWindows(
        load_WLE=load_WLE,
        weight_WL=weight_WL,
        kept=kept,
        notes={
            "windows_recorded": num_recorded,
            "windows_kept": len(kept),
            "windows_added": len(added_WLE),
        },
    )


def _scaled(load_WLE: FloatArray, num_ranks: int) -> FloatArray:
    total_WL1 = load_WLE.sum(axis=2, keepdims=True)
    scaled: FloatArray = np.divide(
        load_WLE * num_ranks, total_WL1, out=np.zeros_like(load_WLE), where=total_WL1 > 0
    )
    return scaled


def _representatives(
    load_WLE: FloatArray, limit: int, random: Generator
) -> tuple[IntArray, IntArray]:
    """Return up to ``limit`` windows, and how many each stands for.

    Farthest-point clustering (Gonzalez, Theor. Comput. Sci. 38, 1985): each next window is the one
    least like those chosen, so the tail is kept, and every other is near a chosen one. Windows are
    compared by a random projection of their loads.
    """
    num_windows = len(load_WLE)
    if num_windows <= limit:
        return np.arange(num_windows), np.ones(num_windows, np.int64)
    flat_WX = load_WLE.reshape(num_windows, -1)
    seen = random.choice(flat_WX.shape[1], min(4096, flat_WX.shape[1]), replace=False)
    point_WD = np.sqrt(flat_WX[:, seen]) @ random.normal(size=(len(seen), 32))
    chosen = [0]
    nearest_W = np.zeros(num_windows, np.int64)
    distance_W = np.square(point_WD - point_WD[0]).sum(axis=1)
    for number in range(1, limit):
        if not distance_W.any():
            break
        chosen.append(int(distance_W.argmax()))
        to_new_W = np.square(point_WD - point_WD[chosen[-1]]).sum(axis=1)
        nearest_W[to_new_W < distance_W] = number
        distance_W = np.minimum(distance_W, to_new_W)
    return np.array(chosen), np.bincount(nearest_W, minlength=len(chosen))


def _added(
    load_WLE: FloatArray, profile: LoadProfile, num_ranks: int, random: Generator, deadline: float
) -> FloatArray:
    if len(load_WLE) >= MIN_STEPS:
        return _mixes(load_WLE, num_ranks, random, deadline)
    if len(profile.scenarios) > 1:
        names_W = np.array(profile.scenario_W)
        load_WLE = np.stack(
            [load_WLE[names_W == scenario].mean(axis=0) for scenario in profile.scenarios]
        )
    return _extrapolations(load_WLE, num_ranks, random)


def _extrapolations(load_WLE: FloatArray, num_ranks: int, random: Generator) -> FloatArray:
    num_windows = len(load_WLE)
    pairs = [(a, b) for a in range(num_windows) for b in range(num_windows) if a != b]
    if len(pairs) > MAX_PAIRS:
        pairs = [pairs[i] for i in random.choice(len(pairs), MAX_PAIRS, replace=False)]
    if not pairs:
        return load_WLE[:0]
    pushed = [load_WLE[a] + EXTRAPOLATION * (load_WLE[a] - load_WLE[b]) for a, b in pairs]
    # A layer that one of the two has no load in says nothing.
    known = [load_WLE[a].any(axis=1) & load_WLE[b].any(axis=1) for a, b in pairs]
    return _scaled(np.maximum(pushed, 0.0) * np.array(known)[:, :, np.newaxis], num_ranks)


def _mixes(load_WLE: FloatArray, num_ranks: int, random: Generator, deadline: float) -> FloatArray:
    num_windows, num_layers, num_experts = load_WLE.shape
    shown = np.unique(np.linspace(0, num_layers - 1, FACTOR_LAYERS).round().astype(int))
    # Single precision is ample, and twice as fast.
    load_WLE = load_WLE.astype(np.float32)
    flat_WX = load_WLE.reshape(num_windows, -1)
    mixes = []
    for number in range(NUM_FACTORIZATIONS):
        first = None if number == 0 else int(random.integers(num_windows))
        part_WF = factorize(
            load_WLE[:, shown].reshape(num_windows, -1),
            min(NUM_FACTORS, num_windows // 2),
            first=first,
            steps=FACTOR_STEPS,
            deadline=_share_of(deadline, NUM_FACTORIZATIONS - number),
        )
        # Windows that are alike have fewer.
        num_factors = part_WF.shape[1]
        factor_FX = factor_loads(flat_WX, part_WF)
        factor_FLE = _scaled(factor_FX.reshape(num_factors, num_layers, num_experts), num_ranks)
        concentration = CONCENTRATIONS[number % len(CONCENTRATIONS)]
        share_MF = random.dirichlet(
            np.full(num_factors, concentration), size=NUM_MIXES // NUM_FACTORIZATIONS
        )
        mixes.append(np.tensordot(share_MF, factor_FLE, axes=1))
    return _scaled(np.concatenate(mixes), num_ranks)


def _share_of(deadline: float, number: int) -> float:
    """Return when an equal part of the time until a deadline is over."""
    now = time.perf_counter()
    return now + (deadline - now) / number
