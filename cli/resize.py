"""``eplb resize``: from one number of ranks or slots to another, moving few experts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from eplb.cli.moves import bandwidth_option, spare_slots_option
from eplb.cli.options import (
    Fraction,
    Name,
    Numbers,
    Seconds,
    as_json,
    phase_option,
    profile_arguments,
    read_windows,
    windows_option,
)
from eplb.errors import InvalidInput

if TYPE_CHECKING:
    from eplb.topology import Topology

__all__ = ["command"]


@click.command("resize")
@click.argument("plan_path", metavar="PLAN", type=click.Path())
@profile_arguments
@click.option("--nodes", type=click.IntRange(min=1), help="Nodes from now on.")
@click.option(
    "--ranks-per-node", type=click.IntRange(min=1), help="As the plan has where left out."
)
@click.option(
    "--slots-per-rank", type=click.IntRange(min=1), help="As the plan has where left out."
)
@click.option(
    "--back-in-service",
    type=Numbers(),
    help="Ranks that the plan has out of service and that serve again, as 17,18 or 16-23.",
)
@click.option(
    "--max-moves",
    type=click.IntRange(min=0),
    metavar="N",
    help="Experts that ranks may fetch over all layers.",
)
@click.option(
    "--within",
    type=Fraction(),
    default=0.01,
    show_default=True,
    metavar="PART",
    help="Without --max-moves: how far above the best imbalance the plan of fewest moves may be.",
)
@spare_slots_option
@bandwidth_option
@click.option(
    "--solver",
    type=Name("solver", ("greedy", "search", "exact")),
    default="search",
    show_default=True,
    help="Of the free optimum.",
)
@click.option(
    "--time-limit",
    type=Seconds(),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Of that solver.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(), required=True, metavar="PLAN")
@windows_option
@phase_option
@as_json
def command(
    plan_path: str,
    profiles: tuple[str, ...],
    output: str,
    json_: bool,
    windows: Any,
    phase: str | None,
    **options: Any,
) -> None:
    """Plan for other numbers of nodes, ranks or slots, near the best balance, moving few experts.

    Ranks keep their numbers: the first ones stay, the last ones leave or are new. All serve until
    the experts have arrived, so none is ever missing.

    \b
    eplb resize day.yaml loads.npz --nodes 12 --slots-per-rank 3 -o night.yaml
    """
    from eplb.check import check_plan
    from eplb.cli.show import progress
    from eplb.files import check_writable
    from eplb.placement.resize import resize
    from eplb.placement.schedule import schedule_moves
    from eplb.placement.solve import Effort
    from eplb.plan_file import read_plan, write_plan
    from eplb.topology_file import with_bandwidths

    check_writable(output)
    plan = read_plan(plan_path)
    topology = _resized(plan.topology, options)
    cluster, source = with_bandwidths(topology, options["topology"])
    profile = read_windows(profiles, windows, phase)
    with progress("searching"):
        found = resize(
            plan,
            profile,
            topology,
            max_moves=options["max_moves"],
            within=options["within"],
            solver=options["solver"],
            effort=Effort(seed=options["seed"], time_limit_s=options["time_limit"]),
        )
    check_plan(found.plan)
    schedule = schedule_moves(
        found.migration, cluster.ranks_per_node, spare_slots=options["spare_slots"], in_parts=True
    )
    size, moves = plan.model.expert_bytes, found.migration.num_moves
    rounds_s = None if size is None else schedule.round_seconds(found.migration, cluster, size)
    write_plan(found.plan, output)
    imbalance = next(value for count, value in reversed(found.curve) if count <= moves)
    report: dict[str, Any] = {
        "path": output,
        "digest": found.plan.digest(),
        "from": plan.topology.label,
        "to": topology.label,
        "ranks_out_of_service": list(topology.ranks_out_of_service),
        "moved_experts": moves,
        "moved_bytes": None if size is None else moves * size,
        "forced_experts": found.forced_moves,
        "imbalance": imbalance,
        "free_imbalance": found.free_imbalance,
        "free_moved_experts": found.free_moves,
        "rounds": schedule.num_rounds,
        "min_rounds": schedule.min_rounds,
        "staging_slots": schedule.staging_slots,
        "seconds": None if rounds_s is None else sum(rounds_s),
        "bandwidths": source,
        "curve": [{"moves": count, "imbalance": value} for count, value in found.curve],
    }
    if json_:
        click.echo(json.dumps(report))
        return
    _show(report)


def _resized(topology: Topology, options: dict[str, Any]) -> Topology:
    """Return the topology that the options ask for; ranks out of service stay so."""
    from eplb.placement.resize import check_equal_ranks

    check_equal_ranks(topology)
    changes = {
        field: options[option]
        for option, field in (
            ("nodes", "num_nodes"),
            ("ranks_per_node", "ranks_per_node"),
            ("slots_per_rank", "slots_per_rank"),
        )
        if options[option] is not None
    }
    back = options["back_in_service"] or ()
    strange = set(back) - set(topology.ranks_out_of_service)
    if strange:
        raise InvalidInput(
            f"rank {min(strange)} is not out of service in the plan; correct --back-in-service"
        )
    if not changes and not back:
        raise InvalidInput(
            "nothing changes; give --nodes, --ranks-per-node, --slots-per-rank or --back-in-service"
        )
    num_ranks = changes.get("num_nodes", topology.num_nodes) * changes.get(
        "ranks_per_node", topology.ranks_per_node
    )
    out = set(topology.ranks_out_of_service) - set(back)
    return replace(topology, **changes, ranks_out_of_service=tuple(r for r in out if r < num_ranks))


def _show(report: dict[str, Any]) -> None:
    from eplb.cli import show

    out = show.console()
    grid = show.table(f"{report['from']} to {report['to']}", "experts moved", "imbalance")
    curve = report["curve"]
    grid.add_row("what is forced", str(curve[0]["moves"]), show.ratio(curve[0]["imbalance"]))
    grid.add_row("this plan", str(report["moved_experts"]), show.ratio(report["imbalance"]))
    grid.add_row(
        "the free optimum", str(report["free_moved_experts"]), show.ratio(report["free_imbalance"])
    )
    out.print(grid)
    size, seconds = report["moved_bytes"], report["seconds"]
    out.print(
        f"{show.plural(report['rounds'], 'round')} in which a rank sends to one and receives from "
        f"one; {report['staging_slots']} spare slots a rank"
        + ("" if size is None else f"; {size / 1e9:.1f} GB")
        + ("" if seconds is None else f" in {seconds:.3f} s ({report['bandwidths']})")
        + "."
    )
    out.print(f"Checked and written: {show.name(report['path'])}")
