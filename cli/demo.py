"""``eplb demo``: the main job on the built-in sample."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from eplb.cli.options import as_json

if TYPE_CHECKING:
    from rich.table import Table

    from eplb.arrays import FloatArray
    from eplb.metrics import Balance

__all__ = ["command"]

# DeepSeek's prefill unit: EP32 on 4 nodes, 9 routed experts a rank, 32 of 288 redundant.
NODES, RANKS_PER_NODE, SLOTS_PER_RANK = 4, 8, 9
FIT_PART = 2 / 3


@click.command("demo")
@click.option(
    "-o", "--output", type=click.Path(), default="demo-plan.yaml", show_default=True, metavar="PLAN"
)
@click.option(
    "--report",
    "report_path",
    type=click.Path(),
    default="demo-report.html",
    show_default=True,
    metavar="FILE.html",
    help="Where the plan's report goes.",
)
@as_json
def command(output: str, report_path: str, json_: bool) -> None:
    """Plan the built-in sample on DeepSeek's prefill unit, and score it on unseen windows.

    The sample is the routing of a small mixture-of-experts model under a drifting mix of text. The
    plan is fitted to its first two thirds and scored on the last third.
    """
    from dataclasses import replace

    from eplb.cli.plan import make_plan, plan_report, show_plan, show_report
    from eplb.cli.report.command import write_page
    from eplb.cli.report.make import plan_page
    from eplb.cli.show import progress
    from eplb.files import check_writable
    from eplb.metrics import evaluate
    from eplb.model import MoEModel
    from eplb.placement.solve import solve
    from eplb.problem import Problem
    from eplb.profiles import sample_profile, sample_routings
    from eplb.receive import receive_tokens
    from eplb.slots import initial_placement
    from eplb.topology import topology_preset

    check_writable(output)
    check_writable(report_path)
    with progress("planning the sample"):
        sample = sample_profile()
        num_fitted = round(FIT_PART * sample.num_windows)
        fitted, unseen = sample.windows(0, num_fitted), sample.windows(num_fitted, None)
        topology = topology_preset(
            "h800", num_nodes=NODES, ranks_per_node=RANKS_PER_NODE, slots_per_rank=SLOTS_PER_RANK
        )
        model = MoEModel(
            name=str(sample.metadata["model"]),
            num_experts=sample.num_experts,
            layer_ids=sample.layer_ids,
            num_groups=sample.metadata["num_groups"],
            top_k=sample.metadata["top_k"],
        )
        source = f"sample.npz, windows 0:{num_fitted}"
        problem = Problem(profile=replace(fitted, source=source), model=model, topology=topology)
        solution = solve(problem)
        plan = make_plan(problem, solution, output, [unseen.num_windows])
        start = initial_placement(sample.layer_ids, sample.num_experts, topology.num_slots)
        before = evaluate(unseen, start, topology, problem.split)
        after = evaluate(unseen, plan.placement, topology, problem.split)
        routings = sample_routings()
        tokens_before_LR, tokens_after_LR = (
            receive_tokens(routings, placement, topology, problem.split)
            for placement in (start, plan.placement)
        )
        page = plan_page(plan, output, [replace(sample, source="sample.npz")], topk_TLK=routings)
        write_page(page, report_path)
    if json_:
        report = {
            **plan_report(plan, solution, output),
            "report": report_path,
            "unseen": {"before": before.to_dict(), "after": after.to_dict()},
            "max_receive_tokens_mean": {
                "before": float(tokens_before_LR.max(axis=1).mean()),
                "after": float(tokens_after_LR.max(axis=1).mean()),
            },
        }
        click.echo(json.dumps(report))
        return

    from eplb.cli import show

    show_plan(problem, solution, plan, output)
    out = show.console()
    out.print()
    out.print(
        _unseen_table(
            unseen.num_windows,
            (before, after),
            (tokens_before_LR, tokens_after_LR),
            len(routings),
        )
    )
    out.print()
    show_report(report_path)
    out.print("Next: [bold]eplb profile show[/] and [bold]eplb plan[/] on a recording of your own.")


def _unseen_table(
    num_windows: int,
    balances: tuple[Balance, Balance],
    tokens_LR: tuple[FloatArray, FloatArray],
    num_tokens: int,
) -> Table:
    """Return the figures before and after, of loads and of sampled tokens."""
    from eplb.cli import show

    grid = show.table(f"on the {num_windows} windows it was not fitted to", "before", "after")
    for name, figure, number in (
        ("imbalance, mean", "imbalance_mean", show.ratio),
        ("imbalance, p95 of windows", "imbalance_p95", show.ratio),
        ("max dispatch receive, rows", "max_receive_rows_mean", show.rows),
    ):
        grid.add_row(name, *(number(getattr(balance, figure)) for balance in balances))
    grid.add_row(
        f"max dispatch receive, tokens (of {show.rows(num_tokens)} sampled)",
        *(show.rows(received_LR.max(axis=1).mean()) for received_LR in tokens_LR),
    )
    # Neighbours in id are of one group, which a token chooses several experts of: spread for
    # balance, they are on more ranks.
    grid.add_row(
        "ranks a token is sent to",
        *(f"{received_LR.sum(axis=1).mean() / num_tokens:.2f}" for received_LR in tokens_LR),
    )
    return grid
