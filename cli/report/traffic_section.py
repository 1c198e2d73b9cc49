"""Traffic between nodes: which part of the rows crosses, and how many nodes a token is sent to.

Shape letters: T tokens, L layers, K top-k, N nodes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray
from eplb.cli.report.loads import Comparison, Side
from eplb.cli.report.maps import half_span, legend_around_one, map_height
from eplb.cli.report.options import heat_map
from eplb.cli.report.values import Picture, Section, Table
from eplb.cli.show import percent, ratio
from eplb.receive import receive_tokens
from eplb.slots import Placement
from eplb.traffic import node_traffic, receive_node_tokens

__all__ = ["traffic_section"]

# Sampled tokens that are looked at: their mean is known to a percent or so.
MOST_TOKENS = 4096


def traffic_section(comparison: Comparison, topk_TLK: NDArray[Any] | None = None) -> Section | None:
    """Return the traffic between nodes; None where there is one node on both sides.

    Raises
    ------
    InvalidInput
        The routings do not fit the plan.
    """
    sides = [comparison.before, comparison.after]
    if all(side.plan.topology.num_nodes == 1 for side in sides):
        return None
    lead = (
        "The network between nodes is the slow one. Counts do not say where tokens came from: each "
        "rank is taken to be the source of an equal part of every expert's rows."
    )
    notes = [
        "Rows are token-expert pairs. A token with several experts on a node crosses to it once, "
        + (
            "which the table counts on sampled routings."
            if topk_TLK is not None
            else "which only token routings tell: give --routings."
        )
    ]
    tables = () if topk_TLK is None else (_tokens(comparison, topk_TLK),)
    if any(side.plan.split == "batch" for side in sides):
        return Section(
            key="traffic",
            title="Traffic between nodes",
            lead="Under split batch each window is split anew, which fixes what ranks receive and "
            "not from whom: there is no traffic to show.",
        )
    traffic = [_traffic(comparison, side) for side in sides]
    half = half_span([t * t.shape[0] ** 2 for t in traffic])
    pictures = tuple(
        _map(comparison, side, traffic_NN, half)
        for side, traffic_NN in zip(sides, traffic, strict=True)
    )
    return Section(
        key="traffic",
        title="Traffic between nodes",
        lead=lead,
        pictures=pictures,
        side_by_side=True,
        tables=tables,
        notes=tuple(notes),
    )


def _traffic(comparison: Comparison, side: Side) -> FloatArray:
    profile = comparison.shown_profile
    return node_traffic(
        profile.mean_load_LE(),
        _of_layers(side, profile.layer_ids),
        side.plan.topology,
        side.plan.split,
    )


def _of_layers(side: Side, layer_ids: tuple[int, ...]) -> Placement:

    placement = side.plan.placement
    rows = placement.rows(layer_ids)
    weights_LS = placement.split_weights_LS
    return replace(
        placement,
        phys_to_log_LS=placement.phys_to_log_LS[rows],
        layer_ids=layer_ids,
        split_weights_LS=None if weights_LS is None else weights_LS[rows],
    )


def _map(comparison: Comparison, side: Side, traffic_NN: FloatArray, half: float) -> Picture:
    num_nodes = len(traffic_NN)
    which = "before" if side is comparison.before else "after"
    stays = float(np.trace(traffic_NN))
    nodes = [str(n) for n in range(num_nodes)]
    received_N, sent_N = traffic_NN.sum(axis=0), traffic_NN.sum(axis=1)
    return Picture(
        key=f"traffic-{which}",
        title=f"{which.capitalize()}: {1 - stays:.1%} of the rows change nodes",
        caption=f"{side.name.capitalize()}, split {side.plan.split}; 1 is an even part of all "
        "traffic.",
        label=(
            f"Traffic between {num_nodes} nodes, {side.name}: {stays:.1%} of the rows stay in "
            f"their node; the busiest node receives {received_N.max() * num_nodes:.3f} times the "
            "mean."
        ),
        option=heat_map(
            traffic_NN * num_nodes**2,
            x=("to node", nodes),
            y=("from node", nodes),
            value_name="traffic / even part",
            palette="loads",
            span=(1 - half, 1 + half),
        ),
        height_px=map_height(max(num_nodes, 12)),
        table=Table(
            title="By node",
            head=("node", "receives", "of it from itself", "sends away"),
            rows=tuple(
                (
                    str(n),
                    percent(received_N[n]),
                    percent(traffic_NN[n, n] / received_N[n]) if received_N[n] else "",
                    percent(sent_N[n] - traffic_NN[n, n]),
                )
                for n in range(num_nodes)
            ),
        ),
        legend=legend_around_one(half, "even", "traffic / even part"),
    )


def _tokens(comparison: Comparison, topk_TLK: NDArray[Any]) -> Table:
    """Return what sampled tokens make of both sides."""
    pick = np.linspace(0, len(topk_TLK) - 1, min(len(topk_TLK), MOST_TOKENS)).astype(int)
    topk_TLK = topk_TLK[pick]
    columns = []
    for side in (comparison.before, comparison.after):
        of = side.plan
        ranks_LR = receive_tokens(topk_TLK, of.placement, of.topology, of.split)
        nodes_LN = receive_node_tokens(topk_TLK, of.placement, of.topology, of.split)
        columns.append(
            (
                f"{nodes_LN.sum(axis=1).mean() / len(topk_TLK):.3f}",
                f"{ranks_LR.sum(axis=1).mean() / len(topk_TLK):.3f}",
                ratio(float((nodes_LN.max(axis=1) / nodes_LN.mean(axis=1)).mean())),
                ratio(float((ranks_LR.max(axis=1) / ranks_LR.mean(axis=1)).mean())),
            )
        )
    names = (
        "nodes a token is sent to",
        "ranks a token is sent to",
        "imbalance of tokens over nodes",
        "imbalance of tokens over ranks",
    )
    return Table(
        title=f"Tokens, of {len(topk_TLK):,} sampled",
        head=("", comparison.before.name, comparison.after.name),
        rows=tuple(zip(names, *columns, strict=True)),
    )
