"""Integer programme for rules that fix a replica's share by how its expert lies: even, nearest.

With replicas on distinct ranks, h of an expert's a replicas on a node of M ranks and m nodes with
any, the share of each of these h is (1/R) (M/h + (R - M m)/a) (:mod:`eplb.split`); one node of all
ranks makes it the even 1/a. So an expert has one variable for each rank and *class* (h, m, a), and
rank loads are linear in them: no product is left to linearise.
Shape letters: W windows, E logical experts, S slots, R ranks, M ranks of a node, V variables.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.placement.exact_model import LayerModel
from eplb.topology import Topology

__all__ = ["expert_classes", "num_variables", "place_by_shares"]


def place_by_shares(
    load_WE: FloatArray,
    weight_W: FloatArray,
    topology: Topology,
    start_S: IntArray,
    start: float,
    low: float,
    time_limit_s: float | None,
    *,
    seed: int,
    workers: int,
) -> tuple[list[IntArray], float]:
    """Return the placements found (none, or one) and a bound on the objective.

    Parameters
    ----------
    load_WE, weight_W : arrays of float64
    topology : Topology
        One node for ``even``.
    start_S, start : array of int64 and float
        A placement to start from, and its objective: nothing above it is looked for.
    low : float
        A bound known before.
    time_limit_s, seed, workers
        As for :func:`eplb.placement.exact.solve_layer`.
    """
    end_s = None if time_limit_s is None else time.perf_counter() + time_limit_s
    layer = LayerModel(load_WE, weight_W, topology, start_S, start, low)
    num_ranks, per_node = topology.num_ranks, topology.ranks_per_node
    mean_W = load_WE.sum(axis=1) / num_ranks
    for expert in range(load_WE.shape[1]):
        shares = {}
        for h, m, a in expert_classes(topology, load_WE.shape[1]):
            share = (per_node / h + (num_ranks - per_node * m) / a) / num_ranks
            # A rank with such a replica has at least its load, and some rank at least the mean.
            if weight_W @ np.maximum(load_WE[:, expert] * share, mean_W) <= start * (1 + 1e-9):
                shares[h, m, a] = share
        _add_expert(layer, expert, shares)
        if end_s is not None and time.perf_counter() > end_s:
            # Building takes time as well.
            return [], low
    left_s = None if end_s is None else max(0.01, end_s - time.perf_counter())
    return layer.solve(left_s, seed=seed, workers=workers)


def num_variables(topology: Topology, num_experts: int) -> int:
    """Return how many variables put experts on ranks, before any is ruled out."""
    return sum(1 for _ in expert_classes(topology, num_experts)) * num_experts * topology.num_ranks


def expert_classes(topology: Topology, num_experts: int) -> Iterator[tuple[int, int, int]]:
    """Yield all (replicas on the node, nodes with replicas, replicas)."""
    num_nodes, per_node = topology.num_nodes, topology.ranks_per_node
    # Every other expert needs a slot.
    most = min(topology.num_ranks, topology.num_slots - num_experts + 1)
    for m in range(1, min(num_nodes, most) + 1):
        for a in range(m, min(m * per_node, most) + 1):
            least_here = max(1, a - (m - 1) * per_node)
            most_here = a if m == 1 else min(per_node, a - (m - 1))
            for h in range(least_here, most_here + 1):
                yield h, m, a


def _add_expert(layer: LayerModel, expert: int, shares: dict[tuple[int, int, int], float]) -> None:
    """Add the variables of one expert, of the classes that have a share."""
    model, per_node = layer.model, layer.topology.ranks_per_node
    nodes = range(layer.topology.num_nodes)
    held_NM = layer.start_ER[expert].reshape(len(nodes), per_node)
    start = (int(np.count_nonzero(held_NM.any(axis=1))), int(held_NM.sum()))
    spreads = sorted({(m, a) for _, m, a in shares})
    chosen = {spread: layer.new_bool(spread == start) for spread in spreads}
    model.add_exactly_one(chosen.values())
    on_RV: list[list[Any]] = [[] for _ in range(layer.topology.num_ranks)]
    for m, a in spreads:
        heights = [h for h, other_m, other_a in shares if (other_m, other_a) == (m, a)]
        used, replicas = [], []
        for node in nodes:
            of_node = []
            for h in heights:
                starts = (m, a) == start and int(held_NM[node].sum()) == h
                # With one node the choice of the spread is the choice of the class.
                here = chosen[m, a] if len(nodes) == 1 else layer.new_bool(starts)
                of_node.append(here)
                replicas.append(h * here)
                on_M = [layer.new_bool(starts and bool(held)) for held in held_NM[node]]
                model.add(sum(on_M) == h * here)
                for rank, on in enumerate(on_M, start=node * per_node):
                    model.add_implication(on, here)
                    on_RV[rank].append(on)
                    layer.add_load(rank, expert, shares[h, m, a], on)
            used.extend(of_node)
            if len(nodes) > 1:
                model.add(sum(of_node) <= chosen[m, a])
        if len(nodes) > 1:
            model.add(sum(used) == m * chosen[m, a])
            model.add(sum(replicas) == a * chosen[m, a])
    layer.hold(expert, on_RV)
