"""``eplb export``: a plan as the file of a serving engine."""

from __future__ import annotations

import json

import click

from eplb.cli.engine_options import ENGINE_NAMES, moe_layers_option, print_remarks
from eplb.cli.options import Name, as_json

__all__ = ["command"]


@click.command("export")
@click.argument("plan_path", metavar="PLAN", type=click.Path())
@click.option("--to", "engine", type=Name("engine", ENGINE_NAMES), required=True,
              help="Engine: " + ", ".join(ENGINE_NAMES) + ".", metavar="ENGINE")  # fmt: skip
@moe_layers_option
@click.option("-o", "--output", type=click.Path(), required=True, metavar="FILE")
@as_json
def command(
    plan_path: str, engine: str, moe_layers: tuple[int, ...] | None, output: str, json_: bool
) -> None:
    """Write a plan as the file of a serving engine, and print how to start the engine with it.

    What the engine does otherwise than the plan says is printed; what it would misunderstand is
    refused.

    \b
    eplb export plan.yaml --to sglang -o experts.pt
    """
    from eplb.engines.convert import ENGINES, export_plan
    from eplb.plan_file import read_plan

    plan = read_plan(plan_path)
    export = export_plan(plan, engine, output, plan_path=plan_path, moe_layers=moe_layers)
    release = ENGINES[engine].release
    if json_:
        report = {
            "path": output,
            "engine": engine,
            "release": release,
            "digest": plan.digest(),
            "remarks": export.remarks,
            "launch": export.launch,
        }
        click.echo(json.dumps(report))
        return
    click.echo(f"Written for {engine} ({release}), and read back: {output}")
    print_remarks(export.remarks)
    click.echo("\nStart the engine with:")
    for line in export.launch:
        click.echo(f"  {line}")
