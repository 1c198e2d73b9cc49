"""Tables of docs/repair.md, from ``results/moves.json``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from table_format import markdown_table

RESULTS = Path(__file__).parent / "results" / "moves.json"


def _report() -> dict[str, Any]:
    report: dict[str, Any] = json.loads(RESULTS.read_text())
    return report


def _measured_on(report: dict[str, Any]) -> str:
    environment = report["environment"]
    return (
        f"\n{environment['processor']}, two cores shared with other work; array "
        f"{report['loads']}; seconds of transfers predicted at the bandwidths of `h800`; "
        f"{environment['date'][:10]}.\n"
    )


def schedules() -> str:
    """Return rounds, staging and predicted seconds of a full reshuffle."""
    report = _report()
    body = [
        [
            row["target"],
            "no limit" if row["spare_slots"] is None else str(row["spare_slots"]),
            f"{row['moved_experts']} ({100 * row['moved_part']:.0f}%)",
            f"{row['moved_bytes'] / 1e9:.0f}",
            str(row["batches"]),
            f"{row['rounds']} / {row['min_rounds']}",
            str(row["staging_slots"]),
            f"{row['transfer_s']:.3f} / {row['transfer_bound_s']:.3f}",
            f"{row['cpu_ms']:.0f}",
        ]
        for row in report["schedules"]
    ]
    head = ["new plan", "spare slots a rank", "experts moved", "GB", "change-overs",
            "rounds / least", "staged at most", "s / busiest rank's",
            "CPU ms to schedule"]  # fmt: skip
    return markdown_table(head, body) + _measured_on(report)


def repairs() -> str:
    """Return what is loaded, moved and reached after ranks died."""
    report = _report()
    body = [
        [
            row["lost"],
            f"{row['lost_experts']} / {row['min_lost_experts']}",
            f"{row['lost_bytes'] / 1e9:.1f}",
            f"{row['moved_experts']} ({100 * row['moved_part']:.1f}%)",
            f"{row['imbalance_mean']:.3f}",
            f"{row['imbalance_anew']:.3f}",
            f"{row['cpu_ms']:.0f}",
        ]
        for row in report["repairs"]
    ]
    head = ["lost", "experts loaded / least", "GB", "moved besides", "imbalance", "planned anew",
            "CPU ms to repair"]  # fmt: skip
    return markdown_table(head, body) + _measured_on(report)


def resizes() -> str:
    """Return moves and balance of other numbers of ranks and slots."""
    report = _report()
    body = [
        [
            f"{row['from']} to {row['to']}",
            f"{100 * row['within']:.0f}%",
            str(row["forced_experts"]),
            f"{row['moved_experts']} ({100 * row['moved_part']:.0f}%)",
            f"{row['moved_bytes'] / 1e9:.0f}",
            f"{row['imbalance_mean']:.4f}",
            f"{row['free_imbalance']:.4f}, {row['free_moved_experts']}",
            f"{row['rounds']}, {row['transfer_s']:.3f}",
            f"{row['cpu_ms'] / 1e3:.0f}",
        ]
        for row in report["resizes"]
    ]
    head = ["", "within", "forced", "experts moved", "GB", "imbalance",
            "free optimum, its moves", "rounds, s (1 spare slot)", "CPU s to plan"]  # fmt: skip
    return markdown_table(head, body) + _measured_on(report)


def curves() -> str:
    """Return points of the curve of balance against moves."""
    report = _report()
    body = []
    for name, curve in report["curves"].items():
        first, last = curve[0], curve[-1]
        for part in (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0):
            limit = first[0] + part * (last[0] - first[0])
            moves, value = max(point for point in curve if point[0] <= limit)
            body.append([name, f"{100 * part:.0f}%", str(moves), f"{value:.4f}"])
    head = ["", "of the moves that are not forced", "experts moved", "imbalance"]
    return markdown_table(head, body) + _measured_on(report)


MOVE_TABLES: dict[str, Callable[[], str]] = {
    "move-schedules": schedules,
    "move-repairs": repairs,
    "move-resizes": resizes,
    "move-curves": curves,
}
