"""``eplb replan``: the few moves worth making from the plan in force, or none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from eplb.cli.moves import (
    bandwidth_option,
    charge_options,
    check_charge,
    moves_limit,
)
from eplb.cli.options import as_json, phase_option, profile_arguments, read_windows, windows_option
from eplb.errors import InvalidInput

if TYPE_CHECKING:
    from eplb.load_profile import LoadProfile
    from eplb.placement.replan import BreakEven, Replan
    from eplb.plan import Plan
    from eplb.problem import Problem
    from eplb.slots import Placement

__all__ = ["command"]

# Numbers of moves that are scheduled to find the one that saves most: a schedule of hundreds of
# moves takes tens of milliseconds.
WEIGHED_POINTS = 32


@click.command("replan")
@click.argument("plan_path", metavar="PLAN", type=click.Path())
@profile_arguments
@click.option(
    "--max-moves",
    default="4%",
    show_default=True,
    metavar="N|P%",
    help="Experts that ranks may fetch over all layers, or part of all slots.",
)
@click.option(
    "--max-moves-per-layer",
    type=click.IntRange(min=0),
    metavar="N",
    help="The same within each layer.",
)
@click.option(
    "--horizon",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Steps until the next replan, in which moves have to pay off.",
)
@charge_options
@bandwidth_option
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(), metavar="PLAN", help="Where the new plan goes.")
@windows_option
@phase_option
@as_json
def command(
    plan_path: str,
    profiles: tuple[str, ...],
    max_moves: str,
    max_moves_per_layer: int | None,
    horizon: int | None,
    step_ms: float | None,
    expert_bytes: int | None,
    topology: str | None,
    seed: int,
    output: str | None,
    windows: Any,
    phase: str | None,
    json_: bool,
) -> None:
    """Improve a plan for new loads within a limit on moves, or say why to keep it.

    The windows of PROFILE are taken for the past, oldest first. With --step-ms and --horizon moves
    are made only as far as they save more time than they take.

    \b
    eplb replan plan.yaml today.npz --max-moves 2% -o next.yaml
    eplb replan plan.yaml today.npz --step-ms 40 --horizon 5000 --topology h800 -o next.yaml
    """
    from eplb.cli import show
    from eplb.files import check_writable
    from eplb.metrics import evaluate
    from eplb.placement.forecast import recent_windows
    from eplb.placement.replan import replan
    from eplb.plan_file import read_plan
    from eplb.topology_file import with_bandwidths

    check_charge(step_ms, horizon)
    if output is not None:
        check_writable(output)
    plan = read_plan(plan_path)
    profile = read_windows(profiles, windows, phase)
    problem = _problem(plan, profile)
    slots = profile.num_layers * plan.topology.num_slots
    limit = moves_limit(max_moves, slots)
    with show.progress("searching"):
        found = replan(
            problem,
            plan.placement,
            max_moves=limit,
            max_moves_per_layer=max_moves_per_layer,
            seed=seed,
        )
        even = None
        if step_ms is not None and horizon is not None:
            size = expert_bytes or plan.model.expert_bytes
            cluster, _ = with_bandwidths(plan.topology, topology)
            even = _weighed(found, replace(problem, topology=cluster), size, step_ms, horizon)
    moves = found.num_moves if even is None else even.moves
    new = _merged(plan.placement, found.at(moves))
    after_plan = replace(plan, placement=new)
    recent = recent_windows(profile)
    balances = [
        evaluate(recent, side.placement, plan.topology, plan.split) for side in (plan, after_plan)
    ]
    forecast = {point.moves: point.imbalance for point in found.curve}
    size = expert_bytes or plan.model.expert_bytes
    report = {
        "decision": "move" if moves else "keep",
        "reason": None if moves else _reason(found, even),
        "max_moves": limit,
        "moved_experts": moves,
        "moved_bytes": None if size is None else moves * size,
        "recent_windows": recent.num_windows,
        "imbalance_before": balances[0].imbalance_mean,
        "imbalance_after": balances[1].imbalance_mean,
        "forecast_before": forecast[0],
        "forecast_after": forecast[moves],
        "gain_seconds": None if even is None else even.gain_s,
        "transfer_seconds": None if even is None else even.transfer_s,
        "curve": [{"moves": p.moves, "imbalance": p.imbalance} for p in found.curve],
        "path": output,
    }
    if output is not None:
        _write(problem, after_plan, moves, plan.digest(), seed, output)
    if json_:
        click.echo(json.dumps(report))
        return
    _show(report, slots)


def _problem(plan: Plan, profile: LoadProfile) -> Problem:
    """Return what the plan was made for, with new loads."""
    from eplb.problem import Problem

    missing = sorted(set(profile.layer_ids) - set(plan.placement.layer_ids))
    if missing:
        raise InvalidInput(
            f"{profile.source} has load in layer {missing[0]}, which the plan does not have; give "
            "a profile of the plan's layers"
        )
    return Problem(
        profile=profile,
        model=replace(plan.model, layer_ids=profile.layer_ids),
        topology=plan.topology,
        split=plan.split,
        statistic=plan.statistic,
        groups_in_nodes=plan.provenance.get("policy") == "hierarchical",
    )


def _weighed(
    found: Replan, problem: Problem, size: int | None, step_ms: float, horizon: int
) -> BreakEven:
    """Return the number of moves that saves most time within the horizon."""
    from eplb.placement.replan import break_even
    from eplb.placement.transfer import transfer_seconds

    curve = found.curve
    if len(curve) > WEIGHED_POINTS:
        chosen = np.unique(np.linspace(0, len(curve) - 1, WEIGHED_POINTS).round().astype(int))
        curve = tuple(curve[i] for i in chosen)
    old = found.at(0)
    return break_even(
        curve,
        step_s=step_ms / 1e3,
        horizon_steps=horizon,
        transfer_s=lambda moves: transfer_seconds(old, found.at(moves), problem.topology, size),
    )


def _reason(found: Replan, even: BreakEven | None) -> str:
    if even is None or len(found.curve) == 1:
        return "no move within the limit lowers the imbalance"
    return (
        f"moves would gain {even.gain_s:.3g} s within the horizon and take {even.transfer_s:.3g} s"
    )


def _merged(old: Placement, part: Placement) -> Placement:
    """Return the old placement with the layers of the new one."""
    rows = old.rows(part.layer_ids)
    slots_LS = old.phys_to_log_LS.copy()
    slots_LS[rows] = part.phys_to_log_LS
    weights_LS = None
    if old.split_weights_LS is not None and part.split_weights_LS is not None:
        weights_LS = old.split_weights_LS.copy()
        weights_LS[rows] = part.split_weights_LS
    return replace(old, phys_to_log_LS=slots_LS, split_weights_LS=weights_LS)


def _write(problem: Problem, plan: Plan, moves: int, previous: str, seed: int, output: str) -> None:
    """Write the plan with its quality on the profile, checked as all plans are."""
    from eplb.check import check_plan
    from eplb.cli.plan import plan_quality, provenance_of
    from eplb.placement.solve import Effort, solve
    from eplb.plan_file import write_plan

    solution = solve(problem, "search", Effort(seed=seed, start=plan.placement, max_moves=0))
    provenance = {
        **provenance_of(problem, solution),
        "solver": "replan",
        "previous": previous,
        "moved_experts": moves,
    }
    quality = plan_quality(problem, solution)
    plan = replace(plan, quality=quality, provenance=provenance)
    check_plan(
        plan,
        problem.profile,
        distinct_ranks=problem.distinct_ranks,
        groups_in_nodes=problem.groups_in_nodes,
    )
    write_plan(plan, output)


def _show(report: dict[str, Any], num_slots: int) -> None:
    from eplb.cli import show

    out = show.console()
    if report["decision"] == "keep":
        out.print(f"Keep the plan, because {report['reason']}.")
        return
    grid = show.table("", "before", "after")
    for name, key in (("imbalance, recent windows", "imbalance"), ("forecast", "forecast")):
        grid.add_row(name, show.ratio(report[f"{key}_before"]), show.ratio(report[f"{key}_after"]))
    out.print(grid)
    moves = report["moved_experts"]
    line = f"replan: {show.plural(moves, 'move')}, {show.percent(moves / num_slots)} of the slots"
    if report["gain_seconds"] is not None:
        line += (
            f"; they gain {report['gain_seconds']:.3g} s within the horizon and take "
            f"{report['transfer_seconds']:.3g} s"
        )
    out.print(line + ".")
    if report["path"] is not None:
        out.print(f"Checked and written: {show.name(report['path'])}")
