r"""Our policy beside vLLM's own, called through vLLM's interface while a recording is replayed.

vLLM's policy is read from where you unpacked it; nothing of it is part of this project::

    python benchmarks/vllm_policy.py drift.npz --vllm vllm/distributed/eplb/policy/default.py \
        -o vllm-policy.json

From step 120 on, every 20 steps, each policy gets the loads of the last 100 steps and its own
placement before, as vLLM calls it; imbalance is scored on the 20 steps that follow, under even
split. The recording has 8 layers; 58 are made of them at offsets of 40 steps, to time a model of
DeepSeek-V3's size. Shape letters: W steps, L layers, E logical experts, S slots, R ranks.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peers import imbalance_L, load_peer
from run import environment

import eplb
from eplb.placement.keep_slots import count_moves
from eplb.runtime.engine_policy import solving_policy
from eplb.runtime.vllm_policy import make_policy

# name: ranks, slots a rank, nodes
DEPLOYMENTS = {"EP8x36": (8, 36, 1), "EP32x9": (32, 9, 4), "EP64x5": (64, 5, 8),
               "EP144x2": (144, 2, 18)}  # fmt: skip
FIRST, EVERY, WINDOW = 120, 20, 100
NUM_LAYERS, OFFSET = 58, 40
NUM_GROUPS = 8


def widen(counts_WLE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a recording of 58 layers: the recorded ones again at later steps."""
    copies = -(-NUM_LAYERS // counts_WLE.shape[1])
    shifted = [np.roll(counts_WLE, -OFFSET * i, axis=0) for i in range(copies)]
    return np.concatenate(shifted, axis=1)[:, :NUM_LAYERS]


def replay(
    policy: Any, counts_WLE: NDArray[np.float64], ranks: int, slots: int, groups: int, nodes: int
) -> dict[str, float]:
    """Live through a recording under a policy of vLLM's interface."""
    num_layers, num_experts = counts_WLE.shape[1:]
    # What vLLM starts with.
    held = torch.arange(slots).repeat(num_layers, 1) % num_experts
    spent, moves, ratios = [], [], []
    for step in range(FIRST, len(counts_WLE), EVERY):
        load = torch.tensor(counts_WLE[step - WINDOW : step].sum(axis=0), dtype=torch.int32)
        start = time.perf_counter()
        placed = policy.rebalance_experts(load, slots, groups, nodes, ranks, held)
        spent.append(time.perf_counter() - start)
        moves.append(count_moves(held.numpy(), placed.numpy(), ranks))
        held = placed
        ratios += [
            imbalance_L(held.numpy(), counts_LE, ranks).mean()
            for counts_LE in counts_WLE[step : step + EVERY]
        ]
    return {
        "median_ms": 1e3 * float(np.median(spent)),
        "max_ms": 1e3 * max(spent),
        # The first rearrangement, away from what a server starts with, is no following.
        "moved_part": float(np.mean(moves[1:])) / (num_layers * slots),
        "imbalance_mean": float(np.mean(ratios)),
        "replans": len(moves),
    }


def main() -> None:
    """Replay every recording under every policy, in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recordings", nargs="+", help="profiles of many steps")
    parser.add_argument("--vllm", type=Path, required=True, help="policy/default.py of vLLM")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    own = load_peer(arguments.vllm).DefaultEplbPolicy
    ours = {name: make_policy(solving_policy(hierarchical=name == "hierarchical"), own.__base__)
            for name in ("global", "hierarchical")}  # fmt: skip
    results: list[dict[str, Any]] = []
    for recording in arguments.recordings:
        counts_WLE = widen(eplb.read_profile(recording).counts_WLE)
        for label, (ranks, per_rank, num_nodes) in DEPLOYMENTS.items():
            for kind in ("global", "hierarchical"):
                nodes = num_nodes if kind == "hierarchical" else 1
                if kind == "hierarchical" and (NUM_GROUPS % nodes or nodes == 1):
                    continue
                for name, policy in (("vLLM", own), (f"eplb {kind}", ours[kind])):
                    row = {
                        "recording": Path(recording).stem,
                        "deployment": label,
                        "policy": kind,
                        "solver": name,
                        **replay(policy, counts_WLE, ranks, ranks * per_rank, NUM_GROUPS
                                 if kind == "hierarchical" else 1, nodes),
                    }  # fmt: skip
                    results.append(row)
                    print(
                        f"{row['recording']:8} {label:8} {kind:13} {name:18} "
                        f"{row['median_ms']:7.1f} ms (max {row['max_ms']:.1f}) moved "
                        f"{100 * row['moved_part']:.1f}% imbalance {row['imbalance_mean']:.4f}"
                    )
    if arguments.output:
        names = ", ".join(Path(r).name for r in arguments.recordings)
        report = {"environment": environment(names), "results": results}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
