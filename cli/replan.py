"""``eplb replan``: the few moves worth making from the plan in force, or none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import click

from eplb.cli.options import as_json, phase_option, profile_arguments, read_windows, windows_option
from eplb.errors import InvalidInput

__all__ = ["command"]


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
@click.option("-o", "--output", type=click.Path(), metavar="PLAN", help="Where the new plan goes.")
@windows_option
@phase_option
@as_json
def command(
    plan_path: str,
    profiles: tuple[str, ...],
    max_moves: str,
    max_moves_per_layer: int | None,
    output: str | None,
    windows: Any,
    phase: str | None,
    json_: bool,
) -> None:
    """Improve a plan for new loads within a limit on moves.

    \b
    eplb replan plan.yaml today.npz --max-moves 2% -o next.yaml
    """
    from eplb.cli import show
    from eplb.files import check_writable
    from eplb.metrics import evaluate
    from eplb.placement.replan import replan
    from eplb.plan_file import read_plan, write_plan

    if output is not None:
        check_writable(output)
    plan = read_plan(plan_path)
    if plan.split != "even":
        raise InvalidInput(
            f"replan moves experts for the split rule even, and the plan is for {plan.split}; use "
            "eplb plan --previous"
        )
    profile = read_windows(profiles, windows, phase)
    before = evaluate(profile, plan.placement, plan.topology, plan.split)
    rows = plan.placement.rows(profile.layer_ids)
    old_LS = plan.placement.phys_to_log_LS
    limit = _limit(max_moves, len(rows) * plan.topology.num_slots)
    with show.progress("searching"):
        found = replan(
            profile,
            old_LS[rows],
            plan.topology,
            max_moves=limit,
            max_moves_per_layer=max_moves_per_layer,
        )
    new_LS = old_LS.copy()
    new_LS[rows] = found.phys_to_log_LS
    placement = replace(plan.placement, phys_to_log_LS=new_LS)
    after = evaluate(profile, placement, plan.topology, plan.split)
    keep = found.num_moves == 0
    size = plan.model.expert_bytes
    report = {
        "decision": "keep" if keep else "move",
        "reason": "no move within the limit lowers the imbalance" if keep else None,
        "max_moves": limit,
        "moved_experts": found.num_moves,
        "moved_bytes": None if size is None else found.num_moves * size,
        "imbalance_before": before.imbalance_mean,
        "imbalance_after": after.imbalance_mean,
        "curve": [{"moves": moves, "imbalance": value} for moves, value in found.curve],
        "path": output,
    }
    if output is not None:
        provenance = {"solver": "replan", "profile_sha256": profile.sha256()}
        write_plan(replace(plan, placement=placement, quality=None, provenance=provenance), output)
    if json_:
        click.echo(json.dumps(report))
        return
    out = show.console()
    if keep:
        out.print(f"Keep the plan, because {report['reason']}.")
        return
    out.print(
        f"{show.plural(found.num_moves, 'expert')} moved: imbalance "
        f"{show.ratio(before.imbalance_mean)} before, {show.ratio(after.imbalance_mean)} after."
    )


def _limit(text: str, num_slots: int) -> int:
    """Return the moves that N or P% stand for."""
    number, part = (text[:-1], True) if text.endswith("%") else (text, False)
    try:
        value = float(number) if part else int(number)
    except ValueError:
        value = -1
    if not 0 <= value <= (100 if part else num_slots):
        raise InvalidInput(
            f"--max-moves {text} must be a whole number up to {num_slots}, or a percentage such "
            "as 4%"
        )
    return int(value * num_slots / 100) if part else int(value)
