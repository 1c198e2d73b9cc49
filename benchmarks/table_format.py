"""How the tables of the documents are written, and what stands below them."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["markdown_table", "measured_on"]


def markdown_table(head: list[str], body: list[list[str]]) -> str:
    """Return a table: its column heads, then its rows."""
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def measured_on(results: Path) -> str:
    """Return on what the results of a file were measured, a machine shared with other work."""
    found = json.loads(results.read_text())["environment"]
    return (
        f"\n{found['processor']}, {found['cores']} cores shared with other work (load average "
        f"{found['load_average']:.1f}), Python {found['python']}, {found['date'][:10]}.\n"
    )
