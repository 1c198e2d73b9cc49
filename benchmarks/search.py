r"""Plans that hold on other traffic: our search beside FlashLB and DeepSeek's EPLB, in one run.

Peers are read from where you unpacked them; nothing of theirs is part of this project::

    python benchmarks/search.py logical_count.npz drift_a.npz shift_a.npz \
        --flashlb vllm_ascend/eplb/core/policy/policy_flashlb.py -o benchmarks/results/search.json

DeepSeek's results are those of ``eplb.rebalance_experts``, which has them to the slot. Figures are
means and maxima of max / mean rank load on windows that were not fitted, unless they say fitted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from run import environment

import eplb
from eplb.load_profile import LoadProfile
from eplb.metrics import Balance, evaluate
from eplb.model import MoEModel
from eplb.placement.solve import Effort, solve
from eplb.problem import Problem, Solution
from eplb.slots import Placement
from eplb.topology import Topology

Slots = NDArray[np.int64]
Row = dict[str, Any]

# name: nodes, ranks a node, slots a rank
UNITS = {
    "EP8x36": (1, 8, 36),
    "EP16x18": (2, 8, 18),
    "EP32x9": (4, 8, 9),
    "EP64x5": (8, 8, 5),
    "EP72x4": (9, 8, 4),
    "EP144x2": (18, 8, 2),
}
TOTALS_UNITS = ("EP32x9", "EP64x5", "EP72x4", "EP144x2")
STEPS_UNITS = ("EP8x36", "EP16x18", "EP32x9", "EP64x5")
FITTED = ("prefill_in1024", "decode_in1000out1000", "prefill_in4096", "decode_in1800out100")
ONE_LOAD = "decode_in1000out1000"
# FlashLB at the depth and width that its authors' defaults reach their best with, its z for 75%.
FLASHLB_Z, FLASHLB_DEPTH, FLASHLB_WIDTH = 0.674, 4, 8
FIT_STEPS, NEXT_STEPS, STEP_LAYERS = 120, 240, 4
FOLDS, SEEDS, STEP_SEEDS, STATISTIC_SEEDS = 6, 2, 3, 5


class Peers:
    """FlashLB's search, read from a file, and DeepSeek's EPLB."""

    def __init__(self, flashlb: Path | None) -> None:
        self.tree = None if flashlb is None else _flashlb(flashlb).FlashTree

    def slots(self, profile: LoadProfile, topology: Topology) -> dict[str, Slots]:
        """Return what each makes of a profile, [L, S]."""
        found = {"DeepSeek": self.deepseek(profile, topology)}
        if self.tree is not None:
            found["FlashLB"] = self.flashlb(profile, topology)
        return found

    def deepseek(self, profile: LoadProfile, topology: Topology) -> Slots:
        """Return DeepSeek's placement of the mean load."""
        slots: Slots = eplb.rebalance_experts(
            profile.mean_load_LE(), topology.num_slots, 1, 1, topology.num_ranks
        )[0]
        return slots

    def flashlb(self, profile: LoadProfile, topology: Topology) -> Slots:
        """Return FlashLB's placement of all windows."""
        assert self.tree is not None
        # To one scale, as in every figure here: it would weigh windows by their tokens.
        total_WL1 = profile.counts_WLE.sum(axis=2, keepdims=True)
        load_WLE = (profile.counts_WLE / total_WL1 * 1e6).astype(np.float32)
        return np.stack(
            [
                np.asarray(
                    self.tree(
                        np.ascontiguousarray(load_WLE[:, layer]), topology.num_slots,
                        topology.num_ranks, FLASHLB_Z, FLASHLB_DEPTH, FLASHLB_WIDTH,
                    ).optimize_balanceness()[0]
                ).reshape(-1)
                for layer in range(profile.num_layers)
            ]
        )  # fmt: skip


def _flashlb(path: Path) -> ModuleType:
    """Import FlashLB's file with stand-ins for what it imports of vLLM."""
    stubs: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.logger": {"logger": logging.getLogger("flashlb")},
        "vllm_ascend": {},
        "vllm_ascend.distributed": {},
        "vllm_ascend.distributed.parallel_state": {"get_dynamic_eplb_group": lambda: None},
        "flashlb": {"__path__": []},
        "flashlb.policy_abstract": {"EplbPolicy": object},
    }
    for name, values in stubs.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        sys.modules[name] = module
    spec = importlib.util.spec_from_file_location("flashlb.policy_flashlb", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def topology_of(unit: str) -> Topology:
    """Return the topology of a deployment."""
    nodes, ranks, slots = UNITS[unit]
    return Topology(num_nodes=nodes, ranks_per_node=ranks, slots_per_rank=slots)


def problem_of(profile: LoadProfile, unit: str, **options: Any) -> Problem:
    """Return the problem of placing a profile's experts on a deployment."""
    model = MoEModel(name="recorded", num_experts=profile.num_experts, layer_ids=profile.layer_ids)
    return Problem(profile=profile, model=model, topology=topology_of(unit), **options)


def placement_of(slots_LS: Slots, profile: LoadProfile) -> Placement:
    """Wrap a peer's slots."""
    return Placement(
        phys_to_log_LS=slots_LS, layer_ids=profile.layer_ids, num_experts=profile.num_experts
    )


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns and its seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def scored(placement: Placement, profile: LoadProfile, unit: str, split: str) -> Balance:
    """Score a placement."""
    return evaluate(profile, placement, topology_of(unit), split)


def of_arrays(recording: str, names: list[str]) -> LoadProfile:
    """Return arrays of a recording as scenarios."""
    return eplb.merge_profiles([eplb.read_profile(f"{recording}:{name}") for name in names])


def scenarios(recording: str, names: list[str], peers: Peers) -> list[Row]:
    """Fit four scenarios, score six arrays."""
    fitted, six = of_arrays(recording, list(FITTED)), of_arrays(recording, names)
    rows: list[Row] = []
    for unit in TOTALS_UNITS:
        topology = topology_of(unit)

        def add(solver: str, placement: Placement, seconds: float, unit: str = unit) -> None:
            balance = scored(placement, six, unit, "even")
            rows.append(
                {"unit": unit, "solver": solver, "mean": balance.imbalance_mean,
                 "worst": balance.imbalance_worst, "seconds": seconds}
            )  # fmt: skip
            print(f"scenarios {rows[-1]}", flush=True)

        slots, spent = timed(partial(peers.deepseek, fitted, topology))
        add("DeepSeek", placement_of(slots, fitted), spent)
        if peers.tree is not None:
            slots, spent = timed(partial(peers.flashlb, fitted, topology))
            add("FlashLB", placement_of(slots, fitted), spent)
        for limit_s in (1.0, 10.0):
            solution = solve(problem_of(fitted, unit), "search", Effort(time_limit_s=limit_s))
            add(f"search, {limit_s:g} s", solution.placement, solution.time_s)
    return rows


def left_out(recording: str, names: list[str], peers: Peers) -> list[Row]:
    """Fit three of six arrays, score the other three: mean and worst over folds and seeds."""
    folds = list(combinations(names, 3))
    folds = [folds[i] for i in np.random.default_rng(0).permutation(len(folds))[:FOLDS]]
    rows: list[Row] = []
    for unit in TOTALS_UNITS[:3]:
        found: dict[str, list[Balance]] = {}
        for fold in folds:
            fitted = of_arrays(recording, list(fold))
            others = of_arrays(recording, [name for name in names if name not in fold])
            for name, slots in peers.slots(fitted, topology_of(unit)).items():
                found.setdefault(name, []).append(
                    scored(placement_of(slots, fitted), others, unit, "even")
                )
            for seed in range(SEEDS):
                for name, extend in (("search", True), ("search, recorded only", False)):
                    effort = Effort(time_limit_s=1.5, seed=seed, extend=extend)
                    solution = solve(problem_of(fitted, unit), "search", effort)
                    found.setdefault(name, []).append(
                        scored(solution.placement, others, unit, "even")
                    )
        for name, balances in found.items():
            rows.append(
                {"unit": unit, "solver": name, "folds": len(folds),
                 "mean": float(np.mean([b.imbalance_mean for b in balances])),
                 "worst": float(np.mean([b.imbalance_worst for b in balances]))}
            )  # fmt: skip
            print(f"left out {rows[-1]}", flush=True)
    return rows


def steps(recordings: list[str], peers: Peers) -> list[Row]:
    """Fit steps 0-119 of the first layers, score the next 120 and all later ones."""
    rows: list[Row] = []
    for recording in recordings:
        profile = _layers(eplb.read_profile(recording), STEP_LAYERS)
        fitted = profile.windows(0, FIT_STEPS)
        parts = {
            "next": profile.windows(FIT_STEPS, NEXT_STEPS),
            "later": profile.windows(NEXT_STEPS, None),
        }
        for unit in STEPS_UNITS:
            peer_slots = peers.slots(fitted, topology_of(unit))
            for split in ("even", "batch"):

                def add(
                    solver: str,
                    placements: list[Placement],
                    where: tuple[str, str, str] = (Path(recording).stem, unit, split),
                    parts: dict[str, LoadProfile] = parts,
                ) -> None:
                    name, unit, split = where
                    figures = {
                        part: float(np.mean(
                            [scored(p, loads, unit, split).imbalance_mean for p in placements]
                        ))
                        for part, loads in parts.items()
                    }  # fmt: skip
                    rows.append({"recording": name, "unit": unit, "split": split,
                                 "solver": solver, **figures})  # fmt: skip
                    print(f"steps {rows[-1]}", flush=True)

                for name, slots in peer_slots.items():
                    add(name, [placement_of(slots, fitted)])
                problem = problem_of(fitted, unit, split=split)
                efforts = {"search": Effort(), "search, recorded only": Effort(extend=False)}
                for name, effort in efforts.items():
                    seeds = range(STEP_SEEDS if unit == "EP32x9" else 1)
                    add(name, [_seeded(problem, effort, seed).placement for seed in seeds])
    return rows


def _layers(profile: LoadProfile, count: int) -> LoadProfile:
    return LoadProfile.from_counts(
        profile.counts_WLE[:, :count], layer_ids=profile.layer_ids[:count], source=profile.source
    )


def _seeded(problem: Problem, effort: Effort, seed: int) -> Solution:
    effort = Effort(sweeps=effort.sweeps, extend=effort.extend, seed=seed)
    return solve(problem, "search", effort)


def nearest(recording: str, names: list[str]) -> list[Row]:
    """Plan each array for even and for nearest, score both under nearest."""
    rows: list[Row] = []
    for unit in TOTALS_UNITS:
        figures: dict[str, list[float]] = {}
        for name in names:
            profile = eplb.read_profile(f"{recording}:{name}")
            even, near = (
                solve(problem_of(profile, unit, split=split), "search", Effort(sweeps=150))
                for split in ("even", "nearest")
            )
            figures.setdefault("even_under_even", []).append(even.objective)
            figures.setdefault("nearest_under_nearest", []).append(near.objective)
            figures.setdefault("even_under_nearest", []).append(
                scored(even.placement, profile, unit, "nearest").imbalance_mean
            )
        means = {key: float(np.mean(values)) for key, values in figures.items()}
        cost = means["even_under_nearest"] - means["even_under_even"]
        back = means["even_under_nearest"] - means["nearest_under_nearest"]
        rows.append({"unit": unit, **means, "cost": cost, "part_back": back / cost})
        print(f"nearest {rows[-1]}", flush=True)
    return rows


def one_load(recording: str, peers: Peers, exact_s: float) -> list[Row]:
    """Fit and score one known load; the gap is to the bound that comes with the solution."""
    profile = eplb.read_profile(f"{recording}:{ONE_LOAD}")
    rows: list[Row] = []
    for unit in ("EP32x9", "EP144x2"):
        for name, slots in peers.slots(profile, topology_of(unit)).items():
            balance = scored(placement_of(slots, profile), profile, unit, "even")
            rows.append({"unit": unit, "solver": name, "mean": balance.imbalance_mean})
        for solver, limit_s in (("search", 1.0), ("search", 10.0), ("exact", exact_s)):
            solution = solve(problem_of(profile, unit), solver, Effort(time_limit_s=limit_s))
            gap_L = [
                layer.imbalance_mean / bound - 1
                for layer, bound in zip(
                    solution.balance.by_layer.values(), solution.bound_L, strict=True
                )
            ]
            rows.append(
                {"unit": unit, "solver": f"{solver}, {limit_s:g} s", "mean": solution.objective,
                 "bound": solution.bound, "gap_mean": float(np.mean(gap_L)),
                 "gap_worst": float(np.max(gap_L))}
            )  # fmt: skip
        for row in rows[-5:]:
            print(f"one load {row}", flush=True)
    return rows


def statistics(recording: str) -> list[Row]:
    """Minimise mean, worst and CVaR over the fitted steps, and score all three."""
    profile = _layers(eplb.read_profile(recording), STEP_LAYERS)
    fitted = profile.windows(0, FIT_STEPS)
    rows: list[Row] = []
    for statistic in ("mean", "worst", "cvar"):
        problem = problem_of(fitted, "EP32x9", statistic=statistic)
        found = [
            solve(problem, "search", Effort(extend=False, sweeps=500, seed=seed))
            for seed in range(STATISTIC_SEEDS)
        ]
        rows.append(
            {
                "statistic": statistic,
                "mean": float(np.mean([s.balance.imbalance_mean for s in found])),
                "cvar": float(np.mean([s.balance.imbalance_cvar for s in found])),
                "worst": float(np.mean([s.balance.imbalance_worst for s in found])),
                "bound": float(np.mean([s.bound for s in found])),
            }
        )
        print(f"statistics {rows[-1]}", flush=True)
    return rows


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("totals", help="an .npz of arrays [layers, experts]")
    parser.add_argument("steps", nargs="*", help="recordings of single steps")
    parser.add_argument("--flashlb", type=Path, help="source file of FlashLB's policy")
    parser.add_argument("--exact-seconds", type=float, default=60.0)
    parser.add_argument("--only", help="comma-separated parts; the others stay as they are in -o")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    peers = Peers(arguments.flashlb)
    with np.load(arguments.totals) as arrays:
        names = sorted(arrays.files)
    small = problem_of(eplb.read_profile(f"{arguments.totals}:{ONE_LOAD}"), "EP144x2")
    peers.slots(small.profile, small.topology)
    solve(small, "search", Effort(sweeps=1))
    parts: dict[str, Callable[[], list[Row]]] = {
        "scenarios": lambda: scenarios(arguments.totals, names, peers),
        "one_load": lambda: one_load(arguments.totals, peers, arguments.exact_seconds),
        "nearest": lambda: nearest(arguments.totals, names),
        "left_out": lambda: left_out(arguments.totals, names, peers),
        "statistics": lambda: statistics(arguments.steps[0]) if arguments.steps else [],
        "steps": lambda: steps(arguments.steps, peers),
    }
    results: dict[str, Any] = {}
    if arguments.output and arguments.output.exists():
        results = json.loads(arguments.output.read_text())["results"]
    chosen = list(parts) if arguments.only is None else arguments.only.split(",")
    for name in chosen:
        results[name] = parts[name]()
        if arguments.output:
            found = environment("recorded totals of DeepSeek-V3/R1, routing of a 256-expert model")
            found |= {"cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()[0]}
            report = {"environment": found, "results": results}
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
