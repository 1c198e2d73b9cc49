"""The benchmarks: reading, solving, checking, evaluating, plan files, whole commands."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from registry import SIZES, register, synthetic_counts

import eplb
from eplb.load_profile import LoadProfile
from eplb.model import MoEModel
from eplb.placement.bound import layer_bounds
from eplb.placement.greedy import place_greedy
from eplb.placement.migration import find_migration
from eplb.placement.repair import repair as repair_plan
from eplb.placement.schedule import schedule_moves
from eplb.placement.windows import scaled_windows, window_weights
from eplb.plan import Plan, Quality
from eplb.problem import Problem
from eplb.runtime.engine_policy import Request, solving_policy
from eplb.topology import Topology

_ALL_SIZES = tuple(SIZES)
_ALL_SEVERITIES = ("uniform", "skewed", "one-hot")


@register(size=_ALL_SIZES, severity=_ALL_SEVERITIES)
def greedy(size: str, severity: str) -> Callable[[], Any]:
    """Place with replicas on distinct ranks, as ``eplb plan`` does."""
    load_LE = synthetic_counts(SIZES[size], severity)[0].astype(np.float32)
    slots, ranks = SIZES[size].slots, SIZES[size].ranks
    return lambda: place_greedy(load_LE, num_slots=slots, num_ranks=ranks, distinct_ranks=True)


@register(size=_ALL_SIZES, severity=("skewed",))
def rebalance_experts(size: str, severity: str) -> Callable[[], Any]:
    """Run the drop-in for DeepSeek's function, results included."""
    weight = synthetic_counts(SIZES[size], severity)[0]
    return lambda: eplb.rebalance_experts(weight, SIZES[size].slots, 1, 1, SIZES[size].ranks)


@register(size=("ep32", "ep144"), severity=("skewed", "one-hot"))
def lower_bound(size: str, severity: str) -> Callable[[], Any]:
    """Bound a greedy solution."""
    problem = _problem(size, severity, windows=1)
    balance = eplb.solve(problem).balance
    imbalance_L = np.array([layer.imbalance_mean for layer in balance.by_layer.values()])
    load_WLE = scaled_windows(problem.profile, problem.topology.num_ranks)
    return lambda: layer_bounds(
        load_WLE,
        window_weights(load_WLE) * problem.profile.num_layers,
        num_ranks=problem.topology.num_ranks,
        slots_per_rank=problem.topology.slots_per_rank,
        split="even",
        reached_L=imbalance_L,
        thorough=False,
    )


@register(size=("ep32", "ep144"), severity=("skewed",))
def check(size: str, severity: str) -> Callable[[], Any]:
    """Check a plan independently against its profile."""
    problem = _problem(size, severity, windows=1)
    plan = _plan(problem)
    return lambda: eplb.check_plan(plan, problem.profile, distinct_ranks=True)


@register(size=("ep32", "ep144"), severity=("drift",), windows=("480",))
def evaluate(size: str, severity: str, windows: str) -> Callable[[], Any]:
    """Score a plan on many windows."""
    problem = _problem(size, severity, windows=int(windows))
    plan = _plan(problem)
    return lambda: eplb.evaluate(problem.profile, plan.placement, plan.topology, plan.split)


@register(size=("ep32",), severity=("drift",), windows=("1", "480"))
def read_profile(size: str, severity: str, windows: str) -> Callable[[], Any]:
    """Read a compressed ``.npz``."""
    path = _scratch("profile.npz")
    np.savez_compressed(path, counts=synthetic_counts(SIZES[size], severity, int(windows)))
    return lambda: eplb.read_profile(path)


@register(size=("ep32", "ep144"), severity=("skewed",))
def write_plan(size: str, severity: str) -> Callable[[], Any]:
    """Write a plan file, synced to disk."""
    plan, path = _plan(_problem(size, severity, windows=1)), _scratch("plan.yaml")
    return lambda: eplb.write_plan(plan, path)


@register(size=("ep32", "ep144"), severity=("skewed",))
def read_plan(size: str, severity: str) -> Callable[[], Any]:
    """Read a plan file, digest checked."""
    plan, path = _plan(_problem(size, severity, windows=1)), _scratch("plan.yaml")
    eplb.write_plan(plan, path)
    return lambda: eplb.read_plan(path)


@register(imports=("numpy", "eplb", "numpy,click,yaml"))
def start(imports: str) -> Callable[[], Any]:
    """Start an interpreter that imports this and ends."""
    return lambda: _python(f"import {imports}")


@register(size=("ep32", "ep144"), severity=("skewed",))
def plan_command(size: str, severity: str) -> Callable[[], Any]:
    """Run ``eplb plan`` as a process of its own."""
    dims, profile, plan = SIZES[size], _scratch("loads.npz"), _scratch("plan.yaml")
    np.savez(profile, counts=synthetic_counts(dims, severity))
    options = [
        f"--nodes={dims.nodes}",
        f"--ranks-per-node={dims.ranks_per_node}",
        f"--slots-per-rank={dims.slots_per_rank}",
        f"--output={plan}",
    ]
    run = "from eplb.cli.main import main; main()"
    return lambda: _python(run, "plan", str(profile), *options)


@register(size=("ep32",), severity=("drift",), policy=("global", "hierarchical"))
def engine_policy(size: str, severity: str, policy: str) -> Callable[[], Any]:
    """Answer an engine that rebalances: solve, and keep what can stay where it is."""
    dims = SIZES[size]
    before, after = synthetic_counts(dims, severity, windows=2).astype(np.float64)
    place = solving_policy(hierarchical=policy == "hierarchical")
    first = Request(
        load_LE=before,
        num_slots=dims.slots,
        num_ranks=dims.ranks,
        num_nodes=dims.nodes,
        num_groups=dims.nodes,
    )
    request = replace(first, load_LE=after, current_LS=place(first))
    return lambda: place(request)


@register(size=("ep32", "ep144"), severity=("drift",))
def schedule(size: str, severity: str) -> Callable[[], Any]:
    """Schedule the way from the greedy plan of one window to that of the next, nothing matched."""
    dims = SIZES[size]
    old, new = (
        place_greedy(load_LE, num_slots=dims.slots, num_ranks=dims.ranks, distinct_ranks=True)[
            0
        ].reshape(dims.layers, dims.ranks, -1)
        for load_LE in synthetic_counts(dims, severity, windows=2).astype(np.float32)
    )
    migration = find_migration(old, new)
    return lambda: schedule_moves(migration, dims.ranks_per_node)


@register(size=("ep32", "ep144"), severity=("skewed",))
def repair(size: str, severity: str) -> Callable[[], Any]:
    """Repair a plan after the loss of a rank."""
    problem = _problem(size, severity, windows=1)
    plan = _plan(problem)
    return lambda: repair_plan(plan, [1], problem.profile)


def _python(code: str, *arguments: str) -> None:
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _problem(size: str, severity: str, windows: int) -> Problem:
    dims = SIZES[size]
    profile = LoadProfile.from_counts(synthetic_counts(dims, severity, windows))
    model = MoEModel(name=size, num_experts=dims.experts, layer_ids=profile.layer_ids)
    topology = Topology(
        num_nodes=dims.nodes,
        ranks_per_node=dims.ranks_per_node,
        slots_per_rank=dims.slots_per_rank,
    )
    return Problem(profile=profile, model=model, topology=topology)


def _plan(problem: Problem) -> Plan:
    solution = eplb.solve(problem)
    return Plan(
        model=problem.model,
        topology=problem.topology,
        placement=solution.placement,
        quality=Quality(
            imbalance_mean=solution.balance.imbalance_mean,
            imbalance_worst=solution.balance.imbalance_worst,
            bound_mean=solution.bound,
            gap_mean=solution.gap,
        ),
    )


_FOLDER = tempfile.TemporaryDirectory(prefix="eplb-benchmark-")


def _scratch(name: str) -> Path:
    return Path(_FOLDER.name) / name
