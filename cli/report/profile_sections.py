"""What a recording holds: skew of layers, load of experts, drift between scenarios.

Shape letters: L layers, E logical experts, B columns of a picture, C scenarios.
"""

from __future__ import annotations

import numpy as np

from eplb.cli.report.loads import buckets_of
from eplb.cli.report.maps import MOST_COLUMNS, map_height, range_label, sharing
from eplb.cli.report.options import heat_map
from eplb.cli.report.values import Fact, Legend, Picture, Section, Table
from eplb.cli.show import percent, rows
from eplb.load_profile import LoadProfile
from eplb.profiles import ProfileSummary

__all__ = ["experts_section", "profile_facts", "scenarios_section", "skew_section"]


def profile_facts(summary: ProfileSummary) -> tuple[Fact, ...]:
    """Return the headline figures of a recording."""
    worst = max(summary.layers, key=lambda layer: layer.max_over_mean)
    idle = sum(layer.idle_experts for layer in summary.layers)
    return (
        Fact(
            name="Hottest expert",
            value=f"{worst.max_over_mean:.1f} x",
            note=f"the mean load, in layer {worst.layer_id}.",
        ),
        Fact(
            name="Hottest tenth",
            value=percent(float(np.mean([layer.top_10_percent for layer in summary.layers]))),
            note="of the load on a tenth of the experts, mean over layers.",
        ),
        Fact(name="Idle experts", value=f"{idle:,}", note="without any load, over all layers."),
        Fact(
            name="Drift",
            value=percent(summary.half_drift),
            note="of the load on other experts in the second half than in the first.",
        ),
    )


def experts_section(profile: LoadProfile) -> Section:
    """Return the load of every expert, layers x experts."""
    load_LE = profile.mean_load_LE()
    relative_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
    shown_LB, ranges = buckets_of(relative_LE, MOST_COLUMNS)
    top = float(max(2.0, np.ceil(np.quantile(relative_LE, 0.995))))
    picture = Picture(
        key="experts",
        title=f"The hottest expert has {relative_LE.max():.1f} times the mean",
        caption=(
            "Load of each logical expert over the mean of its layer, each window counting alike."
            + sharing("experts", relative_LE.shape[1], len(ranges))
        ),
        label=(
            f"Heat map of {profile.num_layers} layers by {profile.num_experts} experts: loads from "
            f"{relative_LE.min():.2f} to {relative_LE.max():.2f} times the mean."
        ),
        option=heat_map(
            shown_LB,
            x=("expert", [range_label(r) for r in ranges]),
            y=("layer", [str(i) for i in profile.layer_ids]),
            value_name="load / mean",
            palette="count",
            span=(0.0, top),
        ),
        height_px=map_height(profile.num_layers),
        legend=Legend(
            palette="count",
            marks=("0", f"{top / 2:.1f}", f"{top:.1f}+"),
            name="load of an expert / mean of its layer",
        ),
    )
    return Section(
        key="experts",
        title="Load of the experts",
        lead="With one expert a rank the darkest cell of a layer would be what the layer costs.",
        pictures=(picture,),
    )


def skew_section(summary: ProfileSummary) -> Section:
    """Return the skew of each layer as a table."""
    table = Table(
        title="Skew by layer",
        head=("layer", "max / mean", "hottest 10%", "idle experts", "hottest experts"),
        rows=tuple(
            (
                str(layer.layer_id),
                f"{layer.max_over_mean:.2f}",
                percent(layer.top_10_percent),
                str(layer.idle_experts),
                ", ".join(f"{e}: {percent(part)}" for e, part in layer.hottest),
            )
            for layer in summary.layers
        ),
    )
    return Section(
        key="skew",
        title="Layers",
        lead=f"{rows(summary.rows_mean)} rows (token-expert pairs) a layer and window.",
        tables=(table,),
    )


def scenarios_section(summary: ProfileSummary) -> Section | None:
    """Return how far scenarios are from each other; None where there is one."""
    names = list(summary.windows_of_scenario)
    if len(names) < 2:
        return None
    drift_CC = np.zeros((len(names), len(names)))
    for (a, b), value in summary.scenario_drift.items():
        i, j = names.index(a), names.index(b)
        drift_CC[i, j] = drift_CC[j, i] = 100 * value
    top = float(max(drift_CC.max(), 1.0))
    return Section(
        key="scenarios",
        title="Scenarios",
        lead="A plan for one of them loses where another has its load on other experts.",
        pictures=(
            Picture(
                key="scenarios-drift",
                title=f"Up to {drift_CC.max():.1f}% of the load on other experts",
                caption="Drift between the summed loads of two scenarios, mean over layers.",
                label=f"Drift between {len(names)} scenarios, at most {drift_CC.max():.1f}%.",
                option=heat_map(
                    drift_CC,
                    x=("scenario", [str(i + 1) for i in range(len(names))]),
                    y=("scenario", [str(i + 1) for i in range(len(names))]),
                    value_name="drift, %",
                    palette="count",
                    span=(0.0, top),
                    digits=2,
                ),
                height_px=map_height(max(len(names), 10)),
                legend=Legend(palette="count", marks=("0%", f"{top:.1f}%"), name="drift"),
                table=Table(
                    title="Names",
                    head=("number", "scenario", "windows"),
                    rows=tuple(
                        (str(i + 1), name, str(count))
                        for i, (name, count) in enumerate(summary.windows_of_scenario.items())
                    ),
                ),
            ),
        ),
    )
