"""``eplb repair``: a plan for the ranks that are left, and what has to be fetched for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from eplb.cli.moves import bandwidth_option
from eplb.cli.options import (
    Numbers,
    as_json,
    phase_option,
    read_windows,
    windows_option,
)
from eplb.errors import InvalidInput

if TYPE_CHECKING:
    from eplb.placement.migration import Migration
    from eplb.plan import Plan

__all__ = ["command"]


@click.command("repair")
@click.argument("plan_path", metavar="PLAN", type=click.Path())
@click.argument("profiles", nargs=-1, metavar="[PROFILE...]", type=click.Path())
@click.option("--dead-ranks", type=Numbers(), help="Ranks that died, as 17,18 or 16-23.")
@click.option("--dead-nodes", type=Numbers(), help="Nodes that died with all their ranks.")
@click.option(
    "--max-moves",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Experts that may be sent between ranks, beyond what is lost, for the balance; needs a "
    "profile.",
)
@bandwidth_option
@click.option("-o", "--output", type=click.Path(), required=True, metavar="PLAN")
@windows_option
@phase_option
@as_json
def command(
    plan_path: str,
    profiles: tuple[str, ...],
    dead_ranks: tuple[int, ...] | None,
    dead_nodes: tuple[int, ...] | None,
    max_moves: int,
    topology: str | None,
    output: str,
    windows: Any,
    phase: str | None,
    json_: bool,
) -> None:
    """Give every expert a slot again after ranks died, by as few transfers as it takes.

    Experts of which no replica survives are listed: they are loaded from the checkpoint, in the
    place of redundant replicas. With a profile the balance decides which replicas make way.

    \b
    eplb repair plan.yaml loads.npz --dead-ranks 17 -o repaired.yaml
    """
    from eplb.check import check_plan
    from eplb.files import check_writable
    from eplb.metrics import evaluate
    from eplb.placement.repair import repair
    from eplb.placement.schedule import schedule_moves
    from eplb.plan_file import read_plan, write_plan
    from eplb.topology_file import with_bandwidths

    check_writable(output)
    plan = read_plan(plan_path)
    dead = _dead(plan, dead_ranks, dead_nodes)
    profile = read_windows(profiles, windows, phase) if profiles else None
    found = repair(plan, dead, profile, max_moves=max_moves)
    check_plan(found.plan)
    cluster, source = with_bandwidths(found.plan.topology, topology)
    schedule = schedule_moves(found.moves, cluster.ranks_per_node)
    size = plan.model.expert_bytes
    rounds_s = None if size is None else schedule.round_seconds(found.moves, cluster, size)
    write_plan(found.plan, output)
    lost = _lost(found.plan, found.lost)

    def balance(of: Plan) -> float | None:
        if profile is None:
            return None
        return evaluate(profile, of.placement, of.topology, of.split).imbalance_mean

    report: dict[str, Any] = {
        "path": output,
        "digest": found.plan.digest(),
        "ranks_out_of_service": list(found.plan.topology.ranks_out_of_service),
        "lost_experts": len(lost),
        "min_lost_experts": found.min_loads,
        "lost_bytes": None if size is None else len(lost) * size,
        "most_lost_of_a_rank": int(np.bincount(found.lost.rank_M, minlength=1).max()),
        "lost": lost,
        "moved_experts": found.moves.num_moves,
        "moved_bytes": None if size is None else found.moves.num_moves * size,
        "rounds": schedule.num_rounds,
        "seconds": None if rounds_s is None else sum(rounds_s),
        "bandwidths": source,
        "imbalance_before": balance(plan),
        "imbalance_after": balance(found.plan),
    }
    if json_:
        click.echo(json.dumps(report))
        return
    _show(report, len(dead))


def _dead(
    plan: Plan, dead_ranks: tuple[int, ...] | None, dead_nodes: tuple[int, ...] | None
) -> list[int]:
    """Return the ranks that died."""
    if dead_ranks is None and dead_nodes is None:
        raise InvalidInput("nothing died; give --dead-ranks or --dead-nodes")
    per_node, nodes = plan.topology.ranks_per_node, dead_nodes or ()
    strange = [node for node in nodes if node >= plan.topology.num_nodes]
    if strange:
        raise InvalidInput(
            f"node {strange[0]} does not exist; the plan has nodes 0 to "
            f"{plan.topology.num_nodes - 1}"
        )
    of_nodes = {node * per_node + i for node in nodes for i in range(per_node)}
    return sorted(of_nodes.union(dead_ranks or ()))


def _lost(plan: Plan, lost: Migration) -> list[dict[str, int]]:
    """Return what to load from the checkpoint, and where to."""
    per_rank = plan.topology.slots_per_rank
    columns = (lost.layer_M, lost.rank_M, lost.slot_M, lost.expert_M)
    return [
        {
            "layer": plan.placement.layer_ids[layer],
            "expert": expert,
            "rank": rank,
            "slot": rank * per_rank + slot,
        }
        for layer, rank, slot, expert in zip(*(c.tolist() for c in columns), strict=True)
    ]


def _show(report: dict[str, Any], num_dead: int) -> None:
    from eplb.cli import show

    out = show.console()
    size, lost = report["lost_bytes"], show.plural(len(report["lost"]), "expert")
    load = "" if size is None else f", {size / 1e9:.2f} GB"
    out.print(
        f"{show.plural(num_dead, 'rank')} out of service: {lost} to load from the checkpoint{load},"
        f" the least that will do; at most {report['most_lost_of_a_rank']} on one rank."
    )
    by_layer: dict[int, list[int]] = {}
    for place in report["lost"]:
        by_layer.setdefault(place["layer"], []).append(place["expert"])
    if by_layer:
        grid = show.table("layer", "experts that no rank holds any more")
        for layer, experts in by_layer.items():
            grid.add_row(str(layer), " ".join(map(str, sorted(experts))))
        out.print(grid)
    if report["moved_experts"]:
        seconds = report["seconds"]
        spent = "" if seconds is None else f", {seconds:.3f} s at the bandwidths of the "
        out.print(
            f"{show.plural(report['moved_experts'], 'expert')} sent between ranks for the balance, "
            f"in {show.plural(report['rounds'], 'round')}"
            + (spent and spent + str(report["bandwidths"]))
            + "."
        )
    if report["imbalance_before"] is not None:
        out.print(
            f"Imbalance {show.ratio(report['imbalance_before'])} before, "
            f"{show.ratio(report['imbalance_after'])} on the ranks that are left."
        )
    out.print(f"Checked and written: {show.name(report['path'])}")
