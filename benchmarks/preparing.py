"""Time steps beside the thread that prepares a swap: ``python benchmarks/preparing.py -o FILE``.

A step launches small torch operations one after the other, as a decode step that the host holds up
does; no GPU is needed to see who has Python's lock. Plans are of DeepSeek-V3's 58 layers at EP32,
and every slot gets another expert.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from run import environment

from eplb.model import MoEModel
from eplb.plan import Plan
from eplb.runtime import preparation, turns
from eplb.runtime.ep.tables import PlacementTables
from eplb.slots import Placement
from eplb.topology import Topology

LAYER_IDS = tuple(range(3, 61))
NUM_EXPERTS, TOP_K = 256, 8
TOPOLOGY = Topology(num_nodes=4, ranks_per_node=8, slots_per_rank=9)
# One layer a batch, and four.
SPARE_ROWS = (9, 36)
RESTS = (0, turns.RESTS_PER_WORK)
STEP_MS = 5.0
IDLE_STEPS = 300
REPEATS = 5


def random_plan(rng: np.random.Generator) -> Plan:
    """Return a plan whose slots have nothing to do with those of another."""
    num_slots = TOPOLOGY.num_slots
    slots_LS = rng.integers(0, NUM_EXPERTS, (len(LAYER_IDS), num_slots))
    slots_LS[:, :NUM_EXPERTS] = np.arange(NUM_EXPERTS)
    return Plan(
        model=MoEModel(name="bench", num_experts=NUM_EXPERTS, layer_ids=LAYER_IDS, top_k=TOP_K),
        topology=TOPOLOGY,
        placement=Placement(
            phys_to_log_LS=rng.permuted(slots_LS, axis=1), layer_ids=LAYER_IDS,
            num_experts=NUM_EXPERTS,
        ),
    )  # fmt: skip


def prepare(old: Plan, new: Plan, spare_rows: int, rests: int) -> preparation.Prepared:
    """Prepare a swap as the first of 32 processes does."""
    # What of a group is asked for; 32 processes are not started for it.
    group: Any = SimpleNamespace(
        device=torch.device("cpu"), ranks=range(1), ranks_per_process=1,
        num_ranks=TOPOLOGY.num_ranks, num_nodes=TOPOLOGY.num_nodes,
        ranks_per_node=TOPOLOGY.ranks_per_node,
    )  # fmt: skip
    turns.RESTS_PER_WORK = rests
    return preparation.prepare(
        group, old.placement.phys_to_log_LS, new, spare_rows=spare_rows, rows_per_step=12,
        tables_of=PlacementTables.of_plan,
    )  # fmt: skip


def make_step() -> Callable[[], float]:
    """Return a step of about :data:`STEP_MS`, which returns how many milliseconds it took."""
    values = torch.zeros(64)

    def step(operations: int) -> float:
        start = time.perf_counter()
        for _ in range(operations):
            values.add_(1.0)
        return 1e3 * (time.perf_counter() - start)

    operations = int(1000 * STEP_MS / statistics.median(step(1000) for _ in range(1000)))
    return lambda: step(operations)


def steps_until(step: Callable[[], float], done: Future[Any]) -> list[float]:
    """Return the times of steps until something is done."""
    times = []
    while not done.done():
        times.append(step())
    return times


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng, pool, step = np.random.default_rng(0), ThreadPoolExecutor(1), make_step()
    # Once to warm up.
    pool.submit(prepare, random_plan(rng), random_plan(rng), SPARE_ROWS[0], 0).result()
    runs: dict[tuple[int, int], list[dict[str, float]]] = {}
    for _ in range(REPEATS):
        for spare_rows in SPARE_ROWS:
            for rests in RESTS:
                old, new = random_plan(rng), random_plan(rng)
                idle = [step() for _ in range(IDLE_STEPS)]
                start = time.perf_counter()
                times = steps_until(step, pool.submit(prepare, old, new, spare_rows, rests))
                seconds = time.perf_counter() - start
                alone = statistics.median(idle)
                runs.setdefault((spare_rows, rests), []).append(
                    {"seconds": seconds, "mean": statistics.mean(times) / alone,
                     "longest": max(times) / alone, "longest_idle": max(idle) / alone,
                     "idle_ms": alone, "steps": len(times)}
                )  # fmt: skip
    results = [
        {"spare_rows": spare_rows, "rests_per_work": rests}
        | {name: statistics.median(one[name] for one in some) for name in some[0]}
        for (spare_rows, rests), some in runs.items()
    ]
    for row in results:
        print(json.dumps(row))
    if arguments.output:
        made = {**environment("random plans"), "torch": torch.__version__}
        arguments.output.write_text(json.dumps({"environment": made, "results": results}) + "\n")


if __name__ == "__main__":
    main()
