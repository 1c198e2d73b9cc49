"""What the plan costs to bring in from the previous one, and what fewer moves would give.

Shape letters: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eplb.cli.report.loads import Comparison
from eplb.cli.report.options import Line, bars, scatter
from eplb.cli.report.values import Fact, Picture, Section, Table
from eplb.cli.show import percent, plural, ratio
from eplb.placement.migration import Migration, find_migration, plan_slots
from eplb.placement.schedule import schedule_moves
from eplb.plan import Plan

__all__ = ["moves_fact", "moves_section"]


def moves_fact(previous: Plan, plan: Plan) -> Fact:
    """Return the headline of the moves."""
    moves = _migration(previous, plan).num_moves
    size = plan.model.expert_bytes
    return Fact(
        name="Experts moved",
        value=f"{moves:,}",
        note=f"{percent(moves / plan.placement.phys_to_log_LS.size)} of all slots"
        + ("." if size is None else f", {moves * size / 1e9:.1f} GB."),
    )


def moves_section(
    comparison: Comparison, previous: Plan, curve: Sequence[tuple[float, float]] = ()
) -> Section:
    """Return moves by layer, and balance against moves.

    Parameters
    ----------
    comparison : Comparison
        Of the plan with the previous one.
    previous : Plan
    curve : sequence of (moves, imbalance)
        As ``eplb replan`` found it.

    Raises
    ------
    InvalidInput, PlacementInvalid
        The plans cannot be compared.
    """
    plan = comparison.plan
    migration = _migration(previous, plan)
    by_layer = np.bincount(migration.layer_M, minlength=plan.placement.num_layers)
    before, after = (
        side.balance(comparison.profile, comparison.shown_W).imbalance_mean
        for side in (comparison.before, comparison.after)
    )
    moves = migration.num_moves
    points = [
        ("previous plan", 0.0, before, "before"),
        ("this plan", float(moves), after, "after"),
    ]
    balance = Picture(
        key="moves",
        title=f"{plural(moves, 'move')} take imbalance from {before:.3f} to {after:.3f}",
        caption=(
            f"Points are means over {comparison.shown}."
            + (
                " The dashed curve is what eplb replan reaches with fewer moves; it weighs recent "
                "windows more, so read its shape."
                if curve
                else " With --replan, the curve of eplb replan --json stands beside them."
            )
        ),
        label=f"Imbalance against moves: {before:.3f} at none, {after:.3f} at {moves}.",
        option=scatter(points, curve, x_name="experts moved", y_name="imbalance"),
        table=Table(
            title="Balance against moves",
            head=("", "experts moved", "imbalance"),
            rows=(
                *((name, f"{x:,.0f}", ratio(y)) for name, x, y, _ in points),
                *(("replan", f"{x:,.0f}", ratio(y)) for x, y in curve),
            ),
        ),
    )
    layers = Picture(
        key="moves-layers",
        title=f"At most {plural(int(by_layer.max()), 'expert')} of a layer",
        caption="Experts that ranks have to fetch, by layer.",
        label=f"Moves by layer, from {by_layer.min()} to {by_layer.max()}.",
        option=bars(
            [str(i) for i in plan.placement.layer_ids],
            [Line(name="moves", values=by_layer.astype(float), colour="after")],
            x_name="layer",
            y_name="experts moved",
        ),
        table=Table(
            title="By layer",
            head=("layer", "experts moved"),
            rows=tuple(
                (str(i), str(n)) for i, n in zip(plan.placement.layer_ids, by_layer, strict=True)
            ),
        ),
    )
    return Section(
        key="moves",
        title="Balance against moves",
        lead=_schedule(previous, plan, migration),
        pictures=(balance, layers),
        side_by_side=True,
    )


def _migration(previous: Plan, plan: Plan) -> Migration:
    old_LRK, new_LRK, _ = plan_slots(previous, plan)
    return find_migration(old_LRK, new_LRK)


def _schedule(previous: Plan, plan: Plan, migration: Migration) -> str:
    """Return in words what bringing the plan in takes."""
    _, _, cluster = plan_slots(previous, plan)
    schedule = schedule_moves(migration, cluster.ranks_per_node)
    size = plan.model.expert_bytes or previous.model.expert_bytes
    seconds = None if size is None else schedule.round_seconds(migration, cluster, size)
    text = (
        f"Bringing the plan in moves {plural(migration.num_moves, 'expert')} in "
        f"{plural(schedule.num_rounds, 'round')}"
    )
    if size is not None:
        text += f", {migration.num_moves * size / 1e9:.1f} GB"
    if seconds is not None:
        text += f", predicted to take {sum(seconds):.2f} s at the topology's bandwidths"
    return text + "; the old placement serves meanwhile."
