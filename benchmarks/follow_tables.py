"""Tables of docs/migration.md, from what ``follow.py`` measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from table_format import markdown_table, measured_on

RESULTS = Path(__file__).parent / "results" / "follow.json"

Row = dict[str, Any]


def _rows(part: str) -> list[Row]:
    rows: list[Row] = json.loads(RESULTS.read_text())["results"][part]
    return rows


def policies() -> str:
    """Return a row a policy: imbalance and part of the slots moved, on each recording."""
    rows = _rows("policies")
    recordings = list(dict.fromkeys(row["recording"] for row in rows))
    of = {(row["policy"], row["recording"]): row for row in rows}
    body = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        line = [policy]
        for recording in recordings:
            row = of[policy, recording]
            line += [
                f"{row['imbalance_mean']:.4f}",
                f"{row['moved_part']:.1%} ({row['moved_part_most']:.1%})",
            ]
        body.append([*line, f"{of[policy, recordings[-1]]['after_jump']:.3f}"])
    head = [""]
    for recording in recordings:
        head += [f"{recording}: imbalance", "moved at a decision, mean (most)"]
    return markdown_table([*head, f"{recordings[-1]}, steps 260-279"], body) + measured_on(RESULTS)


def limits() -> str:
    """Return ``follow`` under limits on moves."""
    return _by_recording("curve", "limit", lambda name: f"{float(name):.1%}")


def forecasts() -> str:
    """Return ``follow`` under other forecasts."""
    return _by_recording("forecasts", "what is fitted", str)


def _by_recording(part: str, title: str, label: Callable[[str], str]) -> str:
    rows = _rows(part)
    recordings = list(dict.fromkeys(row["recording"] for row in rows))
    of = {(row["policy"], row["recording"]): row for row in rows}
    body = [
        [label(name), *(f"{of[name, r]['imbalance_mean']:.4f}" for r in recordings)]
        for name in dict.fromkeys(row["policy"] for row in rows)
    ]
    return markdown_table([title, *recordings], body)


def jumps() -> str:
    """Return alarms of the test for jumps."""
    body = []
    for row in _rows("jumps"):
        body += [
            [
                row["recording"],
                rate,
                f"{row['alarms'][rate]} of {row['decisions']}",
                f"{row['least_p']:.4f} at step {row['least_p_step']}",
                f"{row['stationary'][rate]} of {row['tests']}",
            ]
            for rate in row["alarms"]
        ]
    head = ["recording", "rate", "alarms", "least p value", "alarms, steps permuted"]
    return markdown_table(head, body)


FOLLOW_TABLES: dict[str, Callable[[], str]] = {
    "follow-policies": policies,
    "follow-limits": limits,
    "follow-forecasts": forecasts,
    "follow-jumps": jumps,
}
