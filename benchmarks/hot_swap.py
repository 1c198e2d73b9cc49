"""Measure hot swaps on the GPUs of one host: ``python benchmarks/hot_swap.py -o FILE``.

One process a GPU. Transfers with nothing beside (the copy engine, NCCL coalesced and expert by
expert); the same beside serving; every step before, during and after swaps in which every slot gets
another expert; swaps between random plans beside a reference; and a process killed at each stage.
``--tiny`` runs the same on CPUs in little, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hot_swap_ranks
import torch
from hot_swap_ranks import TINY, Sizes
from run import environment

# A run on GPUs takes less than two minutes.
MOST_S = 400


def run(work: Any, processes: int, folder: str, *arguments: Any) -> list[int | None]:
    """Run processes none of which is ended for another's sake; return their exit codes."""
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=work, args=(process, processes, folder, *arguments))
        for process in range(processes)
    ]
    for one in started:
        one.start()
    for one in started:
        one.join(MOST_S)
        one.kill()
        one.join()
    return [one.exitcode for one in started]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    processes = gpus or 2
    sizes = TINY if arguments.tiny else Sizes()
    with tempfile.TemporaryDirectory() as folder:
        codes = run(hot_swap_ranks.measure, processes, folder, sizes)
        written = Path(folder) / "results.json"
        results = json.loads(written.read_text()) if written.exists() else {}
        results["exit_codes"] = codes
        results["deaths"] = []
        # Side by side: they wait for timeouts most of the time.
        with ThreadPoolExecutor() as pool:
            deaths = pool.map(
                lambda number: run(hot_swap_ranks.die, processes, folder, number),
                range(sizes.deaths),
            )
            for number, codes in enumerate(deaths):
                told = sorted(Path(folder).glob(f"death{number}-*"))
                survivors = [json.loads(path.read_text()) for path in told]
                results["deaths"].append({"exit_codes": codes, "survivors": survivors})
                print(results["deaths"][-1], flush=True)
    if arguments.output:
        device = torch.cuda.get_device_name() if gpus else "CPU"
        versions = {"torch": torch.__version__, "device": f"{processes} x {device}"}
        report = {
            "environment": {**environment("random weights and tokens"), **versions},
            "results": results,
        }
        arguments.output.write_text(json.dumps(report) + "\n")
    if any(results["exit_codes"]):
        sys.exit("a process failed; what was measured before is in the report")


if __name__ == "__main__":
    main()
