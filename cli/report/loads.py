"""What the pictures of a plan show, as arrays: one placement beside another on the same windows.

Shape letters: W windows, L layers, E logical experts, R ranks, B buckets of windows or ranks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray
from eplb.cli.plan import engine_start
from eplb.load_profile import LoadProfile, replace_windows
from eplb.metrics import Balance, balance_of, imbalance, rank_load, relative_load
from eplb.placement.bound import layer_bounds
from eplb.placement.windows import scaled_windows, window_weights
from eplb.plan import Plan

__all__ = [
    "Comparison",
    "Side",
    "buckets_of",
    "chance_drift",
    "compare",
    "drift_from",
    "mean_where",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """A placement with what its ranks carry.

    Parameters
    ----------
    name : str
        How the report calls it.
    plan : Plan
    load_WLR : array of float64
    """

    name: str
    plan: Plan
    load_WLR: FloatArray

    @cached_property
    def imbalance_WL(self) -> FloatArray:
        """Max / mean rank load; NaN where there is no load."""
        return imbalance(self.load_WLR, self.plan.topology)

    def balance(self, profile: LoadProfile, chosen_W: NDArray[np.bool_]) -> Balance:
        """Return the figures of some of the windows."""
        names = [name for name, c in zip(profile.scenario_W, chosen_W, strict=True) if c]
        load_WLR, topology = self.load_WLR[chosen_W], self.plan.topology
        return balance_of(load_WLR, topology, profile.layer_ids, names)

    def relative_LR(self, chosen_W: NDArray[np.bool_]) -> FloatArray:
        """Return rank loads over the mean of their layer and window, mean over windows.

        The load of a rank counts as load / speed; NaN for ranks out of service.
        """
        topology = self.plan.topology
        relative_LR = np.full(self.load_WLR.shape[1:], np.nan)
        relative_LR[:, topology.ranks_in_service] = mean_where(
            relative_load(self.load_WLR[chosen_W], topology), axis=0
        )
        return relative_LR

    def step_W(self) -> FloatArray:
        """Return what each window costs: its mean imbalance over layers."""
        return mean_where(self.imbalance_WL, axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """A plan, what was before it, and the windows that both are scored on.

    Parameters
    ----------
    profile : LoadProfile
    fitted_W : array of bool
        Windows that the plan was fitted to.
    before, after : Side
    """

    profile: LoadProfile
    fitted_W: NDArray[np.bool_]
    before: Side
    after: Side

    @property
    def plan(self) -> Plan:
        """The plan that the report is about."""
        return self.after.plan

    @property
    def has_both(self) -> bool:
        """Whether some windows were fitted and others were not."""
        return bool(self.fitted_W.any() and not self.fitted_W.all())

    @property
    def shown_W(self) -> NDArray[np.bool_]:
        """Windows that count: those that the plan was not fitted to, where there are any."""
        return ~self.fitted_W if self.has_both else np.ones(len(self.fitted_W), bool)

    @property
    def shown(self) -> str:
        """What those windows are called."""
        count = int(self.shown_W.sum())
        noun = "window" if count == 1 else "windows"
        if self.fitted_W.all():
            return f"the {count} {noun} it was fitted to"
        return f"{count} {noun} it was not fitted to"

    @cached_property
    def shown_profile(self) -> LoadProfile:
        """The windows that count; layers without load in them drop out."""
        return replace_windows(self.profile, self.shown_W)

    @cached_property
    def bound_L(self) -> FloatArray:
        """What no placement's mean imbalance is below on the windows that count; NaN: no load."""
        topology, profile = self.plan.topology, self.shown_profile
        bound_L = np.full(self.profile.num_layers, np.nan)
        if not topology.is_uniform:  # Bounds hold for equal ranks only.
            return bound_L
        load_WLE = scaled_windows(profile, topology.num_ranks)
        weight_WL = window_weights(load_WLE)
        found_L = layer_bounds(
            load_WLE,
            weight_WL / weight_WL.sum(axis=0),
            num_ranks=topology.num_ranks,
            slots_per_rank=topology.slots_per_rank,
            split=self.plan.split,
            reached_L=mean_where(
                self.after.imbalance_WL[self.shown_W][:, self._rows_of(profile)], axis=0
            ),
            # As for the plan itself: thorough bounds take a compiler, which greedy does without.
            thorough=self.plan.provenance.get("solver") not in (None, "greedy"),
        )
        bound_L[self._rows_of(profile)] = found_L
        return bound_L

    def _rows_of(self, part: LoadProfile) -> list[int]:
        return [self.profile.layer_ids.index(i) for i in part.layer_ids]


def compare(
    plan: Plan,
    profile: LoadProfile,
    fitted_W: NDArray[np.bool_],
    previous: Plan | None = None,
) -> Comparison:
    """Score a plan beside the previous one, or beside what engines start with.

    Raises
    ------
    InvalidInput, PlacementInvalid
        Profile and plans do not fit each other.
    """
    if previous is None:
        start = engine_start(plan.placement.layer_ids, plan.model.num_experts, plan.topology)
        # What engines start with has no fractions of its own.
        split = "even" if plan.split == "weighted" else plan.split
        before = replace(plan, placement=start, split=split, quality=None)
        name = "initial placement"
    else:
        before, name = previous, "previous plan"

    def side(name: str, of: Plan) -> Side:
        load_WLR = rank_load(profile, of.placement, of.topology, of.split)
        return Side(name=name, plan=of, load_WLR=load_WLR)

    return Comparison(
        profile=profile,
        fitted_W=fitted_W,
        before=side(name, before),
        after=side("this plan", plan),
    )


def mean_where(values: FloatArray, axis: int) -> FloatArray:
    """Return the mean of the values that are not NaN; NaN where there are none, silently."""
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    mean: FloatArray = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean


def buckets_of(values: FloatArray, most: int) -> tuple[FloatArray, list[tuple[int, int]]]:
    """Shrink the last axis to at most ``most`` entries, each the largest of its neighbours.

    Returns
    -------
    largest : array of float64
        NaN where all of a bucket are.
    ranges : list of (first, last)
        Of each bucket, both inclusive.
    """
    size = values.shape[-1]
    edges = np.linspace(0, size, min(size, most) + 1).astype(int)
    ranges = [(int(a), int(b) - 1) for a, b in itertools.pairwise(edges)]
    if size <= most:
        return values, ranges
    # fmax ignores NaN unless all are.
    return np.fmax.reduceat(values, edges[:-1], axis=-1), ranges


def drift_from(profile: LoadProfile, reference_LE: FloatArray) -> FloatArray:
    """Return which part of each window's load falls on other experts than the reference's, [W].

    Total variation distance, mean over layers, as :func:`eplb.profiles.summary.drift`.
    """
    reference_LE = reference_LE / reference_LE.sum(axis=1, keepdims=True)
    drift_W = np.empty(profile.num_windows)
    for window, counts_LE in enumerate(profile.counts_WLE):
        total_L = counts_LE.sum(axis=1)
        loaded_L = total_L > 0
        part_LE = counts_LE[loaded_L] / total_L[loaded_L, np.newaxis]
        drift_W[window] = np.abs(part_LE - reference_LE[loaded_L]).sum(axis=1).mean() / 2
    return drift_W


def chance_drift(profile: LoadProfile, reference_LE: FloatArray) -> FloatArray:
    """Return the drift that windows would show if each row chose its expert by itself, [W].

    Half the sum over experts of the mean absolute deviation of a binomial, sqrt(2 p (1 - p) /
    (pi n)), its normal limit (de Moivre 1730), mean over layers.
    """
    part_LE = reference_LE / reference_LE.sum(axis=1, keepdims=True)
    spread_L = np.sqrt(2 * part_LE * (1 - part_LE) / np.pi).sum(axis=1) / 2
    total_WL = profile.counts_WLE.sum(axis=2)
    chance_WL = np.divide(
        spread_L, np.sqrt(total_WL), out=np.full(total_WL.shape, np.nan), where=total_WL > 0
    )
    return mean_where(chance_WL, axis=1)
