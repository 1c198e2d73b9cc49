"""Rank loads before and after, and imbalance by layer beside the bound.

Shape letters: L layers, R ranks, C columns of a picture.
"""

from __future__ import annotations

import numpy as np

from eplb.arrays import FloatArray
from eplb.cli.report.loads import Comparison, Side, buckets_of, mean_where
from eplb.cli.report.maps import (
    MOST_COLUMNS,
    half_span,
    legend_around_one,
    map_height,
    range_label,
    sharing,
)
from eplb.cli.report.options import Line, heat_map, lines
from eplb.cli.report.values import Picture, Section, Table
from eplb.cli.show import ratio

__all__ = ["layers_section", "ranks_section"]


def ranks_section(comparison: Comparison) -> Section:
    """Return the heat maps of rank loads, layers x ranks, on one scale."""
    sides = [comparison.before, comparison.after]
    loads = [side.relative_LR(comparison.shown_W) for side in sides]
    half = half_span(loads)
    pictures = tuple(
        _rank_map(comparison, side, load_LR, half)
        for side, load_LR in zip(sides, loads, strict=True)
    )
    return Section(
        key="ranks",
        title="Load of the ranks",
        lead=(
            "Every layer waits for its reddest rank. Each cell is a rank's load over the mean of "
            f"its layer, averaged over {comparison.shown}; both pictures share one scale."
        ),
        pictures=pictures,
        side_by_side=True,
        notes=_rank_notes(comparison),
    )


def _rank_map(comparison: Comparison, side: Side, load_LR: FloatArray, half: float) -> Picture:
    topology, layer_ids = side.plan.topology, comparison.profile.layer_ids
    shown_LC, ranges = buckets_of(load_LR, MOST_COLUMNS)
    whole = len(ranges) == load_LR.shape[1]
    which = "before" if side is comparison.before else "after"
    largest_L = np.nanmax(load_LR, axis=1, initial=0)
    table = Table(
        title="By layer",
        head=("layer", "most loaded rank", "its load / mean", "least loaded rank", "its load"),
        rows=tuple(
            (
                str(i),
                str(np.nanargmax(row)),
                ratio(np.nanmax(row)),
                str(np.nanargmin(row)),
                ratio(np.nanmin(row)),
            )
            for i, row in zip(layer_ids, load_LR, strict=True)
            if not np.isnan(row).all()
        ),
    )
    return Picture(
        key=f"ranks-{which}",
        title=f"{which.capitalize()}: {side.name}",
        caption=f"{topology.label}; lines part the nodes."
        + sharing("ranks", topology.num_ranks, len(ranges)),
        label=(
            f"Heat map of {len(layer_ids)} layers by {topology.num_ranks} ranks, {side.name}: the "
            f"largest mean load is {largest_L.max():.2f} times the mean of its layer."
        ),
        option=heat_map(
            shown_LC,
            x=("rank", [range_label(r) for r in ranges]),
            y=("layer", [str(i) for i in layer_ids]),
            value_name="load / mean",
            palette="loads",
            span=(1 - half, 1 + half),
            x_step=topology.ranks_per_node if whole and topology.num_nodes > 1 else None,
        ),
        height_px=map_height(len(layer_ids)),
        table=table,
        legend=legend_around_one(half, "mean", "load of a rank / mean of its layer"),
    )


def _rank_notes(comparison: Comparison) -> tuple[str, ...]:
    if comparison.shown_profile.num_windows == 1:
        return ()
    note = (
        "A rank that is hot in one window and cool in the next is near the mean here: imbalance "
        "below is averaged window by window, and is larger than what these colours show."
    )
    return (note,)


def layers_section(comparison: Comparison) -> Section:
    """Return imbalance by layer: before, after, and what no placement is below."""
    ids = comparison.profile.layer_ids
    before_L, after_L = (
        mean_where(side.imbalance_WL[comparison.shown_W], axis=0)
        for side in (comparison.before, comparison.after)
    )
    drawn = [
        Line(name=comparison.before.name, values=before_L, colour="before", dash="dashed"),
        Line(name=comparison.after.name, values=after_L, colour="after"),
    ]
    below = ""
    if not np.isnan(comparison.bound_L).all():
        drawn.append(Line(name="bound", values=comparison.bound_L, colour="bound", dash="dotted"))
        below = (
            " Below the dotted line no placement on these slots can go; over many windows the "
            "bound does not know that one placement serves them all, so the plan may be nearer to "
            "the best than it looks."
        )
    loaded = np.flatnonzero(~np.isnan(after_L))
    worst = int(np.nanargmax(after_L))
    picture = Picture(
        key="layers",
        title=f"Layer {ids[worst]} is the worst balanced, at {after_L[worst]:.3f}",
        caption=f"Mean over {comparison.shown}.{below}",
        label="Imbalance by layer: "
        + ", ".join(
            f"{line.name} {np.nanmin(line.values):.3f} to {np.nanmax(line.values):.3f}"
            for line in drawn
        ),
        option=lines(
            np.array(ids), drawn, x_name="layer", y_name="imbalance", step=True, floor=1.0
        ),
        table=Table(
            title="By layer",
            head=("layer", *(line.name for line in drawn)),
            rows=tuple(
                (str(ids[row]), *(ratio(line.values[row]) for line in drawn)) for row in loaded
            ),
        ),
    )
    return Section(
        key="layers",
        title="Imbalance by layer",
        lead="Layers add up: a step costs the mean of these values.",
        pictures=(picture,),
    )
