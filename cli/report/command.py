"""``eplb report``: a plan in pictures, on one page that needs nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from eplb.cli.options import (
    as_json,
    phase_option,
    profile_arguments,
    read_parts,
    windows_option,
)
from eplb.errors import InvalidInput

if TYPE_CHECKING:
    from eplb.cli.report.values import Page

__all__ = ["command", "write_page"]


@click.command("report")
@click.argument("plan_path", metavar="PLAN", type=click.Path())
@profile_arguments
@click.option(
    "--previous",
    type=click.Path(),
    metavar="PLAN",
    help="Compare with this plan, and show the moves from it, in place of the initial placement.",
)
@click.option(
    "--replan",
    "curve_path",
    type=click.Path(),
    metavar="JSON",
    help="With --previous: what `eplb replan PREVIOUS PROFILE... --json` printed, for its curve.",
)
@click.option(
    "--replay",
    "replay_paths",
    type=click.Path(),
    multiple=True,
    metavar="JSON",
    help="What `eplb replay --json` printed; several are compared.",
)
@click.option(
    "--routings",
    metavar="FILE",
    help="Token routings, for the nodes and ranks that a token is sent to.",
)
@click.option(
    "--without-quality",
    is_flag=True,
    help="Take a plan without quality figures: written by hand, imported or replanned.",
)
@windows_option
@phase_option
@click.option("-o", "--output", type=click.Path(), required=True, metavar="FILE.html")
@as_json
def command(
    plan_path: str,
    profiles: tuple[str, ...],
    previous: str | None,
    curve_path: str | None,
    replay_paths: tuple[str, ...],
    routings: str | None,
    without_quality: bool,
    windows: Any,
    phase: str | None,
    output: str,
    json_: bool,
) -> None:
    """Write a plan's report: loads before and after, imbalance, replicas, traffic, drift.

    The windows that the plan was fitted to are known by their digest and told apart from others.

    \b
    eplb report plan.yaml loads.npz -o report.html
    eplb report next.yaml today.npz --previous plan.yaml -o report.html
    """
    from eplb.cli.report.inputs import check_model, read_curve, read_json
    from eplb.cli.report.make import plan_page
    from eplb.cli.report.replay_section import replay_log
    from eplb.cli.show import progress
    from eplb.files import check_writable
    from eplb.plan_file import read_plan
    from eplb.profiles import read_routings

    check_writable(output)
    plan = read_plan(plan_path)
    if plan.quality is None and not without_quality:
        raise InvalidInput(
            f"{plan_path} has no quality figures to compare these loads with; plan again, or give "
            "--without-quality to report without them"
        )
    if curve_path is not None and previous is None:
        raise InvalidInput("--replan is a curve from the previous plan; give --previous as well")
    with progress("reading"):
        before = None if previous is None else read_plan(previous)
        parts = read_parts(profiles, windows, phase)
        for part in parts:
            check_model(plan, part, plan_path)
        curve = [] if curve_path is None else read_curve(curve_path)
        replays = [replay_log(read_json(path), path) for path in replay_paths]
        topk_TLK = None if routings is None else read_routings(routings)
    with progress("drawing"):
        page = plan_page(
            plan,
            plan_path,
            parts,
            previous=before,
            curve=curve,
            replays=replays,
            topk_TLK=topk_TLK,
        )
        size = write_page(page, output)
    if json_:
        sections = [section.key for section in page.sections]
        click.echo(json.dumps({"path": output, "bytes": size, "sections": sections}))
        return
    from eplb.cli import show

    show.console().print(f"Report written: {show.name(output)} ({size / 1e6:.1f} MB)")


def write_page(page: Page, path: str) -> int:
    """Write a page, whole or not at all, and return its size in bytes.

    Raises
    ------
    InvalidInput
        The file cannot be written.
    """
    from eplb.cli.report.page import render
    from eplb.files import write_atomic

    # Names that are not Unicode come from the file system as halves of surrogate pairs.
    data = render(page).encode("utf-8", "replace")
    write_atomic(path, data)
    return len(data)
