"""``eplb plan``: from recorded loads to a checked plan file."""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from eplb import __version__
from eplb.cli.moves import moves_limit
from eplb.cli.options import (
    Fraction,
    Name,
    Seconds,
    as_json,
    phase_option,
    profile_arguments,
    read_parts,
    windows_option,
)
from eplb.cli.problem_options import model_of, problem_options, topology_of
from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile, merge_profiles
from eplb.metrics import evaluate
from eplb.placement.solve import SOLVERS, Effort, solve
from eplb.plan import Plan, Quality
from eplb.plan_file import read_plan
from eplb.problem import OBJECTIVES, Problem, Solution
from eplb.slots import EMPTY, Placement, initial_placement
from eplb.split import SPLIT_RULES
from eplb.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.table import Table

    from eplb.arrays import FloatArray

__all__ = [
    "command",
    "engine_start",
    "make_plan",
    "plan_quality",
    "provenance_of",
    "show_plan",
    "show_report",
    "show_unseen",
]


@click.command("plan")
@profile_arguments
@problem_options
@click.option("--solver", type=Name("solver", SOLVERS), default="greedy", show_default=True)
@click.option(
    "--objective",
    type=Name("objective", OBJECTIVES),
    default="mean",
    show_default=True,
    help="Statistic over windows that is minimised.",
)
@click.option(
    "--split",
    type=Name("split rule", SPLIT_RULES),
    default="even",
    show_default=True,
    help="How tokens of an expert divide over its replicas.",
)
@click.option(
    "--shared-ranks",
    is_flag=True,
    help="Allow two replicas of an expert on one rank, as DeepSeek's EPLB does.",
)
@click.option(
    "--previous",
    type=click.Path(),
    metavar="PLAN",
    help="Search from this plan instead of from greedy ones; never ends worse.",
)
@click.option(
    "--max-moves",
    metavar="N|P%",
    help="Move so many experts from --previous at most, or part of all slots.",
)
@click.option(
    "--time-limit",
    type=Seconds(),
    metavar="SECONDS",
    help="For search and exact: the best found by then is the answer.",
)
@click.option(
    "--sweeps",
    type=click.IntRange(min=1),
    help="For search without a time limit: its budget, the same on every machine.",
)
@click.option(
    "--recorded-only",
    is_flag=True,
    help="Let search fit nothing but the recorded windows, not others that are likely to come.",
)
@click.option(
    "--holdout",
    type=Fraction(),
    metavar="PART",
    help="Keep the last part of each profile's windows (as 25%) out of the fit, and score it.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@windows_option
@phase_option
@click.option("-o", "--output", type=click.Path(), required=True, metavar="PLAN")
@click.option(
    "--report",
    "report_path",
    type=click.Path(),
    metavar="FILE.html",
    help="Write the plan's report too, as eplb report does.",
)
@as_json
def command(
    profiles: tuple[str, ...],
    output: str,
    report_path: str | None,
    json_: bool,
    windows: Any,
    phase: str | None,
    holdout: float | None,
    **options: Any,
) -> None:
    """Plan replicas and placement for recorded loads, and prove how good the plan is.

    PROFILE is a recording (.npz, .npy, .csv, or what an engine writes: .json, .pt, .jsonl, a
    folder), or one array of it as FILE.npz:ARRAY. Several profiles are scenarios of one plan.

    \b
    eplb plan loads.npz --nodes 4 --ranks-per-node 8 --slots-per-rank 9 -o plan.yaml
    eplb plan day.npz night.npz --solver search --time-limit 10 --holdout 25% \\
        --nodes 4 --ranks-per-node 8 --slots-per-rank 9 -o plan.yaml
    """
    from eplb.cli.show import progress
    from eplb.files import check_writable

    _check_effort(options)
    check_writable(output)
    if report_path is not None:
        check_writable(report_path)
    topology = topology_of(options)
    with progress("reading profiles"):
        parts = whole = read_parts(profiles, windows, phase)
        unseen = None
        if holdout is not None:
            parts, kept_out = split_holdout(parts, holdout)
            unseen = merge_profiles(kept_out)
        profile = merge_profiles(parts)
        start = None if options["previous"] is None else read_plan(options["previous"]).placement
    problem = Problem(
        profile=profile,
        model=model_of(profile, options),
        topology=topology,
        split=options["split"],
        statistic=options["objective"],
        distinct_ranks=not options["shared_ranks"],
        groups_in_nodes=options["hierarchical"],
    )
    effort = Effort(
        seed=options["seed"],
        time_limit_s=options["time_limit"],
        sweeps=options["sweeps"],
        extend=not options["recorded_only"],
        start=start,
        max_moves=(
            None
            if options["max_moves"] is None
            else moves_limit(options["max_moves"], profile.num_layers * topology.num_slots)
        ),
    )
    # The inner loops are compiled by the first search on a machine, which takes some seconds.
    compiles = options["solver"] != "greedy"
    with progress("solving" + (" (the first search on a machine compiles)" if compiles else "")):
        solution = solve(problem, options["solver"], effort)
    kept_out_windows = [a.num_windows - b.num_windows for a, b in zip(whole, parts, strict=True)]
    plan = make_plan(problem, solution, output, kept_out_windows)
    if report_path is not None:
        from eplb.cli.report.command import write_page
        from eplb.cli.report.make import plan_page

        with progress("drawing the report"):
            write_page(plan_page(plan, output, whole), report_path)
    if json_:
        report = plan_report(plan, solution, output)
        if report_path is not None:
            report["report"] = report_path
        if unseen is not None:
            balance = evaluate(unseen, plan.placement, topology, plan.split)
            report["holdout"] = {"windows": unseen.num_windows, **balance.to_dict()}
        click.echo(json.dumps(report))
        return
    show_plan(problem, solution, plan, output)
    if unseen is not None:
        show_unseen(problem, plan, unseen)
    if report_path is not None:
        show_report(report_path)


def _check_effort(options: dict[str, Any]) -> None:
    """Refuse options that the solver would not heed."""
    if options["previous"] is not None and options["solver"] == "greedy":
        raise InvalidInput(
            "--solver greedy starts from nothing, so --previous says nothing to it; use --solver "
            "search"
        )
    if options["max_moves"] is not None:
        if options["previous"] is None:
            raise InvalidInput("--max-moves needs a plan to move from; give --previous")
        for name in ("sweeps", "time_limit"):
            if options[name] is not None:
                raise InvalidInput(
                    f"--max-moves ends by itself; leave --{name.replace('_', '-')} out"
                )
    if options["sweeps"] is not None:
        if options["solver"] != "search":
            raise InvalidInput(
                f"--solver {options['solver']} makes no sweeps; use --solver search or leave "
                "--sweeps out"
            )
        if options["time_limit"] is not None:
            raise InvalidInput(
                "--sweeps and --time-limit are two budgets; give one (only with --sweeps are "
                "results the same on every machine)"
            )


def split_holdout(
    parts: list[LoadProfile], part: float
) -> tuple[list[LoadProfile], list[LoadProfile]]:
    """Cut each profile's last windows off, at least one and not all.

    Raises
    ------
    InvalidInput
        A profile has a single window.
    """
    fitted, kept_out = [], []
    for profile in parts:
        if profile.num_windows < 2:
            raise InvalidInput(
                f"{profile.source} has one window, so --holdout leaves nothing to fit; score the "
                "plan on another profile with eplb evaluate"
            )
        size = min(max(round(part * profile.num_windows), 1), profile.num_windows - 1)
        fitted.append(profile.windows(0, profile.num_windows - size))
        kept_out.append(profile.windows(profile.num_windows - size, None))
    return fitted, kept_out


def make_plan(
    problem: Problem, solution: Solution, output: str, kept_out_windows: Sequence[int] = ()
) -> Plan:
    """Assemble a plan, have it checked independently, and write it.

    ``kept_out_windows`` are those at the end of each profile that the plan was not fitted to; they
    are recorded, for a report to tell them apart.
    """
    from eplb.check import check_plan
    from eplb.plan_file import write_plan

    plan = Plan(
        model=problem.model,
        topology=problem.topology,
        placement=solution.placement,
        split=problem.split,
        statistic=problem.statistic,
        quality=plan_quality(problem, solution),
        provenance={
            **provenance_of(problem, solution),
            **({"holdout_windows": list(kept_out_windows)} if any(kept_out_windows) else {}),
        },
    )
    check_plan(
        plan,
        problem.profile,
        distinct_ranks=problem.distinct_ranks,
        groups_in_nodes=problem.groups_in_nodes,
    )
    write_plan(plan, output)
    return plan


def plan_quality(problem: Problem, solution: Solution) -> Quality:
    """Return what a plan's file says of its worth."""
    proof = {"objective": solution.objective, "bound": solution.bound, "gap": solution.gap}
    return Quality(
        imbalance_mean=solution.balance.imbalance_mean,
        imbalance_worst=solution.balance.imbalance_worst,
        bound_mean=solution.bound_mean,
        gap_mean=solution.balance.imbalance_mean / solution.bound_mean - 1,
        **({} if problem.statistic == "mean" else proof),
    )


def provenance_of(problem: Problem, solution: Solution) -> dict[str, Any]:
    """Return where a plan comes from, as JSON values."""
    return {
        "solver": solution.solver,
        "policy": "hierarchical" if problem.groups_in_nodes else "global",
        "distinct_ranks": problem.distinct_ranks,
        "seed": solution.seed,
        "status": solution.status,
        "stop_reason": solution.stop_reason,
        **solution.notes,
        "profile": problem.profile.source,
        "profile_windows": problem.profile.num_windows,
        "profile_sha256": problem.profile.sha256(),
        "versions": {
            "eplb-toolkit": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def plan_report(plan: Plan, solution: Solution, output: str) -> dict[str, Any]:
    """Return the JSON document of ``eplb plan --json``."""
    assert plan.quality is not None
    return {
        "path": output,
        "digest": plan.digest(),
        "status": solution.status,
        "stop_reason": solution.stop_reason,
        "solver": solution.solver,
        "seed": solution.seed,
        "time_s": solution.time_s,
        "notes": dict(solution.notes),
        "quality": plan.quality.to_dict(),
        "balance": solution.balance.to_dict(),
    }


def show_plan(problem: Problem, solution: Solution, plan: Plan, output: str) -> None:
    """Print what the plan does: before and after, bound and gap, and what was written."""
    from eplb.cli import show
    from eplb.metrics import rank_load
    from eplb.slots import replica_count

    profile, topology, model = problem.profile, problem.topology, problem.model
    start = engine_start(profile.layer_ids, model.num_experts, topology)
    # What engines start with has no fractions of its own.
    first = "even" if problem.split == "weighted" else problem.split
    before = evaluate(profile, start, topology, first)
    after = solution.balance
    before_WLR = rank_load(profile, start, topology, first)
    after_WLR = rank_load(profile, plan.placement, topology, problem.split)
    out = show.console()
    out.print(show.profile_line(profile))
    out.print(
        f"[bold]{topology.label}[/] on {show.plural(topology.num_nodes, 'node')}: "
        f"{topology.num_usable_slots} slots a layer, "
        f"{topology.num_usable_slots - model.num_experts} redundant; "
        f"split {problem.split}; {solution.solver}, "
        f"{'hierarchical' if problem.groups_in_nodes else 'global'}"
    )
    out.print()
    out.print(
        show.layer_table(
            profile,
            [
                ("before", before, before_WLR),
                ("after", after, after_WLR),
            ],
            solution.bound_L,
        )
    )
    out.print()
    figures = show.table("", "before", "after")
    number: Callable[[float], str] = show.ratio
    figures.add_row("imbalance, mean", number(before.imbalance_mean), number(after.imbalance_mean))
    if profile.num_windows > 1:
        figures.add_row(
            "imbalance, p95 of windows", number(before.imbalance_p95), number(after.imbalance_p95)
        )
        figures.add_row(
            "imbalance, worst window", number(before.imbalance_worst), number(after.imbalance_worst)
        )
    figures.add_row(
        "imbalance, worst layer",
        number(before.imbalance_worst_layer),
        number(after.imbalance_worst_layer),
    )
    figures.add_row("balancedness", number(before.balancedness), number(after.balancedness))
    figures.add_row(
        "max dispatch receive, rows",
        show.rows(before.max_receive_rows_mean),
        show.rows(after.max_receive_rows_mean),
    )
    out.print(figures)
    out.print()
    if profile.num_windows > 1:
        out.print(_window_table({"before": before_WLR, "after": after_WLR}, topology))
        out.print()
    if problem.statistic != "mean":
        what = "worst window" if problem.statistic == "worst" else "mean of the worst tenth"
        out.print(f"Minimised: the {what}, {solution.objective:.4f}.")
    proof = (
        "No placement on these slots does better: the plan is optimal."
        if solution.status == "optimal"
        else f"No placement on these slots is below {solution.bound:.4f}: the plan is at most "
        f"{show.percent(solution.gap)} above the best there is."
    )
    out.print(proof)
    notes = solution.notes
    if notes.get("windows_added"):
        out.print(
            f"Fitted to {notes['windows_kept']} of {notes['windows_recorded']} recorded windows "
            f"and {notes['windows_added']} that are likely to come."
        )
    most = int(replica_count(plan.placement.phys_to_log_LS, model.num_experts).max())
    sizes = f"most replicas of an expert {most}"
    if model.expert_bytes is not None:
        extra = topology.num_usable_slots - model.num_experts
        ranks = len(topology.ranks_in_service)
        size = extra * model.expert_bytes * len(model.layer_ids) / ranks
        sizes += f"; redundancy costs {size / 1e9:.2f} GB a rank"
    spent = solution.time_s
    time = f"{1e3 * spent:.1f} ms" if spent < 1 else f"{spent:.1f} s"
    out.print(f"Solved in {time}; {sizes}.")
    out.print(f"Checked and written: {show.name(output)} ({plan.digest()[:23]}...)")


def _window_table(load_WLR: Mapping[str, FloatArray], topology: Topology) -> Table:
    from eplb.cli import show
    from eplb.metrics import imbalance, step_costs

    costs = [(name, step_costs(imbalance(load, topology))) for name, load in load_WLR.items()]
    return show.window_table(costs)


def show_unseen(problem: Problem, plan: Plan, unseen: LoadProfile) -> None:
    """Print what the plan makes of windows that it was not fitted to."""
    from eplb.cli import show

    topology = problem.topology
    start = engine_start(unseen.layer_ids, problem.model.num_experts, topology)
    split = "even" if plan.split == "weighted" else plan.split
    before = evaluate(unseen, start, topology, split)
    after = evaluate(unseen, plan.placement, topology, plan.split)
    grid = show.table(
        f"on {show.plural(unseen.num_windows, 'window')} it was not fitted to", "before", "after"
    )
    for name, figure in (
        ("imbalance, mean", "imbalance_mean"),
        ("imbalance, p95 of windows", "imbalance_p95"),
        ("imbalance, worst window", "imbalance_worst"),
    ):
        grid.add_row(name, *(show.ratio(getattr(side, figure)) for side in (before, after)))
    out = show.console()
    out.print()
    out.print(grid)


def show_report(path: str) -> None:
    """Print where the report is."""
    from eplb.cli import show

    show.console().print(f"Report written: {show.name(path)}")


def engine_start(layer_ids: Sequence[int], num_experts: int, topology: Topology) -> Placement:
    """Return what engines start with, on the slots that there are."""
    usable_S = topology.has_slot_RK.reshape(-1)
    start = initial_placement(layer_ids, num_experts, int(usable_S.sum()))
    slots_LS = np.full((len(layer_ids), len(usable_S)), EMPTY)
    slots_LS[:, usable_S] = start.phys_to_log_LS
    return replace(start, phys_to_log_LS=slots_LS)
