"""``eplb diff``: what it takes to get from one plan to another."""

from __future__ import annotations

import json
from typing import Any

import click
import numpy as np

from eplb.cli.moves import bandwidth_option, spare_slots_option
from eplb.cli.options import as_json

__all__ = ["command"]


@click.command("diff")
@click.argument("old_path", metavar="OLD", type=click.Path())
@click.argument("new_path", metavar="NEW", type=click.Path())
@spare_slots_option
@click.option(
    "--expert-bytes",
    type=click.IntRange(min=1),
    metavar="BYTES",
    help="Weights of one expert of one layer; needed where the plans' model does not say.",
)
@bandwidth_option
@as_json
def command(
    old_path: str,
    new_path: str,
    spare_slots: int | None,
    expert_bytes: int | None,
    topology: str | None,
    json_: bool,
) -> None:
    """Count the experts that ranks must fetch, and predict rounds, bytes and seconds.

    \b
    eplb diff old.yaml new.yaml --topology h800
    """
    from eplb.placement.migration import find_migration, plan_slots
    from eplb.placement.schedule import schedule_moves
    from eplb.plan_file import read_plan
    from eplb.topology_file import with_bandwidths

    old, new = read_plan(old_path), read_plan(new_path)
    old_LRK, new_LRK, cluster = plan_slots(old, new)
    cluster, source = with_bandwidths(cluster, topology)
    size = expert_bytes or new.model.expert_bytes or old.model.expert_bytes
    migration = find_migration(old_LRK, new_LRK)
    schedule = schedule_moves(
        migration, cluster.ranks_per_node, spare_slots=spare_slots, in_parts=True
    )
    rounds_s = None if size is None else schedule.round_seconds(migration, cluster, size)
    per_node = cluster.ranks_per_node
    inside = int(np.sum(schedule.source_M // per_node == migration.rank_M // per_node))
    counts = {"same_node": inside, "across_nodes": migration.num_moves - inside}

    def figures(moves: int) -> dict[str, int | None]:
        return {"moved_experts": moves, "moved_bytes": None if size is None else moves * size}

    by_layer = np.bincount(migration.layer_M, minlength=len(old_LRK)).tolist()
    received = np.bincount(migration.rank_M, minlength=migration.num_ranks).tolist()
    sent = np.bincount(schedule.source_M, minlength=migration.num_ranks).tolist()
    report: dict[str, Any] = {
        "old": old_path,
        "new": new_path,
        **figures(migration.num_moves),
        "rounds": schedule.num_rounds,
        "min_rounds": schedule.min_rounds,
        "seconds": None if rounds_s is None else sum(rounds_s),
        "round_seconds": rounds_s,
        "round_bytes": None if size is None else (size * np.bincount(schedule.round_M)).tolist(),
        "batches": int(schedule.batch_M.max(initial=-1)) + 1,
        "staging_slots": schedule.staging_slots,
        "expert_bytes": size,
        "bandwidths": {
            "source": source,
            "intra_node_bytes_per_s": cluster.intra_node_bytes_per_s,
            "inter_node_bytes_per_s": cluster.inter_node_bytes_per_s,
        },
        "by_layer": {
            str(i): figures(n) for i, n in zip(old.placement.layer_ids, by_layer, strict=True)
        },
        "by_rank": [{"received": r, "sent": s} for r, s in zip(received, sent, strict=True)],
        "by_link": {name: figures(n) for name, n in counts.items()},
    }
    if json_:
        click.echo(json.dumps(report))
        return
    _show(report, migration.new_LRK.size)


def _show(report: dict[str, Any], num_slots: int) -> None:
    from eplb.cli import show

    out = show.console()
    moves, size = report["moved_experts"], report["moved_bytes"]
    if not moves:
        out.print("No expert moves: every rank has what the new plan asks of it.")
        return
    grid = show.table("", "experts", "GB")
    for name, part in (
        ("all", report),
        ("within nodes", report["by_link"]["same_node"]),
        ("across nodes", report["by_link"]["across_nodes"]),
    ):
        gigabytes = None if size is None else f"{part['moved_bytes'] / 1e9:.2f}"
        grid.add_row(name, str(part["moved_experts"]), gigabytes)
    out.print(grid)
    out.print(
        f"{show.percent(moves / num_slots)} of the slots; {report['rounds']} rounds in which a "
        f"rank sends to one and receives from one; {report['staging_slots']} spare slots a rank."
    )
    if size is None:
        out.print("The plans do not say how large an expert is; give --expert-bytes.")
    elif report["seconds"] is None:
        out.print("The plans do not say how fast links are; give --topology.")
    else:
        out.print(
            f"{report['seconds']:.3f} s at the bandwidths of the {report['bandwidths']['source']}."
        )
