"""``eplb demo``: the main job on the built-in sample."""

from __future__ import annotations

import json

import click

from eplb.cli.options import as_json

__all__ = ["command"]

# DeepSeek's prefill unit: EP32 on 4 nodes, 9 routed experts a rank, 32 of 288 redundant.
NODES, RANKS_PER_NODE, SLOTS_PER_RANK = 4, 8, 9
FIT_PART = 2 / 3


@click.command("demo")
@click.option(
    "-o", "--output", type=click.Path(), default="demo-plan.yaml", show_default=True, metavar="PLAN"
)
@as_json
def command(output: str, json_: bool) -> None:
    """Plan the built-in sample on DeepSeek's prefill unit, and score it on unseen windows.

    The sample is the routing of a small mixture-of-experts model under a drifting mix of text. The
    plan is fitted to its first two thirds and scored on the last third.
    """
    from dataclasses import replace

    from eplb.cli.plan import make_plan, plan_report, show_plan
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
        plan = make_plan(problem, solution, output)
        start = initial_placement(sample.layer_ids, sample.num_experts, topology.num_slots)
        before = evaluate(unseen, start, topology, problem.split)
        after = evaluate(unseen, plan.placement, topology, problem.split)
        routings = sample_routings()
        tokens_before_LR, tokens_after_LR = (
            receive_tokens(routings, placement, topology, problem.split)
            for placement in (start, plan.placement)
        )
    if json_:
        report = {
            **plan_report(plan, solution, output),
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
    grid = show.table(
        f"on the {unseen.num_windows} windows it was not fitted to", "before", "after"
    )
    grid.add_row(
        "imbalance, mean", show.ratio(before.imbalance_mean), show.ratio(after.imbalance_mean)
    )
    grid.add_row(
        "imbalance, p95 of windows",
        show.ratio(before.imbalance_p95),
        show.ratio(after.imbalance_p95),
    )
    grid.add_row(
        "max dispatch receive, rows",
        show.rows(before.max_receive_rows_mean),
        show.rows(after.max_receive_rows_mean),
    )
    grid.add_row(
        f"max dispatch receive, tokens (of {show.rows(len(routings))} sampled)",
        show.rows(tokens_before_LR.max(axis=1).mean()),
        show.rows(tokens_after_LR.max(axis=1).mean()),
    )
    # Neighbours in id are of one group, which a token chooses several experts of: spread for
    # balance, they are on more ranks.
    grid.add_row(
        "ranks a token is sent to",
        *(
            f"{t.sum(axis=1).mean() / len(routings):.2f}"
            for t in (tokens_before_LR, tokens_after_LR)
        ),
    )
    out.print(grid)
    out.print()
    out.print("Next: [bold]eplb profile show[/] and [bold]eplb plan[/] on a recording of your own.")
