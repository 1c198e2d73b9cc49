"""Prove optima and write JSON: ``python benchmarks/exact.py RECORDING [-o FILE]``.

Small layers of random experts of the recording under every split rule, and with ``--pairs-array``
two slots a rank under even split (EP144x2, every layer of that array).
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from run import environment

import eplb
from eplb.arrays import FloatArray
from eplb.load_profile import LoadProfile
from eplb.model import MoEModel
from eplb.placement.bound import weighted_bounds
from eplb.placement.pairs import search_pairs, solve_pairs
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


def scaled(load_WE: FloatArray, num_ranks: int) -> FloatArray:
    """Return the loads with a mean rank load of 1 in each window."""
    result: FloatArray = load_WE * (num_ranks / load_WE.sum(axis=1, keepdims=True))
    return result


def pairs(load_LE: FloatArray, num_ranks: int, time_limit_s: float) -> dict[str, Any]:
    """Search all layers, then prove each."""
    load_LE = scaled(load_LE, num_ranks)
    search_pairs(load_LE[0], num_ranks, evaluations=1)
    bounds = partial(
        weighted_bounds, weight_W=np.ones(1), num_ranks=num_ranks, slots_per_rank=2, split="even"
    )
    bounds(load_LE[np.newaxis, :1])
    start = time.perf_counter()
    rows = [search_pairs(load_E, num_ranks) for load_E in load_LE]
    search_s = time.perf_counter() - start
    found_L = np.array([largest(e, row) for e, row in zip(load_LE, rows, strict=True)])
    start = time.perf_counter()
    quick_L = bounds(load_LE[np.newaxis], reached_L=found_L)
    bound_s = time.perf_counter() - start
    solved, spent = [], []
    for load_E in load_LE:
        start = time.perf_counter()
        solved.append(solve_pairs(load_E, num_ranks, time_limit_s=time_limit_s))
        spent.append(time.perf_counter() - start)
        print(f"layer {len(solved)}: {solved[-1].objective:.5f} >= {solved[-1].bound:.5f}")
    best_L = np.array([layer.objective for layer in solved])
    gap_L = best_L / np.array([layer.bound for layer in solved]) - 1
    return {
        "layers": len(load_LE),
        "search_imbalance_mean": float(found_L.mean()),
        "search_s": search_s,
        "quick_bound_mean": float(quick_L.mean()),
        "quick_bound_s": bound_s,
        "exact_imbalance_mean": float(best_L.mean()),
        "exact_gap_mean": float(gap_L.mean()),
        "exact_gap_worst": float(gap_L.max()),
        "exact_proven": int((gap_L <= 1.1e-6).sum()),
        "exact_s_mean": float(np.mean(spent)),
        "exact_s_worst": float(np.max(spent)),
    }


def largest(load_E: FloatArray, row: Any) -> float:
    """Return the largest pair."""
    count_E = np.bincount(row[row >= 0], minlength=len(load_E))
    value_S = np.where(row >= 0, (load_E / count_E)[row], 0.0)
    return float(value_S.reshape(-1, 2).sum(axis=1).max())


def small(load_WLE: FloatArray, time_limit_s: float, repeats: int) -> list[dict[str, Any]]:
    """Plan layers of few experts under every rule, for one window and for all."""
    results = []
    for split in SPLIT_RULES:
        # Compile first.
        prove(np.array([[3.0, 2, 2, 1], [1, 2, 2, 3]]), (4, 2, 1, 3), split, 1.0)
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
    experts, nodes, per_node, slots = case
    problem = Problem(
        profile=profile,
        model=MoEModel(name="part", num_experts=experts, layer_ids=profile.layer_ids),
        topology=Topology(num_nodes=nodes, ranks_per_node=per_node, slots_per_rank=slots),
        split=split,
    )
    return solve(problem, "exact", Effort(time_limit_s=time_limit_s))


def main() -> None:
    """Run both parts and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recording", help="an .npz of arrays [layers, experts]")
    parser.add_argument("--pairs-array", help="prove all layers of this array at EP144x2")
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds a layer")
    parser.add_argument("--repeats", type=int, default=3, help="small layers of each kind")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    with np.load(arguments.recording) as members:
        names = sorted(members)
    profiles = [eplb.read_profile(f"{arguments.recording}:{name}") for name in names]
    load_WLE = np.concatenate([profile.counts_WLE for profile in profiles]).astype(np.float64)
    report = {
        "environment": environment(Path(arguments.recording).name),
        "time_limit_s": arguments.time_limit,
        "small": small(load_WLE[:4], arguments.time_limit, arguments.repeats),
    }
    if arguments.pairs_array:
        load_LE = load_WLE[names.index(arguments.pairs_array)]
        report["pairs"] = pairs(load_LE, 144, 6 * arguments.time_limit)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
