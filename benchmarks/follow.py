r"""Following a drift: every policy on recorded streams, beside the engines' rebalancers.

Peers are read from where you unpacked them; nothing of theirs is part of this project::

    python benchmarks/follow.py drift_a.npz shift_a.npz \
        --flashlb vllm_ascend/eplb/core/policy/policy_flashlb.py -o benchmarks/results/follow.json

DeepSeek's results are those of ``eplb.rebalance_experts``, which has them to the slot. EP32x9, the
first 4 layers, a decision every 20 steps from step 120 on, scored on the steps that follow each.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from run import environment
from search import Peers, Slots, placement_of, problem_of, topology_of

import eplb
import eplb.placement.replan as replan_module
from eplb.arrays import FloatArray
from eplb.load_profile import LoadProfile
from eplb.metrics import rank_load
from eplb.placement.forecast import forecast_windows
from eplb.placement.jump import find_jump
from eplb.placement.keep_slots import count_moves, keep_slots
from eplb.placement.replan import replan
from eplb.placement.replay import POLICIES, Replay, ReplayOptions, replay
from eplb.placement.solve import Effort, solve
from eplb.placement.windows import scaled_windows, window_weights
from eplb.problem import Problem

UNIT, LAYERS = "EP32x9", 4
EVERY, WARMUP, FIT_STEPS = 20, 120, 100
JUMP, AFTER_JUMP = 240, (260, 280)
SHARES = (0.01, 0.02, 0.04, 0.08, 1.0)
ORACLE_SWEEPS = 300
# Of the test for jumps: permutations of each stream, steps at which each is tested, rates.
PERMUTATIONS, TESTED, RATES = 8, range(140, 480, 40), (0.01, 0.05)
DEEP_LAYERS, DEEP_STEPS = 58, 240

Row = dict[str, Any]
Windows = tuple[FloatArray, FloatArray]


def read(path: str) -> LoadProfile:
    """Return the layers of a stream that are followed."""
    profile = eplb.read_profile(path)
    return LoadProfile.from_counts(profile.counts_WLE[:, :LAYERS], source=Path(path).stem)


def row_of(profile: LoadProfile, name: str, result: Replay) -> Row:
    """Return the figures of a policy."""
    slots = topology_of(UNIT).num_slots * profile.num_layers
    moved = [decision.moved for decision in result.decisions]
    after = (result.step_W >= AFTER_JUMP[0]) & (result.step_W < AFTER_JUMP[1])
    row = {
        "recording": profile.source,
        "policy": name,
        "imbalance_mean": float(result.imbalance_W.mean()),
        "imbalance_p95": float(np.percentile(result.imbalance_W, 95)),
        "moved": sum(moved),
        "moved_part": float(np.mean(moved)) / slots,
        "moved_part_most": max(moved) / slots,
        "after_jump": float(result.imbalance_W[after].mean()),
        "jumps": [decision.step for decision in result.decisions if decision.jumped],
    }
    print(row, flush=True)
    return row


def options_of(policy: str, **more: Any) -> ReplayOptions:
    """Return how streams are lived through here."""
    sweeps = ORACLE_SWEEPS if policy == "oracle" else None
    return ReplayOptions(
        every=EVERY, warmup=WARMUP, policy=policy, fit_steps=FIT_STEPS,
        effort=Effort(sweeps=sweeps), **more,
    )  # fmt: skip


def peer_replay(
    profile: LoadProfile, solver: Callable[[LoadProfile], Slots], how: str
) -> list[tuple[float, int, int]]:
    """Return imbalance and step of each step, and moves of its decision, under a peer's solver."""
    topology = topology_of(UNIT)
    old = solver(profile.windows(WARMUP - FIT_STEPS, WARMUP))
    rows = []
    for step in range(WARMUP, profile.num_windows, EVERY):
        new = old if how == "kept" else solver(profile.windows(step - FIT_STEPS, step))
        if how == "matched":
            new = keep_slots(new, old, topology.num_ranks)
        moved = count_moves(old, new, topology.num_ranks)
        old = new
        ahead = profile.windows(step, min(step + EVERY, profile.num_windows))
        load_WLR = rank_load(ahead, placement_of(new, profile), topology, "even")
        value_W = (load_WLR.max(axis=2) / load_WLR.mean(axis=2)).mean(axis=1)
        for number, value in enumerate(value_W.tolist()):
            rows.append((value, step + number, 0 if number else moved))
    return rows


def policies(profiles: list[LoadProfile], peers: Peers) -> list[Row]:
    """Return every policy on every stream."""
    rows = []
    topology = topology_of(UNIT)
    for profile in profiles:
        slots = topology.num_slots * profile.num_layers
        solvers = {"DeepSeek": lambda part: peers.deepseek(part, topology)}
        if peers.tree is not None:
            solvers["FlashLB"] = lambda part: peers.flashlb(part, topology)
        for name, solver in solvers.items():
            for how in ("kept", "re-solved", "matched"):
                value_W, step_W, moved_W = map(
                    np.array, zip(*peer_replay(profile, solver, how), strict=True)
                )
                after = (step_W >= AFTER_JUMP[0]) & (step_W < AFTER_JUMP[1])
                most = moved_W.max() / slots
                rows.append(
                    {
                        "recording": profile.source,
                        "policy": f"{name}, {how}",
                        "imbalance_mean": float(value_W.mean()),
                        "imbalance_p95": float(np.percentile(value_W, 95)),
                        "moved": int(moved_W.sum()),
                        "moved_part": float(moved_W[::EVERY].mean()) / slots,
                        "moved_part_most": float(most),
                        "after_jump": float(value_W[after].mean()),
                        "jumps": [],
                    }
                )
                print(rows[-1], flush=True)
        problem = problem_of(profile, UNIT)
        ours = [policy for policy in POLICIES if not policy.startswith("resolve")]
        rows += [row_of(profile, name, replay(problem, options_of(name))) for name in ours]
    return rows


def curve(profiles: list[LoadProfile]) -> list[Row]:
    """Return ``follow`` under limits from nearly no move to all."""
    return [
        row_of(
            profile,
            f"{share:g}",
            replay(problem_of(profile, UNIT), options_of("follow", max_share=share)),
        )
        for profile in profiles
        for share in SHARES
    ]


def _last(profile: LoadProfile, num_ranks: int, steps: int = FIT_STEPS) -> FloatArray:
    return scaled_windows(profile, num_ranks)[-steps:]


def _one(load_LE: FloatArray) -> Windows:
    load_WLE = np.maximum(load_LE, 0.0)[np.newaxis]
    load_WLE = load_WLE * (topology_of(UNIT).num_ranks / load_WLE.sum(axis=2, keepdims=True))
    return load_WLE, window_weights(load_WLE)


def _mean(profile: LoadProfile, num_ranks: int, *, seed: int = 0) -> Windows:
    return _one(_last(profile, num_ranks).mean(axis=0))


def _exponential(profile: LoadProfile, num_ranks: int, *, seed: int = 0) -> Windows:
    load_WLE = _last(profile, num_ranks)
    weight_W = np.exp(-np.arange(len(load_WLE))[::-1] / 20)
    return _one(np.average(load_WLE, axis=0, weights=weight_W))


def _quantile(profile: LoadProfile, num_ranks: int, *, seed: int = 0) -> Windows:
    return _one(np.quantile(_last(profile, num_ranks), 0.75, axis=0))


def _trend(profile: LoadProfile, num_ranks: int, *, seed: int = 0) -> Windows:
    load_WLE = _last(profile, num_ranks, 40)
    age_W = np.arange(len(load_WLE)) - (len(load_WLE) - 1) / 2
    slope_LE = np.tensordot(age_W, load_WLE, axes=1) / np.square(age_W).sum()
    ahead = len(load_WLE) / 2 + EVERY / 2
    return _one(load_WLE.mean(axis=0) + ahead * slope_LE)


def _steps(profile: LoadProfile, num_ranks: int, *, seed: int = 0) -> Windows:
    load_WLE = _last(profile, num_ranks)
    return load_WLE, window_weights(load_WLE)


def _recent_steps(profile: LoadProfile, num_ranks: int, *, seed: int = 0) -> Windows:
    load_WLE = _last(profile, num_ranks)
    weight_WL = window_weights(load_WLE) * np.exp(-np.arange(len(load_WLE))[::-1, None] / 33)
    return load_WLE, weight_WL / weight_WL.sum()


FORECASTS = {
    "mean of 100 steps": _mean,
    "exponential average, 20 steps": _exponential,
    "quantile, 75% of 100 steps": _quantile,
    "trend of 40 steps": _trend,
    "100 single steps": _steps,
    "100 single steps, recent ones most": _recent_steps,
    "50 recent steps and mixes around the present one": forecast_windows,
}


def forecasts(profiles: list[LoadProfile]) -> list[Row]:
    """Return what ``follow`` reaches at a limit of 4% under other forecasts."""
    rows = []
    for profile in profiles:
        for name, windows in FORECASTS.items():
            with patch.object(replan_module, "forecast_windows", windows):
                result = replay(problem_of(profile, UNIT), options_of("follow"))
            rows.append(row_of(profile, name, result))
    return rows


def jumps(paths: list[str]) -> list[Row]:
    """Return alarms of the test for jumps, on streams as they are and on permuted ones."""
    rows = []
    for path in paths:
        whole = eplb.read_profile(path)
        decisions = range(WARMUP, whole.num_windows, EVERY)
        p_values = {step: find_jump(whole.windows(0, step), EVERY).p_value for step in decisions}
        stationary = []
        for seed in range(PERMUTATIONS):
            order = np.random.default_rng(seed).permutation(whole.num_windows)
            mixed = replace(whole, counts_WLE=whole.counts_WLE[order])
            stationary += [find_jump(mixed.windows(0, s), EVERY).p_value for s in TESTED]
        rows.append(
            {
                "recording": Path(path).stem,
                "decisions": len(p_values),
                "tests": len(stationary),
                "alarms": {str(r): sum(p <= r for p in p_values.values()) for r in RATES},
                "stationary": {str(r): sum(p <= r for p in stationary) for r in RATES},
                "least_p": min(p_values.values()),
                "least_p_step": min(p_values, key=lambda step: p_values[step]),
            }
        )
        print(rows[-1], flush=True)
    return rows


def deep(path: str) -> Row:
    """Time ``replan`` on 58 layers, those of a stream again and again with experts renumbered."""
    counts = eplb.read_profile(path).counts_WLE
    random = np.random.default_rng(0)
    counts = np.stack(
        [
            counts[:, layer % counts.shape[1], random.permutation(counts.shape[2])]
            for layer in range(DEEP_LAYERS)
        ],
        axis=1,
    )
    profile = LoadProfile.from_counts(counts)
    start = solve(
        problem_of(profile.windows(0, WARMUP), UNIT), "search", Effort(sweeps=100)
    ).placement
    problem: Problem = problem_of(profile.windows(0, DEEP_STEPS), UNIT)
    limit = int(0.04 * start.phys_to_log_LS.size)
    replan(problem, start, max_moves=1)
    best_s, best_cpu_s = np.inf, np.inf
    for _ in range(5):
        begin, cpu = time.perf_counter(), time.process_time()
        found = replan(problem, start, max_moves=limit)
        best_s = min(best_s, time.perf_counter() - begin)
        best_cpu_s = min(best_cpu_s, time.process_time() - cpu)
    row = {
        "layers": DEEP_LAYERS, "steps": DEEP_STEPS, "moves": found.num_moves,
        "least_s": best_s, "least_cpu_s": best_cpu_s,
    }  # fmt: skip
    print(row, flush=True)
    return row


def main() -> None:
    """Run the parts that are asked for; others in the file stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("streams", nargs="+")
    parser.add_argument("--flashlb", type=Path)
    parser.add_argument("--parts", default="policies,curve,forecasts,jumps,deep")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    profiles = [read(path) for path in options.streams]
    parts: dict[str, Callable[[], Any]] = {
        "policies": lambda: policies(profiles, Peers(options.flashlb)),
        "curve": lambda: curve(profiles),
        "forecasts": lambda: forecasts(profiles),
        "jumps": lambda: jumps(options.streams),
        "deep": lambda: deep(options.streams[0]),
    }
    results = {}
    if options.output.exists():
        results = json.loads(options.output.read_text())["results"]
    for name in options.parts.split(","):
        results[name] = parts[name]()
        report = {
            "environment": {
                **environment(
                    "moe_lm_256: streams of real router choices, served in an order made for it"
                ),
                "cores": len(os.sched_getaffinity(0)),
                "load_average": os.getloadavg()[0],
            },
            "results": results,
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
