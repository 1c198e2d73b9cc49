"""``eplb import``: the placement of a serving engine as a plan."""

from __future__ import annotations

import json

import click

from eplb.cli.engine_options import ENGINE_NAMES, moe_layers_option, print_remarks
from eplb.cli.options import Name, as_json
from eplb.model import MODEL_PRESETS
from eplb.split import SPLIT_RULES

__all__ = ["command"]


@click.command("import")
@click.argument("path", metavar="FILE", type=click.Path())
@click.option("--from", "engine", type=Name("engine", ENGINE_NAMES), required=True,
              help="Engine: " + ", ".join(ENGINE_NAMES) + ".", metavar="ENGINE")  # fmt: skip
@click.option("--nodes", type=click.IntRange(min=1), required=True, help="Nodes of the cluster.")
@click.option(
    "--ranks-per-node", type=click.IntRange(min=1), required=True, help="Ranks (GPUs) of a node."
)
@click.option(
    "--model",
    type=Name("model preset", MODEL_PRESETS),
    help="Model, for names, sizes and decoder ids in the plan: " + ", ".join(MODEL_PRESETS) + ".",
)
@moe_layers_option
@click.option(
    "--split",
    type=Name("split rule", SPLIT_RULES),
    default="even",
    show_default=True,
    help="How tokens of an expert divide over its replicas in that engine.",
)
@click.option("-o", "--output", type=click.Path(), required=True, metavar="PLAN")
@as_json
def command(
    path: str,
    engine: str,
    nodes: int,
    ranks_per_node: int,
    model: str | None,
    moe_layers: tuple[int, ...] | None,
    split: str,
    output: str,
    json_: bool,
) -> None:
    """Read the placement that a serving engine uses as a plan.

    \b
    eplb import experts.pt --from sglang --nodes 4 --ranks-per-node 8 -o plan.yaml
    """
    from eplb.engines.convert import import_plan
    from eplb.files import check_writable
    from eplb.model import model_preset
    from eplb.plan_file import write_plan

    check_writable(output)
    found = import_plan(
        path,
        engine,
        num_nodes=nodes,
        ranks_per_node=ranks_per_node,
        model=None if model is None else model_preset(model),
        moe_layers=moe_layers,
        split=split,
    )
    write_plan(found.plan, output)
    plan = found.plan
    if json_:
        report = {"path": output, "digest": plan.digest(), "remarks": found.remarks}
        click.echo(json.dumps(report))
        return
    ids = plan.placement.layer_ids
    click.echo(
        f"{plan.topology.label}, {len(ids)} layers ({ids[0]}-{ids[-1]}), {plan.model.num_experts} "
        f"experts; written: {output}"
    )
    print_remarks(found.remarks)
