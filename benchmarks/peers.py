r"""Our greedy solver beside the engines' own, on recorded loads, in one process.

Peers are read from where you unpacked them; nothing of theirs is part of this project::

    python benchmarks/peers.py logical_count.npz --deepseek EPLB/eplb.py \
        --vllm vllm/distributed/eplb/policy/default.py \
        --sglang sglang/srt/eplb/eplb_algorithms/deepseek_vec.py -o peers.json

They need torch. Imbalance is max / mean rank load under even split on the array it was fitted to.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from run import environment

import eplb
from eplb.placement.greedy import place_greedy
from eplb.profiles.numpy_file import Members
from eplb.source import open_source

# name: ranks, slots a rank, nodes
DEPLOYMENTS = {
    "EP8x36": (8, 36, 1),
    "EP16x18": (16, 18, 2),
    "EP32x9": (32, 9, 4),
    "EP64x5": (64, 5, 8),
    "EP72x4": (72, 4, 9),
    "EP144x2": (144, 2, 18),
}
NUM_GROUPS = 8
# Each solver runs once untimed, then as often as this allows.
SECONDS, MAX_RUNS = 0.3, 25

Solver = Callable[[NDArray[np.int64], int, int, int, int], NDArray[np.int64]]


def load_peer(path: Path) -> ModuleType:
    """Import a file by itself, with its folder as the package its relative imports see."""
    package = ModuleType(f"peer_{path.stem}")
    package.__path__ = [str(path.parent)]
    sys.modules[package.__name__] = package
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def solvers(arguments: argparse.Namespace) -> dict[str, Solver]:
    """Return what can be run: (weight [L, E], slots, groups, nodes, ranks) -> slots [L, S]."""

    def ours(
        weight: NDArray[np.int64], slots: int, groups: int, nodes: int, ranks: int
    ) -> NDArray[np.int64]:
        if groups % nodes:
            groups = nodes = 1
        placed, _ = place_greedy(
            weight.astype(np.float32),
            num_slots=slots,
            num_ranks=ranks,
            num_nodes=nodes,
            num_groups=groups,
            distinct_ranks=True,
        )
        return placed

    found: dict[str, Solver] = {
        "eplb greedy": ours,
        "eplb rebalance_experts": lambda weight, *sizes: eplb.rebalance_experts(weight, *sizes)[0],
    }

    def of_tensor(function: Callable[..., Any]) -> Solver:
        return lambda weight, *sizes: np.asarray(function(torch.tensor(weight), *sizes))

    if arguments.deepseek:
        deepseek = load_peer(arguments.deepseek)
        found["DeepSeek"] = of_tensor(lambda w, *sizes: deepseek.rebalance_experts(w, *sizes)[0])
    if arguments.vllm:
        policy = load_peer(arguments.vllm).DefaultEplbPolicy
        found["vLLM"] = of_tensor(policy.rebalance_experts)
    if arguments.sglang:
        vec = load_peer(arguments.sglang)
        found["SGLang deepseek_vec"] = of_tensor(
            lambda w, slots, groups, nodes, ranks: vec.rebalance_experts(
                w[None].float(), slots, slots // ranks, groups, nodes,
                enable_hierarchical=groups % nodes == 0,
            )[0]
        )  # fmt: skip
    return found


def imbalance_L(
    phys_to_log_LS: NDArray[np.int64], load_LE: NDArray[np.int64], ranks: int
) -> NDArray[np.float64]:
    """Return max / mean rank load of each layer."""
    count_LE = np.stack([np.bincount(row, minlength=load_LE.shape[1]) for row in phys_to_log_LS])
    share_LS = np.take_along_axis(load_LE / count_LE, phys_to_log_LS, axis=1)
    load_LR = share_LS.reshape(len(load_LE), ranks, -1).sum(axis=2)
    ratio: NDArray[np.float64] = load_LR.max(axis=1) / load_LR.mean(axis=1)
    return ratio


def main() -> None:
    """Run every solver on every array and deployment, in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recording", help="an .npz of arrays [layers, experts]")
    for peer in ("deepseek", "vllm", "sglang"):
        parser.add_argument(f"--{peer}", type=Path, help=f"source file of {peer}'s solver")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    members = Members(open_source(arguments.recording))
    weights = {
        name: eplb.read_profile(f"{arguments.recording}:{name}").counts_WLE[0].astype(np.int64)
        for name in members.shapes()
    }
    runnable = solvers(arguments)
    results: list[dict[str, Any]] = []
    for policy, groups in (("global", 1), ("hierarchical", NUM_GROUPS)):
        for label, (ranks, slots_per_rank, nodes) in DEPLOYMENTS.items():
            if policy == "hierarchical" and NUM_GROUPS % nodes:
                continue
            sizes = (ranks * slots_per_rank, groups, nodes if groups > 1 else 1, ranks)
            ratios: dict[str, list[NDArray[np.float64]]] = {name: [] for name in runnable}
            spent: dict[str, list[float]] = {name: [] for name in runnable}
            for weight in weights.values():
                for name, solver in runnable.items():
                    ratios[name].append(imbalance_L(solver(weight, *sizes), weight, ranks))
                    runs: list[float] = []
                    while not runs or (sum(runs) < SECONDS and len(runs) < MAX_RUNS):
                        start = time.perf_counter()
                        solver(weight, *sizes)
                        runs.append(time.perf_counter() - start)
                    spent[name] += runs
            for name in runnable:
                ratio = np.array(ratios[name])
                row = {
                    "deployment": label,
                    "policy": policy,
                    "solver": name,
                    "imbalance_mean": float(ratio.mean()),
                    "imbalance_worst_layer": float(ratio.max()),
                    "median_ms": 1e3 * float(np.median(spent[name])),
                    "min_ms": 1e3 * min(spent[name]),
                }
                if "DeepSeek" in runnable:
                    theirs = np.array(ratios["DeepSeek"])
                    row["layers_worse_than_deepseek"] = int((ratio > theirs * (1 + 1e-6)).sum())
                    row["layers_better_than_deepseek"] = int((ratio < theirs * (1 - 1e-6)).sum())
                results.append(row)
                print(
                    f"{label:8} {policy:13} {name:24} mean {row['imbalance_mean']:.4f} worst "
                    f"{row['imbalance_worst_layer']:.4f} {row['median_ms']:9.2f} ms "
                    f"(min {row['min_ms']:.2f}) worse/better than DeepSeek "
                    f"{row.get('layers_worse_than_deepseek')}/"
                    f"{row.get('layers_better_than_deepseek')}"
                )
    if arguments.output:
        report = {"environment": environment(Path(arguments.recording).name), "results": results}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
