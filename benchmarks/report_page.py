"""Time ``eplb report`` as a process and weigh its page: ``python benchmarks/report_page.py``.

58 layers and 480 windows of simulated loads, on DeepSeek's prefill (EP32) and decode unit (EP144).
Where there is a browser, also how long it takes from the page's last byte to its last picture.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from registry import SIZES, synthetic_counts
from run import environment

RUNS, WINDOWS = 5, 480


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(prefix="eplb-benchmark-") as folder:
        for name in ("ep32", "ep144"):
            results[name] = _measure(name, Path(folder))
            print(name, results[name])
    if arguments.output:
        report = {
            "environment": environment("simulated log-normal loads that drift, 480 windows"),
            "results": results,
        }
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def _measure(name: str, folder: Path) -> dict[str, Any]:
    size = SIZES[name]
    loads, plan, page = (folder / f"{name}.{suffix}" for suffix in ("npz", "yaml", "html"))
    np.savez_compressed(loads, counts=synthetic_counts(size, "drift", WINDOWS))
    _eplb(
        "plan", loads, "--nodes", size.nodes, "--ranks-per-node", size.ranks_per_node,
        "--slots-per-rank", size.slots_per_rank, "--holdout", "25%", "-o", plan,
    )  # fmt: skip
    spent = []
    before = os.times()
    for _ in range(RUNS):
        start = time.perf_counter()
        _eplb("report", plan, loads, "-o", page)
        spent.append(time.perf_counter() - start)
    after = os.times()
    processor_s = (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )
    return {
        "layers": size.layers,
        "windows": WINDOWS,
        "runs": RUNS,
        "median_s": sorted(spent)[RUNS // 2],
        "min_s": min(spent),
        "processor_s_mean": processor_s / RUNS,
        "page_bytes": page.stat().st_size,
        "draw_s": _draw_s(page),
    }


def _eplb(*words: object) -> None:
    code = "from eplb.cli.main import main; main()"
    command = [sys.executable, "-c", code, *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _draw_s(page: Path) -> float | None:
    """Return how long headless Chromium takes to draw the page; None without a browser."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        return None
    from selenium import webdriver  # noqa: PLC0415

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        chrome.get(page.as_uri())
        milliseconds: float = chrome.execute_script(
            "const [page] = performance.getEntriesByType('navigation');"
            "return page.loadEventEnd - page.responseEnd;"
        )
    finally:
        chrome.quit()
    return milliseconds / 1e3


if __name__ == "__main__":
    main()
