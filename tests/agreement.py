"""Brute force, CP-SAT, HiGHS, branch and bound, components and bounds on tiny random layers.

``python tests/agreement.py --cases 2000 -o FILE`` tries that many under every split rule, and ends
with what did not agree; a sample of it is a test.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from exhaustive import RULES, best_score, placements, score, tiny_layer

from eplb.load_profile import LoadProfile
from eplb.metrics import tail_mean
from eplb.model import MoEModel
from eplb.placement.bound import weighted_bounds
from eplb.placement.component_bound import component_bound
from eplb.placement.components import place_groups, place_in_components
from eplb.placement.exact import solve_layer
from eplb.placement.exact_shares import place_by_shares
from eplb.placement.exact_splits import place_by_cuts, place_by_fractions
from eplb.placement.piece_bound import piece_bound
from eplb.placement.rank_search import place_by_ranks
from eplb.placement.solve import Effort, solve
from eplb.problem import Problem
from eplb.slots import EMPTY
from eplb.topology import Topology

# What is proven is proven to 1e-6; integer programmes round.
SAME = 2e-6
ROUNDING = 1e-9


def disagreements(split, seed):
    """Return what does not agree on one layer, as text; nothing if all is well."""
    load_WE, weight_W, topology = tiny_layer(np.random.default_rng(seed), split)
    best = best_score(load_WE, weight_W, topology, split)
    found, bounds = _answers(load_WE, weight_W, topology, split)
    wrong = [
        f"{split} {seed}: {name} {value} for {best}"
        for name, value in found.items()
        if abs(value - best) > SAME * best
    ]
    bounds["quick"] = weighted_bounds(
        load_WE[:, np.newaxis], weight_W, num_ranks=topology.num_ranks,
        slots_per_rank=topology.slots_per_rank, split=split,
    )[0]  # fmt: skip
    wrong += [
        f"{split} {seed}: bound {name} {value} above {best}"
        for name, value in bounds.items()
        if value > best * (1 + ROUNDING)
    ]
    if split != "weighted":
        wrong += [f"{split} {seed}: {text}" for text in _statistics(load_WE, topology, split)]
    return wrong


def _answers(load_WE, weight_W, topology, split):
    """Return the objectives that solvers prove, and bounds, by name."""
    num_ranks = topology.num_ranks
    flat = Topology(num_nodes=1, ranks_per_node=num_ranks, slots_per_rank=topology.slots_per_rank)
    nodes = topology if split == "nearest" else flat
    row_S = full_row(load_WE.shape[1], topology)
    start = score(load_WE, weight_W, row_S, topology, split)
    arguments = (load_WE, weight_W, nodes, row_S, start, 0.0, None)

    def best_of(rows):
        return min([start] + [score(load_WE, weight_W, row, topology, split) for row in rows])

    layer = solve_layer(load_WE, weight_W, topology=topology, split=split)
    found, bounds = {"solve_layer": layer.objective}, {"solve_layer": layer.bound * (1 - 1e-7)}
    if split in ("even", "nearest"):
        rows, bound = place_by_shares(*arguments, seed=0, workers=1)
        found["CP-SAT"], bounds["CP-SAT"] = best_of(rows), bound * (1 - 1e-7)
        mean = float(weight_W @ load_WE.sum(axis=1)) / num_ranks
        rows, bound = place_by_ranks(load_WE, weight_W, nodes, start, mean, None)
        found["ranks"], bounds["ranks"] = best_of(rows), bound * (1 - ROUNDING)
    else:
        rows, bound = place_by_fractions(
            load_WE, weight_W, flat, 0.0, None, per_window=split == "batch"
        )
        found["HiGHS"], bounds["HiGHS"] = best_of(rows), bound * (1 - 1e-6)
    if split == "batch":
        rows, bound = place_by_cuts(*arguments, seed=0, workers=1)
        found["cuts"], bounds["cuts"] = best_of(rows), bound * (1 - 1e-7)
    if split in ("weighted", "batch"):
        low, rows = _components(weight_W @ load_WE, topology)
        bounds["components"] = low
        if topology.slots_per_rank == 2:
            bounds["pieces"] = piece_bound(weight_W @ load_WE, num_ranks, low * 0.5, low * 4)
        if len(load_WE) == 1:
            found["components"] = best_of(rows)
    return found, bounds


def _components(load_E, topology):
    """Return the bound of components, and the placements that they make."""
    shape = topology.num_ranks, topology.slots_per_rank
    rows = [place_in_components(load_E, *shape)[0]]
    mean = load_E.sum() / topology.num_ranks
    low, group_E = component_bound(load_E, *shape, mean, 2 * load_E.sum())
    if group_E is not None:
        rows.append(place_groups(load_E, group_E, *shape)[0])
    return low, rows


def _statistics(load_WE, topology, split):
    """Return what is wrong with the worst window and the tail: search, its bound, brute force."""
    profile = LoadProfile.from_counts(load_WE[:, np.newaxis] * 1000)
    one = np.ones(1)
    costs = np.array(
        [
            [score(load_E[np.newaxis], one, row, topology, split) for load_E in load_WE]
            for row in placements(load_WE.shape[1], topology, split)
        ]
    )
    wrong = []
    for statistic, of_windows in (("worst", np.max), ("cvar", tail_mean)):
        best = min(float(of_windows(cost_W)) for cost_W in costs)
        problem = Problem(
            profile=profile,
            model=MoEModel(name="tiny", num_experts=load_WE.shape[1], layer_ids=(0,)),
            topology=topology,
            split=split,
            statistic=statistic,
        )
        solution = solve(problem, "search", Effort(sweeps=20))
        if solution.bound > best * (1 + ROUNDING) or solution.objective < best * (1 - ROUNDING):
            wrong.append(f"{statistic} {solution.bound} {best} {solution.objective}")
    return wrong


def full_row(num_experts, topology):
    """Return experts in order of id over and over; a second replica on a rank is left out."""
    row = np.arange(topology.num_slots) % num_experts
    for rank in row.reshape(topology.num_ranks, -1):
        for slot in range(1, len(rank)):
            if rank[slot] in rank[:slot]:
                rank[slot] = EMPTY
    return row


def main():
    """Try many layers and print what does not agree."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="layers of each split rule")
    parser.add_argument("--first", type=int, default=10_000, help="the first seed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of each split rule")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    report = {}
    for split in RULES:
        wrong, tried, start = [], 0, time.perf_counter()
        while tried < arguments.cases and time.perf_counter() - start < arguments.seconds:
            wrong += disagreements(split, arguments.first + tried)
            tried += 1
        report[split] = {"layers": tried, "disagree": wrong}
        sys.stdout.write("\n".join([f"{split}: {tried} layers, {len(wrong)} disagree", *wrong, ""]))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + os.linesep)
    sys.exit(any(row["disagree"] for row in report.values()))


if __name__ == "__main__":
    main()
