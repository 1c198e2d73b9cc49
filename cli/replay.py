"""``eplb replay``: what a policy of replanning would have made of a recorded stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from eplb.cli.options import (
    Fraction,
    Name,
    Seconds,
    as_json,
    phase_option,
    read_windows,
    windows_option,
)
from eplb.model import MODEL_PRESETS
from eplb.placement.replay import POLICIES, ReplayOptions, replay
from eplb.split import SPLIT_RULES
from eplb.topology import TOPOLOGY_PRESETS

__all__ = ["command"]


@click.command("replay")
@click.argument("profile_path", metavar="PROFILE")
@click.option("--every", type=click.IntRange(min=1), required=True, help="Steps between decisions.")
@click.option("--warmup", type=click.IntRange(min=1), help="Steps before the first; as --every.")
@click.option("--policy", type=Name("policy", POLICIES), default="follow", show_default=True)
@click.option(
    "--fit-steps",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="The last steps that a decision is fitted to.",
)
@click.option(
    "--max-share",
    type=Fraction(),
    default=0.04,
    show_default=True,
    metavar="PART",
    help="Of follow: the part of all slots that a decision may fill anew.",
)
@click.option("--plans", type=click.Path(), metavar="DIR", help="Write the plan of each decision.")
@click.option("--nodes", type=click.IntRange(min=1), required=True)
@click.option("--ranks-per-node", type=click.IntRange(min=1))
@click.option("--slots-per-rank", type=click.IntRange(min=1), required=True)
@click.option("--topology", type=Name("topology preset", TOPOLOGY_PRESETS))
@click.option("--model", type=Name("model preset", MODEL_PRESETS))
@click.option("--split", type=Name("split rule", SPLIT_RULES), default="even", show_default=True)
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
    fit_steps: int,
    max_share: float,
    plans: str | None,
    html_path: str | None,
    windows: Any,
    phase: str | None,
    json_: bool,
    **options: Any,
) -> None:
    """Live through a recorded stream: fit on the past, move, score the steps that follow.

    \b
    eplb replay stream.npz --every 20 --warmup 120 --nodes 4 --ranks-per-node 8 \\
        --slots-per-rank 9
    """
    from eplb.cli import show
    from eplb.cli.plan import model_of, topology_of
    from eplb.files import check_writable
    from eplb.placement.solve import Effort
    from eplb.plan import Plan
    from eplb.plan_file import write_plan
    from eplb.problem import Problem

    if html_path is not None:
        check_writable(html_path)
    topology = topology_of(options)
    profile = read_windows((profile_path,), windows, phase)
    model = model_of(profile, {**options, "groups": None, "hierarchical": False})
    problem = Problem(profile=profile, model=model, topology=topology, split=options["split"])
    with show.progress(f"replaying {profile.num_windows} steps"):
        result = replay(
            problem,
            ReplayOptions(
                every=every,
                warmup=warmup or every,
                policy=policy,
                fit_steps=fit_steps,
                max_share=max_share,
                effort=Effort(seed=options["seed"], time_limit_s=options["time_limit"]),
            ),
        )
    if plans is not None:
        Path(plans).mkdir(parents=True, exist_ok=True)
        for step, placement in zip(result.steps, result.placements, strict=True):
            plan = Plan(model=model, topology=topology, placement=placement, split=problem.split)
            write_plan(plan, Path(plans) / f"step-{step:06d}.yaml")
    moved, size = sum(result.moved), model.expert_bytes
    report = {
        "policy": policy,
        "imbalance_mean": float(result.imbalance_W.mean()),
        "imbalance_p95": float(np.percentile(result.imbalance_W, 95)),
        "moved_experts": moved,
        "moved_bytes": None if size is None else moved * size,
        "replans": [
            {"step": step, "moved_experts": moves}
            for step, moves in zip(result.steps, result.moved, strict=True)
        ],
        "imbalance": result.imbalance_W.tolist(),
    }
    if html_path is not None:
        from eplb.cli.report.command import write_page
        from eplb.cli.report.make import replay_page
        from eplb.cli.report.replay_section import replay_log

        write_page(replay_page([replay_log(report, "replay")], profile), html_path)
    if json_:
        click.echo(json.dumps(report))
        return
    grid = show.table(f"{policy}, {len(result.imbalance_W)} steps", "")
    grid.add_row("imbalance, mean", show.ratio(report["imbalance_mean"]))
    grid.add_row("imbalance, p95 of steps", show.ratio(report["imbalance_p95"]))
    grid.add_row("experts moved", str(moved))
    slots = len(result.steps) * topology.num_slots * profile.num_layers
    grid.add_row("of the slots, at each decision", show.percent(moved / slots))
    show.console().print(grid)
