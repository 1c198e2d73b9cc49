"""Windows over time: what each costs, layer by layer, and how far the traffic drifts.

Shape letters: W windows, L layers, E logical experts, B buckets of windows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray
from eplb.cli.report.loads import Comparison, buckets_of, chance_drift, drift_from
from eplb.cli.report.maps import map_height, range_label, sharing
from eplb.cli.report.options import Line, heat_map, lines
from eplb.cli.report.values import Legend, Picture, Section, Table
from eplb.cli.show import percent, ratio
from eplb.load_profile import LoadProfile

__all__ = ["drift_section", "shaded", "windows_section"]

# Windows that can be told apart: points of a line, and columns of a heat map.
MOST_POINTS, MOST_COLUMNS = 600, 240


def windows_section(comparison: Comparison) -> Section | None:
    """Return what each window costs; None where there is one."""
    profile = comparison.profile
    if profile.num_windows < 2:
        return None
    before_W, after_W = comparison.before.step_W(), comparison.after.step_W()
    worst = int(np.nanargmax(after_W))
    (before_B, ranges), (after_B, _) = (buckets_of(v, MOST_POINTS) for v in (before_W, after_W))
    steps = Picture(
        key="windows",
        title=f"Window {worst} is the worst, at {after_W[worst]:.3f}",
        caption=(
            "Imbalance of each window, mean over layers: what a step costs."
            + _fitted_note(comparison)
            + sharing("windows", profile.num_windows, len(ranges), "points")
        ),
        label=(
            f"Imbalance over {profile.num_windows} windows: {comparison.before.name} "
            f"{np.nanmin(before_W):.3f} to {np.nanmax(before_W):.3f}, this plan "
            f"{np.nanmin(after_W):.3f} to {np.nanmax(after_W):.3f}."
        ),
        option=lines(
            [first for first, _ in ranges],
            [
                Line(name=comparison.before.name, values=before_B, colour="before", dash="dashed"),
                Line(name=comparison.after.name, values=after_B, colour="after"),
            ],
            x_name="window",
            y_name="imbalance",
            bands=shaded(comparison.fitted_W) if comparison.has_both else (),
            band_name="fitted",
            floor=1.0,
        ),
        table=Table(
            title="By window",
            head=("window", "scenario", "phase", comparison.before.name, comparison.after.name),
            rows=tuple(
                (
                    range_label(r),
                    profile.scenario_W[r[0]],
                    profile.phase_W[r[0]],
                    ratio(b),
                    ratio(a),
                )
                for r, b, a in zip(ranges, before_B, after_B, strict=True)
            ),
        ),
    )
    return Section(
        key="windows",
        title="Windows over time",
        lead=(
            "One placement has to serve all windows. Where a stretch of time or a layer stands "
            "out, traffic has moved away from what the plan was made for."
        ),
        pictures=(steps, _layers_over_windows(comparison)),
    )


def _layers_over_windows(comparison: Comparison) -> Picture:
    ids = comparison.profile.layer_ids
    ratio_LW = comparison.after.imbalance_WL.T
    shown_LB, ranges = buckets_of(ratio_LW, MOST_COLUMNS)
    top = float(np.ceil(np.nanquantile(ratio_LW, 0.995) * 20) / 20)
    top = max(top, 1.1)
    worst_L = np.nanmax(ratio_LW, axis=1)
    return Picture(
        key="windows-layers",
        title="Where and when the plan is out of balance",
        caption=(
            "Imbalance of this plan, layers x windows."
            + sharing("windows", ratio_LW.shape[1], len(ranges))
        ),
        label=(
            f"Heat map of imbalance, {len(ids)} layers by {ratio_LW.shape[1]} windows: from "
            f"{np.nanmin(ratio_LW):.3f} to {np.nanmax(ratio_LW):.3f}."
        ),
        option=heat_map(
            shown_LB,
            x=("window", [range_label(r) for r in ranges]),
            y=("layer", [str(i) for i in ids]),
            value_name="imbalance",
            palette="cost",
            span=(1.0, top),
        ),
        height_px=map_height(len(ids)),
        table=Table(
            title="By layer",
            head=("layer", "worst window", "its imbalance", "median"),
            rows=tuple(
                (str(i), str(int(np.nanargmax(row))), ratio(worst), ratio(float(np.nanmedian(row))))
                for i, row, worst in zip(ids, ratio_LW, worst_L, strict=True)
            ),
        ),
        legend=Legend(
            palette="cost",
            marks=("1", f"{(1 + top) / 2:.2f}", f"{top:.2f}+"),
            name="imbalance",
        ),
    )


def drift_section(
    profile: LoadProfile, fitted_W: NDArray[np.bool_] | None = None
) -> Section | None:
    """Return how far each window's traffic is from what was fitted, or from the first windows.

    None where there is one window.
    """
    if profile.num_windows < 2:
        return None
    some_fitted = fitted_W is not None and fitted_W.any() and not fitted_W.all()
    if some_fitted:
        assert fitted_W is not None
        reference, what = fitted_W, "the windows that were fitted"
    else:
        reference = np.arange(profile.num_windows) < max(1, profile.num_windows // 4)
        what = "the first quarter of the windows"
    reference_LE = _mean_load(profile, reference)
    drift_W, chance_W = drift_from(profile, reference_LE), chance_drift(profile, reference_LE)
    (drift_B, ranges), (chance_B, _) = (buckets_of(v, MOST_POINTS) for v in (drift_W, chance_W))
    beyond = float(np.nanmean(np.maximum(drift_W - chance_W, 0)))
    picture = Picture(
        key="drift",
        title=f"Drift of {drift_W.max():.1%} at most, {drift_W.mean():.1%} on average",
        caption=(
            f"Part of a window's load that falls on other experts than in {what}, mean over "
            "layers. The dotted line is what chance alone would make of windows of this size, if "
            "every row chose its expert by itself."
            + sharing("windows", profile.num_windows, len(ranges), "points")
        ),
        label=(
            f"Drift over {profile.num_windows} windows from {drift_W.min():.1%} to "
            f"{drift_W.max():.1%}; chance alone {np.nanmean(chance_W):.1%}."
        ),
        option=lines(
            [first for first, _ in ranges],
            [
                Line(name="drift, %", values=100 * drift_B, colour="after"),
                Line(name="chance alone, %", values=100 * chance_B, colour="bound", dash="dotted"),
            ],
            x_name="window",
            y_name="% of the load",
            bands=shaded(reference),
            band_name="reference",
            floor=0.0,
        ),
        height_px=260,
        table=Table(
            title="By window",
            head=("window", "drift", "chance alone"),
            rows=tuple(
                (range_label(r), percent(d), percent(c))
                for r, d, c in zip(ranges, drift_B, chance_B, strict=True)
            ),
        ),
    )
    return Section(
        key="drift",
        title="Drift over time",
        lead=(
            f"Loads moved by {beyond:.1%} more than chance explains, on average. Drift ages a "
            "plan; eplb replan follows it with few moves."
        ),
        pictures=(picture,),
    )


def shaded(chosen_W: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """Return the stretches of consecutive chosen windows, as places on the axis of windows."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen_W, [False]]).astype(int)))
    last = len(chosen_W) - 1
    return [(float(a), float(min(b, last))) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _mean_load(profile: LoadProfile, chosen_W: NDArray[np.bool_]) -> FloatArray:
    """Return the mean of some windows' loads, each counting alike; even where there is none."""
    counts_WLE = profile.counts_WLE[chosen_W]
    total_WL = counts_WLE.sum(axis=2)
    weight_WL = np.divide(1.0, total_WL, out=np.zeros_like(total_WL), where=total_WL > 0)
    load_LE: FloatArray = np.einsum("wle,wl->le", counts_WLE, weight_WL)
    load_LE[~load_LE.any(axis=1)] = 1.0
    return load_LE


def _fitted_note(comparison: Comparison) -> str:
    return " The plan was fitted to the shaded windows." if comparison.has_both else ""
