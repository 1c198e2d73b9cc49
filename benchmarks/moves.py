"""Schedules, repairs and resizes on recorded loads, as JSON.

``python benchmarks/moves.py RECORDING.npz -o benchmarks/results/moves.json`` plans DeepSeek-V3's
decode unit (EP144x2 on 18 nodes) for arrays [layers, experts] of the recording, and reshuffles,
breaks and resizes it. Seconds of transfers are predicted at the bandwidths of the preset ``h800``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from run import environment

import eplb
from eplb.load_profile import LoadProfile
from eplb.metrics import evaluate
from eplb.model import MoEModel, model_preset
from eplb.placement.keep_slots import keep_slots
from eplb.placement.migration import Migration, find_migration
from eplb.placement.repair import repair
from eplb.placement.resize import resize
from eplb.placement.schedule import Schedule, schedule_moves
from eplb.placement.solve import Effort, solve
from eplb.plan import Plan
from eplb.problem import Problem
from eplb.topology import Topology, topology_preset

Row = dict[str, Any]
T = TypeVar("T")

RUNS = 5
UNIT = topology_preset("h800", num_nodes=18, slots_per_rank=2)
# Spare slots a rank: no limit, and fewer than the layers need.
SPARE = (None, 8, 2, 1)
RANK, NODE = (17,), tuple(range(16, 24))
# Moves beyond what is lost, as parts of all slots.
REPAIR_PARTS = (0.0, 0.01, 0.04, 0.1)
NIGHT = replace(UNIT, num_nodes=12, slots_per_rank=3)
# By sweeps and not by time: the same on a busy machine.
EFFORT = Effort(sweeps=1000)
RESIZE_WITHIN = (0.01, 0.05)


def timed(
    call: Callable[[], T], runs: int = RUNS, *, warm_up: bool = True
) -> tuple[T, dict[str, float]]:
    """Return the result, and milliseconds, as a rule after a warm-up.

    The least that passed, and the median that processors spent in all threads, which other work on
    the machine does not change.
    """
    if warm_up:
        call()
    passed, spent = [], []
    for _ in range(runs):
        start, start_cpu = time.perf_counter(), time.process_time()
        result = call()
        passed.append(1e3 * (time.perf_counter() - start))
        spent.append(1e3 * (time.process_time() - start_cpu))
    return result, {"min_ms": min(passed), "cpu_ms": statistics.median(spent)}


def transfer_bound_s(
    migration: Migration, schedule: Schedule, topology: Topology, size: int
) -> float:
    """Return the longest that one rank sends or receives: no order of these transfers is faster."""
    same = schedule.source_M // topology.ranks_per_node == (
        migration.rank_M // topology.ranks_per_node
    )
    inside, across = topology.intra_node_bytes_per_s, topology.inter_node_bytes_per_s
    assert inside is not None
    assert across is not None
    cost_M = np.where(same, size / inside, size / across)
    return max(float(np.bincount(x, cost_M).max()) for x in (schedule.source_M, migration.rank_M))


def schedules(plans: tuple[Plan, Plan], model: MoEModel) -> list[Row]:
    """Go from one plan to another: as solved, every slot anew, and with ranks matched."""
    old, new = (plan.placement.phys_to_log_LS for plan in plans)
    matched = keep_slots(new, old, UNIT.num_ranks)
    rows = []
    for name, target in (("as solved", new), ("ranks matched", matched)):
        migration = find_migration(*(slots.reshape(len(old), 144, 2) for slots in (old, target)))
        for spare in SPARE:
            schedule, spent = timed(
                partial(schedule_moves, migration, 8, spare_slots=spare, in_parts=spare is not None)
            )
            size = model.expert_bytes or 0
            rounds_s = schedule.round_seconds(migration, UNIT, size)
            assert rounds_s is not None
            rows.append(
                {
                    "target": name,
                    "spare_slots": spare,
                    "moved_experts": migration.num_moves,
                    "moved_part": migration.num_moves / old.size,
                    "moved_bytes": migration.num_moves * size,
                    "batches": int(schedule.batch_M.max()) + 1,
                    "rounds": schedule.num_rounds,
                    "min_rounds": schedule.min_rounds,
                    "staging_slots": schedule.staging_slots,
                    "transfer_s": sum(rounds_s),
                    "transfer_bound_s": transfer_bound_s(migration, schedule, UNIT, size),
                    **spent,
                }
            )
            print(rows[-1])
    return rows


def repairs(plan: Plan, profile: LoadProfile) -> list[Row]:
    """Lose a rank, and a node."""
    rows = []
    for name, dead in (("a rank", RANK), ("a node", NODE)):
        left = replace(plan.topology, ranks_out_of_service=dead)
        problem = Problem(profile=profile, model=plan.model, topology=left)
        anew = solve(problem, "search", EFFORT).balance.imbalance_mean
        for share in REPAIR_PARTS:
            moves = int(share * plan.placement.phys_to_log_LS.size)
            found, spent = timed(partial(repair, plan, dead, profile, max_moves=moves))
            after = found.plan
            balance = evaluate(profile, after.placement, after.topology, after.split)
            rows.append(
                {
                    "lost": name,
                    "lost_experts": found.lost.num_moves,
                    "min_lost_experts": found.min_loads,
                    "lost_bytes": found.lost.num_moves * (plan.model.expert_bytes or 0),
                    "moved_experts": found.moves.num_moves,
                    "moved_part": found.moves.num_moves / plan.placement.phys_to_log_LS.size,
                    "imbalance_mean": balance.imbalance_mean,
                    "imbalance_anew": anew,
                    **spent,
                }
            )
            print(rows[-1])
    return rows


def resizes(plan: Plan, profile: LoadProfile) -> tuple[list[Row], dict[str, Any]]:
    """Go from 18 nodes to 12 and back."""
    rows, curves = [], {}
    for name, topology in (("18 nodes to 12", NIGHT), ("12 nodes to 18", UNIT)):
        results = []
        for within in RESIZE_WITHIN:
            found, spent = timed(
                partial(resize, plan, profile, topology, within=within, effort=EFFORT),
                runs=1,
                warm_up=False,
            )
            results.append(found)
            schedule = schedule_moves(found.migration, 8, spare_slots=1, in_parts=True)
            size = plan.model.expert_bytes or 0
            after = found.plan
            balance = evaluate(profile, after.placement, topology, after.split)
            rounds_s = schedule.round_seconds(found.migration, topology, size)
            rows.append(
                {
                    "resize": name,
                    "from": plan.topology.label,
                    "to": topology.label,
                    "within": within,
                    "forced_experts": found.forced_moves,
                    "moved_experts": found.migration.num_moves,
                    "moved_part": found.migration.num_moves / after.placement.phys_to_log_LS.size,
                    "moved_bytes": found.migration.num_moves * size,
                    "imbalance_mean": balance.imbalance_mean,
                    "free_imbalance": found.free_imbalance,
                    "free_moved_experts": found.free_moves,
                    "rounds": schedule.num_rounds,
                    "staging_slots": schedule.staging_slots,
                    "transfer_s": None if rounds_s is None else sum(rounds_s),
                    **spent,
                }
            )
            print(rows[-1])
        curves[name] = results[-1].curve
        plan = results[0].plan
    return rows, curves


def main() -> None:
    """Measure all three and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recording", help="an .npz of arrays [layers, experts]")
    parser.add_argument("--loads", default="decode_in1000out1000", help="array that is planned for")
    parser.add_argument("--other", default="prefill_in1024", help="array that is moved to")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    profiles = [
        eplb.read_profile(f"{arguments.recording}:{name}")
        for name in (arguments.loads, arguments.other)
    ]
    model = replace(model_preset("deepseek-v3"), layer_ids=profiles[0].layer_ids)
    plans = []
    for profile in profiles:
        problem = Problem(profile=profile, model=model, topology=UNIT)
        placement = solve(problem, "search", EFFORT).placement
        plans.append(Plan(model=model, topology=UNIT, placement=placement))
    report: dict[str, Any] = {
        "environment": environment(Path(arguments.recording).name),
        "loads": arguments.loads,
        "other": arguments.other,
        "schedules": schedules((plans[0], plans[1]), model),
        "repairs": repairs(plans[0], profiles[0]),
    }
    report["resizes"], report["curves"] = resizes(plans[0], profiles[0])
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
