"""``eplb replay``: what a policy of replanning would have made of a recorded stream."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from eplb.cli.moves import charge_options
from eplb.cli.options import (
    Fraction,
    Name,
    Seconds,
    as_json,
    phase_option,
    read_windows,
    windows_option,
)
from eplb.cli.problem_options import model_of, problem_options, topology_of
from eplb.errors import InvalidInput
from eplb.placement.replay import POLICIES, ReplayOptions, replay
from eplb.split import SPLIT_RULES

if TYPE_CHECKING:
    from eplb.placement.replay import Replay
    from eplb.problem import Problem

__all__ = ["command"]

FORMATS = ("png", "svg", "pdf")


@click.command("replay")
@click.argument("profile_path", metavar="PROFILE")
@click.option("--every", type=click.IntRange(min=1), required=True, help="Steps between decisions.")
@click.option("--warmup", type=click.IntRange(min=1), help="Steps before the first; as --every.")
@click.option(
    "--policy",
    type=Name("policy", POLICIES),
    default="follow",
    show_default=True,
    help=f"What decides: {', '.join(POLICIES)}.",
)
@click.option(
    "--fit-steps",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="Of resolve: the last steps that a decision is fitted to.",
)
@click.option(
    "--max-share",
    type=Fraction(),
    default=0.04,
    show_default=True,
    metavar="PART",
    help="Of follow: the part of all slots that a decision may fill anew.",
)
@click.option(
    "--never-lift",
    is_flag=True,
    help="Of follow: keep that limit also after a jump of the traffic.",
)
@click.option(
    "--false-alarms",
    type=Fraction(),
    default=0.01,
    show_default=True,
    metavar="PART",
    help="Of the test for jumps: how often it may err at a decision.",
)
@click.option(
    "--move-above",
    type=Fraction(),
    default=0.02,
    show_default=True,
    metavar="PART",
    help="Of follow-threshold: start to move where that much imbalance is to be gained.",
)
@click.option(
    "--rest-below",
    type=Fraction(),
    default=0.01,
    show_default=True,
    metavar="PART",
    help="Of follow-threshold: stop where only that much is.",
)
@click.option("--plans", type=click.Path(), metavar="DIR", help="Write the plan of each decision.")
@click.option("--plot", type=click.Path(), metavar="FILE", help="Draw it: .png, .svg or .pdf.")
@problem_options
@click.option(
    "--shared-ranks",
    is_flag=True,
    help="Of resolve: allow two replicas of an expert on one rank, as DeepSeek's EPLB does.",
)
@click.option("--split", type=Name("split rule", SPLIT_RULES), default="even", show_default=True)
@charge_options
@click.option("--time-limit", type=Seconds(), metavar="SECONDS", help="Of each search.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--html",
    "html_path",
    type=click.Path(),
    metavar="FILE.html",
    help="Write pictures: imbalance and moves over time, drift of the stream.",
)
@windows_option
@phase_option
@as_json
def command(
    profile_path: str,
    every: int,
    warmup: int | None,
    policy: str,
    plans: str | None,
    plot: str | None,
    html_path: str | None,
    step_ms: float | None,
    expert_bytes: int | None,
    windows: Any,
    phase: str | None,
    json_: bool,
    **options: Any,
) -> None:
    """Live through a recorded stream: fit on the past, move, score the steps that follow.

    With --step-ms moves are charged: seconds of transfer over seconds of serving are added to the
    imbalance.

    \b
    eplb replay stream.npz --every 20 --warmup 120 --nodes 4 --ranks-per-node 8 \\
        --slots-per-rank 9 --plot follow.svg
    """
    from eplb.cli import show
    from eplb.files import check_writable, write_atomic
    from eplb.placement.solve import Effort
    from eplb.problem import Problem

    kind = "" if plot is None else Path(plot).suffix.lower().removeprefix(".")
    if plot is not None:
        if kind not in FORMATS:
            raise InvalidInput(f"--plot {plot}: pictures are {', '.join(FORMATS)}; name one")
        check_writable(plot)
    if html_path is not None:
        check_writable(html_path)
    if plans is not None:
        _make_folder(Path(plans))
    topology = topology_of(options)
    profile = read_windows((profile_path,), windows, phase)
    problem = Problem(
        profile=profile,
        model=model_of(profile, options),
        topology=topology,
        split=options["split"],
        distinct_ranks=not options["shared_ranks"],
        groups_in_nodes=options["hierarchical"],
    )
    settings = ReplayOptions(
        every=every,
        warmup=warmup or every,
        policy=policy,
        fit_steps=options["fit_steps"],
        max_share=options["max_share"],
        lift_after_jump=not options["never_lift"],
        false_alarm_rate=options["false_alarms"],
        move_above=options["move_above"],
        rest_below=options["rest_below"],
        effort=Effort(seed=options["seed"], time_limit_s=options["time_limit"]),
    )
    with show.progress(f"replaying {profile.num_windows} steps"):
        result = replay(problem, settings)
    if plans is not None:
        _write_plans(problem, result, policy, Path(plans))
    size = expert_bytes or problem.model.expert_bytes
    report = {"policy": policy, **_figures(problem, result, size, step_ms)}
    if plot is not None:
        from eplb.cli.replay_plot import draw

        write_atomic(plot, draw({policy: result}, size, kind))
        report["plot"] = plot
    if html_path is not None:
        from eplb.cli.report.command import write_page
        from eplb.cli.report.make import replay_page
        from eplb.cli.report.replay_section import replay_log

        write_page(replay_page([replay_log(report, "replay")], profile), html_path)
    if json_:
        click.echo(json.dumps(report))
        return
    _show(report, sum(d.placement.phys_to_log_LS.size for d in result.decisions))
    if html_path is not None:
        from eplb.cli.plan import show_report

        show_report(html_path)


def _make_folder(folder: Path) -> None:
    """Make a folder before long work, so that a place that cannot be written to is found first."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(
            f"--plans {folder}: no folder can be made there ({error.strerror}); name another"
        ) from None


def _write_plans(problem: Problem, result: Replay, policy: str, folder: Path) -> None:
    """Write the plan in force from each decision on."""
    from eplb.plan import Plan
    from eplb.plan_file import write_plan

    for decision in result.decisions:
        plan = Plan(
            model=problem.model,
            topology=problem.topology,
            placement=decision.placement,
            split=problem.split,
            provenance={
                "solver": f"replay {policy}",
                "step": decision.step,
                "moved_experts": decision.moved,
                "policy": "hierarchical" if problem.groups_in_nodes else "global",
                "profile": problem.profile.source,
                "profile_sha256": problem.profile.sha256(),
            },
        )
        write_plan(plan, folder / f"step-{decision.step:06d}.yaml")


def _figures(
    problem: Problem, result: Replay, size: int | None, step_ms: float | None
) -> dict[str, Any]:
    """Return the JSON document, but for the policy's name."""
    # Steps without load cost nothing and are not scored.
    cost_W = result.imbalance_W[~np.isnan(result.imbalance_W)]
    report: dict[str, Any] = {
        "imbalance_mean": float(cost_W.mean()),
        "imbalance_p95": float(np.percentile(cost_W, 95)),
        "moved_experts": result.moved,
        "moved_bytes": None if size is None else result.moved * size,
        "replans": [
            {
                "step": decision.step,
                "moved_experts": decision.moved,
                "moved_bytes": None if size is None else decision.moved * size,
                "jump": decision.jumped,
            }
            for decision in result.decisions
        ],
        "steps": result.step_W.tolist(),
        "imbalance": [None if np.isnan(x) else x for x in result.imbalance_W.tolist()],
    }
    if step_ms is not None:
        transfer_s = _transfers(problem, result, size)
        serving_s = len(cost_W) * step_ms / 1e3
        report["transfer_seconds"] = transfer_s
        report["imbalance_charged"] = report["imbalance_mean"] + transfer_s / serving_s
    return report


def _transfers(problem: Problem, result: Replay, size: int | None) -> float:
    """Return the seconds that all transfers take."""
    from eplb.placement.transfer import transfer_seconds

    placements = [result.start, *(decision.placement for decision in result.decisions)]
    return sum(
        transfer_seconds(old, new, problem.topology, size)
        for old, new in itertools.pairwise(placements)
    )


def _show(report: dict[str, Any], num_slots: int) -> None:
    from eplb.cli import show

    grid = show.table(f"{report['policy']}, {len(report['steps'])} steps", "")
    grid.add_row("imbalance, mean", show.ratio(report["imbalance_mean"]))
    if "imbalance_charged" in report:
        grid.add_row("the same, moves charged", show.ratio(report["imbalance_charged"]))
        grid.add_row("seconds of transfer", f"{report['transfer_seconds']:.3g}")
    grid.add_row("imbalance, p95 of steps", show.ratio(report["imbalance_p95"]))
    grid.add_row("experts moved", str(report["moved_experts"]))
    grid.add_row(
        "of the slots, at each decision", show.percent(report["moved_experts"] / num_slots)
    )
    jumps = [str(replan["step"]) for replan in report["replans"] if replan["jump"]]
    if jumps:
        grid.add_row("jumps of the traffic found at step", ", ".join(jumps))
    out = show.console()
    out.print(grid)
    if "plot" in report:
        out.print(f"Drawn: {show.name(report['plot'])}")
