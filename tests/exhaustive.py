"""Every placement of a tiny layer, scored under every rule by code of its own."""

from itertools import combinations, product

import numpy as np
from hypothesis import strategies as st
from oracles import rank_loads
from scipy.optimize import linprog
from strategies import loads

from eplb.topology import Topology

RULES = ("even", "nearest", "weighted", "batch")


def tiny_layer(random, split):
    """Draw (load_WE, weight_W, topology), each window with a mean rank load of 1."""
    num_nodes, per_node = [(1, 2), (1, 3), (2, 2), (2, 1), (3, 1)][random.integers(5)]
    num_ranks = num_nodes * per_node
    # Brute force over four ranks that are not alike takes a second for more than this.
    most = 3 if split == "nearest" and num_ranks == 4 else 4
    num_experts = int(random.integers(1, most + 1))
    least = -(-num_experts // num_ranks)
    slots_per_rank = int(random.integers(least, max(least, min(3, num_experts)) + 1))
    num_windows = int(random.integers(1, 4))
    if random.random() < 0.6:
        load_WE = random.pareto(1.2, (num_windows, num_experts)) + 0.01
    else:
        load_WE = random.integers(0, 20, (num_windows, num_experts)).astype(float)
        load_WE[:, random.integers(num_experts)] += 1
    weight_W = np.full(num_windows, 1 / num_windows)
    if random.random() < 0.5:
        weight_W = random.dirichlet(np.ones(num_windows)) + 1e-3
        weight_W /= weight_W.sum()
    topology = Topology(num_nodes=num_nodes, ranks_per_node=per_node, slots_per_rank=slots_per_rank)
    return load_WE * (num_ranks / load_WE.sum(axis=1, keepdims=True)), weight_W, topology


def score(load_WE, weight_W, row, topology, split):
    """Weighted mean over windows of the largest rank load of one placement."""
    num_ranks = topology.num_ranks
    if split in ("even", "nearest"):
        unit_ER = np.array(
            [
                [float(load) for load in rank_loads(unit, row, topology, split)]
                for unit in np.eye(load_WE.shape[1], dtype=int).tolist()
            ]
        )
        return float(weight_W @ (load_WE @ unit_ER).max(axis=1))
    windows = range(len(load_WE))
    if split == "batch":
        return sum(
            weight_W[w] * _split_programme(load_WE[[w]], np.ones(1), row, num_ranks)
            for w in windows
        )
    return _split_programme(load_WE, weight_W, row, num_ranks)


def _split_programme(load_WE, weight_W, row, num_ranks):
    """Best fixed fractions, by a dense linear programme."""
    num_windows, num_experts = load_WE.shape
    slots = [s for s, expert in enumerate(row) if expert >= 0]
    upper = np.zeros((num_windows * num_ranks, len(slots) + num_windows))
    equal = np.zeros((num_experts, len(slots) + num_windows))
    for w in range(num_windows):
        upper[w * num_ranks : (w + 1) * num_ranks, len(slots) + w] = -1
        for column, slot in enumerate(slots):
            rank = slot * num_ranks // len(row)
            upper[w * num_ranks + rank, column] = load_WE[w, row[slot]]
            equal[row[slot], column] = 1
    cost = np.concatenate([np.zeros(len(slots)), weight_W])
    zero, one = np.zeros(len(upper)), np.ones(num_experts)
    return linprog(cost, upper, zero, equal, one, bounds=(0, None), method="highs").fun


def placements(num_experts, topology, split):
    """Yield all placements with replicas on distinct ranks; slots may stay empty."""
    per_rank = topology.slots_per_rank
    # A further replica never hurts where the split is free.
    sizes = range(per_rank + 1) if split in ("even", "nearest") else [min(per_rank, num_experts)]
    held = [c for size in sizes for c in combinations(range(num_experts), size)]
    for choice in product(range(len(held)), repeat=topology.num_ranks):
        if split != "nearest" and list(choice) != sorted(choice):
            continue
        if len(set().union(*(held[i] for i in choice))) < num_experts:
            continue
        yield [e for i in choice for e in (*held[i], *[-1] * (per_rank - len(held[i])))]


def best_score(load_WE, weight_W, topology, split):
    """Least score of all placements."""
    return min(
        score(load_WE, weight_W, row, topology, split)
        for row in placements(load_WE.shape[1], topology, split)
    )


@st.composite
def single_loads(draw, max_experts, num_slots):
    """One window of a layer, scaled to a sum of 1."""
    load_E = draw(loads(draw(st.integers(1, min(max_experts, num_slots)))))
    return load_E / load_E.sum()
