"""Prove optima and write JSON: ``python benchmarks/exact.py RECORDING [-o FILE]``.

Small layers of random experts of the recording under every split rule, and with ``--pairs-array``
two slots a rank (EP144x2, every layer of that array). Parts that were not run stay in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from run import environment

import eplb
from eplb.arrays import FloatArray
from eplb.load_profile import LoadProfile
from eplb.model import MoEModel
from eplb.placement.solve import Effort, solve
from eplb.problem import Problem, Solution
from eplb.split import SPLIT_RULES
from eplb.topology import Topology

# (experts, nodes, ranks of a node, slots of a rank)
SMALL = (
    (6, 2, 1, 4),
    (8, 2, 2, 3),
    (8, 2, 4, 2),
    (12, 2, 2, 4),
    (12, 2, 4, 2),
    (16, 2, 2, 5),
    (16, 2, 4, 2),
    (16, 2, 4, 3),
    (16, 2, 4, 4),
)
# Of the search at EP144x2.
SEARCH_S = 10.0


def two_slots(profile: LoadProfile, exact_s: float) -> list[dict[str, Any]]:
    """Plan all layers of one load at EP144x2 under every rule, and prove them under even split."""
    runs = [(split, "search", SEARCH_S) for split in SPLIT_RULES] + [("even", "exact", exact_s)]
    rows = []
    for split, solver, limit_s in runs:
        problem = problem_of(profile, (profile.num_experts, 18, 8, 2), split)
        # Compile first.
        solve(problem, "search", Effort(time_limit_s=0.1))
        start = time.perf_counter()
        solution = solve(problem, solver, Effort(time_limit_s=limit_s))
        spent_s = time.perf_counter() - start
        reached_L = np.array([x.imbalance_mean for x in solution.balance.by_layer.values()])
        gap_L = reached_L / solution.bound_L - 1
        rows.append(
            {
                "split": split,
                "solver": solver,
                "time_limit_s": limit_s,
                "layers": len(gap_L),
                "mean": solution.balance.imbalance_mean,
                "bound_mean": solution.bound_mean,
                "gap_mean": float(gap_L.mean()),
                "gap_worst": float(gap_L.max()),
                "proven": solution.notes.get("layers_proven"),
                "s": spent_s,
            }
        )
        print(rows[-1], flush=True)
    return rows


def small(load_WLE: FloatArray, time_limit_s: float, repeats: int) -> list[dict[str, Any]]:
    """Plan layers of few experts under every rule, for one window and for all."""
    results = []
    for split in SPLIT_RULES:
        # Compile first: two slots a rank have kernels of their own, and so has one window.
        for slots in (2, 3):
            for windows in (1, 2):
                load_WE = np.random.default_rng(0).lognormal(0, 1, (windows, 6))
                prove(load_WE, (6, 2, 2, slots), split, 1.0)
        for num_windows in (1, len(load_WLE)):
            for case in SMALL:
                num_experts, nodes = case[:2]
                random = np.random.default_rng(0)
                layers, spent = [], []
                for _ in range(repeats):
                    layer = random.integers(load_WLE.shape[1])
                    chosen = random.choice(load_WLE.shape[2], num_experts, replace=False)
                    start = time.perf_counter()
                    layers.append(
                        prove(load_WLE[:num_windows, layer, chosen], case, split, time_limit_s)
                    )
                    spent.append(time.perf_counter() - start)
                row: dict[str, Any] = {
                    "split": split,
                    "windows": num_windows,
                    "experts": num_experts,
                    "nodes": nodes,
                    "deployment": f"EP{nodes * case[2]}x{case[3]}",
                    "layers": repeats,
                    "proven": sum(layer.stop_reason == "proven" for layer in layers),
                    "gap_worst": max(layer.gap for layer in layers),
                    "s_median": float(np.median(spent)),
                    "s_worst": float(np.max(spent)),
                }
                results.append(row)
                print(
                    f"{split:9} {num_windows} windows, {num_experts} experts, {nodes} nodes, "
                    f"{row['deployment']:6} {row['proven']} of {repeats} proven, worst gap "
                    f"{100 * row['gap_worst']:.3f}%, {row['s_median']:.1f} s",
                    flush=True,
                )
    return results


def prove(
    load_WE: FloatArray, case: tuple[int, int, int, int], split: str, time_limit_s: float
) -> Solution:
    """Plan one layer as ``eplb plan --solver exact`` does."""
    profile = LoadProfile.from_counts(load_WE[:, np.newaxis])
    return solve(problem_of(profile, case, split), "exact", Effort(time_limit_s=time_limit_s))


def problem_of(profile: LoadProfile, case: tuple[int, int, int, int], split: str) -> Problem:
    """Return the problem of placing (experts, nodes, ranks of a node, slots of a rank)."""
    experts, nodes, per_node, slots = case
    return Problem(
        profile=profile,
        model=MoEModel(name="recorded", num_experts=experts, layer_ids=profile.layer_ids),
        topology=Topology(num_nodes=nodes, ranks_per_node=per_node, slots_per_rank=slots),
        split=split,
    )


def main() -> None:
    """Run both parts and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recording", help="an .npz of arrays [layers, experts]")
    parser.add_argument("--pairs-array", help="plan all layers of this array at EP144x2")
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds a layer")
    parser.add_argument("--pairs-time-limit", type=float, default=180.0, help="of exact, seconds")
    parser.add_argument("--repeats", type=int, default=3, help="small layers of each kind, or 0")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    with np.load(arguments.recording) as members:
        names = sorted(members)
    profiles = [eplb.read_profile(f"{arguments.recording}:{name}") for name in names]
    load_WLE = np.concatenate([profile.counts_WLE for profile in profiles]).astype(np.float64)
    report = {}
    if arguments.output and arguments.output.exists():
        report = json.loads(arguments.output.read_text())
    data = Path(arguments.recording).name
    if arguments.pairs_array:
        profile = profiles[names.index(arguments.pairs_array)]
        rows = two_slots(profile, arguments.pairs_time_limit)
        report["pairs"] = {"environment": shared_environment(data), "rows": rows}
    if arguments.repeats:
        rows = small(load_WLE[:4], arguments.time_limit, arguments.repeats)
        report["small"] = {
            "environment": shared_environment(data),
            "time_limit_s": arguments.time_limit,
            "rows": rows,
        }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def shared_environment(data: str) -> dict[str, Any]:
    """Return what a figure has to be read with, the other work on the machine included."""
    return environment(data) | {"load_average": os.getloadavg()[1]}


if __name__ == "__main__":
    main()
