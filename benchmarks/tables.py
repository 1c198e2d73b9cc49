"""Render the tables of the documents: ``python benchmarks/tables.py [--check]``.

Each table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` and is made from a file in
``benchmarks/results``, which the benchmarks beside this one write.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ep_layer_tables import EP_LAYER_TABLES
from follow_tables import FOLLOW_TABLES
from hot_swap_tables import HOT_SWAP_TABLES
from move_tables import MOVE_TABLES
from request_tables import REQUEST_TABLES
from search_tables import SEARCH_TABLES
from table_format import markdown_table

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "exact.md",
    ROOT / "docs" / "hot-swap.md",
    ROOT / "docs" / "measured.md",
    ROOT / "docs" / "migration.md",
    ROOT / "docs" / "recording.md",
    ROOT / "docs" / "repair.md",
    ROOT / "docs" / "report.md",
    ROOT / "docs" / "engines" / "vllm.md",
    ROOT / "docs" / "requests.md",
    ROOT / "docs" / "runtime.md",
    ROOT / "docs" / "searching.md",
)
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _report(name: str) -> tuple[Any, dict[str, Any]]:
    report = json.loads((RESULTS / name).read_text())
    return report["results"], report["environment"]


def _measured_on(environment: dict[str, Any]) -> str:
    return (
        f"\n{environment['processor']}, one thread, Python {environment['python']}, numpy "
        f"{environment['numpy']}, {environment['date'][:10]}.\n"
    )


def greedy() -> str:
    """Return imbalance and time of the greedy solvers, all deployments."""
    results, environment = _report("greedy-beside-peers.json")
    body = [
        [
            row["deployment"],
            row["policy"],
            row["solver"],
            f"{row['imbalance_mean']:.4f}",
            f"{row['imbalance_worst_layer']:.3f}",
            f"{row['layers_worse_than_deepseek']} / {row['layers_better_than_deepseek']}",
            f"{row['median_ms']:.1f} ({row['min_ms']:.1f})",
        ]
        for row in results
    ]
    head = ["", "policy", "solver", "imbalance, mean", "worst layer",
            "layers worse / better than DeepSeek's", "ms, median (least)"]  # fmt: skip
    return markdown_table(head, body) + _measured_on(environment)


def greedy_short() -> str:
    """Return a row a deployment: mean imbalance and median time of each solver, global policy."""
    results, _ = _report("greedy-beside-peers.json")
    by_name = {
        (
            row["deployment"],
            row["solver"],
        ): f"{row['imbalance_mean']:.4f}, {row['median_ms']:.1f} ms"
        for row in results
        if row["policy"] == "global"
    }
    solvers = list(dict.fromkeys(solver for _, solver in by_name))
    deployments = dict.fromkeys(deployment for deployment, _ in by_name)
    body = [[d, *(by_name[d, solver] for solver in solvers)] for d in deployments]
    return markdown_table(["", *solvers], body)


def timings() -> str:
    """Return the times of the project's own benchmarks."""
    results, environment = _report("timings.json")
    body = [
        [f"`{label}`", f"{figures['median_ms']:.2f}", f"{figures['min_ms']:.2f}"]
        for label, figures in results.items()
    ]
    return markdown_table(["benchmark", "ms, median", "least"], body) + _measured_on(environment)


def vllm_policy() -> str:
    """Return time, moves and imbalance of policies of vLLM's interface over replayed drifts."""
    results, environment = _report("vllm-policy.json")
    body = [
        [
            row["recording"],
            row["deployment"],
            row["policy"],
            row["solver"],
            f"{row['median_ms']:.0f}",
            f"{100 * row['moved_part']:.0f}%",
            f"{row['imbalance_mean']:.3f}",
        ]
        for row in results
    ]
    head = ["recording", "", "policy", "solver", "ms, median", "experts moved", "imbalance, mean"]
    return markdown_table(head, body) + _measured_on(environment)


def recorder_cost() -> str:
    """Return step times without and with the recorder."""
    results, environment = _report("recorder-cost.json")
    body = [
        [label, f"{figures['off_ms']:.2f}", f"{figures['on_ms']:.2f}",
         f"{figures['cost_percent']:+.1f}%", str(figures["steps"])]
        for label, figures in results.items()
    ]  # fmt: skip
    measured_on = (
        f"\n{environment['device']}, {environment['decode_tokens']} tokens a decode step, "
        f"{environment['prefill_tokens']} a prefill step, torch {environment['torch']}, "
        f"transformers {environment['transformers']}, {environment['date'][:10]}.\n"
    )
    head = ["step", "ms without", "ms recording", "difference", "steps each"]
    return markdown_table(head, body) + measured_on


def exact() -> str:
    """Return how many small layers are proven, and in what time."""
    report = json.loads((RESULTS / "exact.json").read_text())["small"]
    body = [
        [
            row["split"],
            str(row["windows"]),
            str(row["experts"]),
            row["deployment"],
            f"{row['proven']} of {row['layers']}",
            f"{100 * max(row['gap_worst'], 0.0):.3f}%",
            f"{row['s_median']:.1f}",
        ]
        for row in report["rows"]
    ]
    head = ["split", "windows", "experts", "", "proven", "worst gap", "s, median"]
    return (
        markdown_table(head, body)
        + f"\nAt most {report['time_limit_s']:g} s a layer, two nodes; "
        + _shared_machine(report["environment"])
    )


def exact_pairs() -> str:
    """Return a row a split rule and solver: one load at EP144x2."""
    report = json.loads((RESULTS / "exact.json").read_text())["pairs"]
    body = [
        [
            row["split"],
            f"{row['solver']}, {row['time_limit_s']:g} s",
            f"{row['mean']:.4f}",
            f"{row['bound_mean']:.4f}",
            f"{100 * row['gap_mean']:.2f}%",
            f"{100 * row['gap_worst']:.2f}%",
            "" if row["proven"] is None else f"{row['proven']} of {row['layers']}",
        ]
        for row in report["rows"]
    ]
    head = ["split", "solver", "imbalance, mean", "bound", "gap, mean over layers", "worst layer",
            "layers proven"]  # fmt: skip
    return markdown_table(head, body) + "\n" + _shared_machine(report["environment"])


def _shared_machine(environment: dict[str, Any]) -> str:
    return (
        f"{environment['processor']}, 2 cores shared with other work (load average "
        f"{environment['load_average']:.0f}), {environment['date'][:10]}.\n"
    )


def report_page() -> str:
    """Return the time of ``eplb report`` and the size of its page."""
    results, environment = _report("report-page.json")
    body = [
        [
            name.upper(),
            f"{row['layers']} x {row['windows']}",
            f"{row['min_s']:.1f} ({row['median_s']:.1f})",
            f"{row['processor_s_mean']:.1f}",
            f"{row['page_bytes'] / 1e6:.1f}",
            "" if row["draw_s"] is None else f"{row['draw_s']:.1f}",
        ]
        for name, row in results.items()
    ]
    head = ["", "layers x windows", "s, least (median)", "of it processor", "MB",
            "s to draw, Chromium"]  # fmt: skip
    return markdown_table(head, body) + _measured_on(environment)


TABLES: dict[str, Callable[[], str]] = {
    "exact": exact,
    "exact-pairs": exact_pairs,
    "greedy": greedy,
    "greedy-short": greedy_short,
    "recorder-cost": recorder_cost,
    "report-page": report_page,
    "timings": timings,
    "vllm-policy": vllm_policy,
    **EP_LAYER_TABLES,
    **HOT_SWAP_TABLES,
    **MOVE_TABLES,
    **REQUEST_TABLES,
    **FOLLOW_TABLES,
    **SEARCH_TABLES,
}


def render(page: str) -> str:
    """Return a page with every table made anew."""
    return _TABLE.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], page)


def main() -> int:
    """Write the pages, or with ``--check`` say which are not what the results give."""
    stale = [page for page in PAGES if render(page.read_text()) != page.read_text()]
    for page in stale:
        if "--check" in sys.argv[1:]:
            print(f"{page.name} is not what benchmarks/results gives: run benchmarks/tables.py")
        else:
            page.write_text(render(page.read_text()))
    return bool(stale and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
