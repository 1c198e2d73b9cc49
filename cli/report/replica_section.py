"""Which experts have replicas, and where those lie.

Shape letters: L layers, E logical experts, S slots, B columns of a picture.
"""

from __future__ import annotations

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.cli.report.loads import Comparison, buckets_of
from eplb.cli.report.maps import MOST_COLUMNS, map_height, range_label, sharing
from eplb.cli.report.options import heat_map
from eplb.cli.report.values import Legend, Picture, Section, Table
from eplb.cli.show import percent, plural
from eplb.slots import replica_count

__all__ = ["replicas_section"]

NUM_HOTTEST = 3
# More ranks than this are counted, not listed.
MOST_LISTED = 12


def replicas_section(comparison: Comparison) -> Section:
    """Return the replica map, and the most replicated experts of each layer with their ranks."""
    plan, ids = comparison.plan, comparison.profile.layer_ids
    topology = plan.topology
    slots_LS = plan.placement.of_layers(ids)
    count_LE = replica_count(slots_LS, plan.model.num_experts)
    shown_LB, ranges = buckets_of(count_LE.astype(float), MOST_COLUMNS)
    most = int(count_LE.max())
    nodes_LE = _nodes_of_experts(slots_LS, plan.model.num_experts, topology.num_nodes)
    load_LE = comparison.shown_profile.mean_load_LE()
    part_LE = np.zeros(count_LE.shape)
    part_LE[[ids.index(i) for i in comparison.shown_profile.layer_ids]] = load_LE / load_LE.sum(
        axis=1, keepdims=True
    )
    replicated = count_LE > 1
    spread = float(nodes_LE[replicated].mean()) if replicated.any() else 1.0
    picture = Picture(
        key="replicas",
        title=f"{plural(int(replicated.sum()), 'expert')} with more than one slot, "
        f"up to {most} replicas",
        caption=(
            "Slots of each logical expert. Replicated experts lie on "
            f"{spread:.2f} of {plural(topology.num_nodes, 'node')}, on average."
            + sharing("experts", count_LE.shape[1], len(ranges))
        ),
        label=(
            f"Heat map of replica counts, {len(ids)} layers by {count_LE.shape[1]} experts: 1 to "
            f"{most} slots."
        ),
        option=heat_map(
            shown_LB,
            x=("expert", [range_label(r) for r in ranges]),
            y=("layer", [str(i) for i in ids]),
            value_name="slots",
            palette="count",
            span=(1.0, float(max(most, 2))),
            digits=0,
        ),
        height_px=map_height(len(ids)),
        table=Table(
            title="Most replicated experts",
            head=("layer", "expert", "part of the load", "replicas", "on ranks"),
            rows=_most_replicated(ids, slots_LS, count_LE, part_LE, topology.slots_per_rank),
        ),
        legend=Legend(palette="count", marks=("1", str(max(most, 2))), name="slots of an expert"),
    )
    return Section(
        key="replicas",
        title="Replicas",
        lead="Hot experts get several slots, so that no rank has to carry one alone.",
        pictures=(picture,),
    )


def _nodes_of_experts(slots_LS: IntArray, num_experts: int, num_nodes: int) -> IntArray:
    """Return on how many nodes each expert lies, shape [L, E]."""
    num_layers, num_slots = slots_LS.shape
    on_node = np.zeros((num_layers, num_experts, num_nodes), bool)
    layer, slot = np.nonzero(slots_LS >= 0)
    on_node[layer, slots_LS[layer, slot], slot * num_nodes // num_slots] = True
    nodes_LE: IntArray = on_node.sum(axis=2)
    return nodes_LE


def _most_replicated(
    ids: tuple[int, ...],
    slots_LS: IntArray,
    count_LE: IntArray,
    part_LE: FloatArray,
    slots_per_rank: int,
) -> tuple[tuple[str, ...], ...]:
    rows = []
    for layer, layer_id in enumerate(ids):
        for expert in np.argsort(-count_LE[layer], kind="stable")[:NUM_HOTTEST]:
            ranks = np.flatnonzero(slots_LS[layer] == expert) // slots_per_rank
            named = ", ".join(map(str, ranks[:MOST_LISTED]))
            more = len(ranks) - MOST_LISTED
            rows.append(
                (
                    str(layer_id),
                    str(expert),
                    percent(part_LE[layer, expert]),
                    str(count_LE[layer, expert]),
                    named + (f" and {more} more" if more > 0 else ""),
                )
            )
    return tuple(rows)
