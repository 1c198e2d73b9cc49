"""Time the benchmarks and write JSON: ``python benchmarks/run.py [PATTERN] [-o FILE]``."""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import specs  # noqa: F401  (fills the registry)
from registry import REGISTRY

import eplb

MIN_RUNS, MAX_RUNS, SECONDS = 5, 200, 1.0


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Return milliseconds of a call after a warm-up: minimum, median and how many runs."""
    run()
    spent: list[float] = []
    while len(spent) < MIN_RUNS or (sum(spent) < SECONDS and len(spent) < MAX_RUNS):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return {"min_ms": 1e3 * min(spent), "median_ms": 1e3 * statistics.median(spent),
            "runs": len(spent)}  # fmt: skip


def environment(data: str) -> dict[str, Any]:
    """Return what a figure has to be read with; ``data`` says on what it was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],  # noqa: S607
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    return {
        "eplb": eplb.__version__,
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "processor": _processor(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": 0,
        "data": data,
    }


def _processor() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    ):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    """Run the benchmarks that a pattern names and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="*", help="such as 'greedy/*'")
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    results = {}
    for label, spec in REGISTRY.items():
        if fnmatch.fnmatch(label, arguments.pattern):
            results[label] = timed(spec.setup(**spec.parameters))
            figures = results[label]
            print(f"{label:36} {figures['median_ms']:10.3f} ms  (min {figures['min_ms']:.3f})")
    if arguments.output:
        report = {"environment": environment("simulated log-normal loads"), "results": results}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
