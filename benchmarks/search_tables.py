"""Tables of docs/searching.md, from what ``search.py`` measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from table_format import markdown_table, measured_on

RESULTS = Path(__file__).parent / "results" / "search.json"
UNSEEN = RESULTS.with_name("unseen.json")


def _rows(part: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["results"][part]
    return rows


def _by_unit(part: str) -> str:
    """One row a deployment, one column a solver: mean / worst."""
    rows = _rows(part)
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    of = {(r["unit"], r["solver"]): f"{r['mean']:.4f} / {r['worst']:.4f}" for r in rows}
    units = dict.fromkeys(row["unit"] for row in rows)
    return markdown_table(
        ["", *solvers], [[unit, *(of[unit, s] for s in solvers)] for unit in units]
    )


def scenarios() -> str:
    """Return the table of four scenarios fitted, six arrays scored."""
    return _by_unit("scenarios") + measured_on(RESULTS)


def left_out() -> str:
    """Return the table of three arrays fitted, three others scored."""
    return _by_unit("left_out")


def steps() -> str:
    """Return a row a recording, deployment and rule: the next steps / all later ones."""
    rows = _rows("steps")
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    of = {
        (row["recording"], row["unit"], row["split"], row["solver"]):
            f"{row['next']:.3f} / {row['later']:.3f}"
        for row in rows
    }  # fmt: skip
    cases = dict.fromkeys(key[:3] for key in of)
    body = [[*case, *(of.get((*case, s), "") for s in solvers)] for case in cases]
    return markdown_table(["recording", "", "split", *solvers], body)


def nearest() -> str:
    """Return what ``nearest`` costs plans made for ``even``, and what planning for it brings."""
    body = [
        [
            row["unit"],
            f"{row['even_under_even']:.4f}",
            f"{row['even_under_nearest']:.4f}",
            f"{row['nearest_under_nearest']:.4f}",
            f"{row['part_back']:.0%}",
        ]
        for row in _rows("nearest")
    ]
    head = ["", "planned for even, under even", "planned for even, under nearest",
            "planned for nearest, under nearest", "of the cost comes back"]  # fmt: skip
    return markdown_table(head, body)


def one_load() -> str:
    """Return imbalance and gap of one known load."""
    body = [
        [
            row["unit"],
            row["solver"],
            f"{row['mean']:.4f}",
            f"{row['bound']:.4f}" if "bound" in row else "",
            f"{row['gap_mean']:.2%}" if "gap_mean" in row else "",
            f"{row['gap_worst']:.2%}" if "gap_worst" in row else "",
        ]
        for row in _rows("one_load")
    ]
    head = ["", "solver", "imbalance, mean", "bound", "gap, mean over layers", "gap, worst layer"]
    return markdown_table(head, body)


def statistics() -> str:
    """Return what minimising each statistic makes of all three, on the fitted steps."""
    body = [
        [row["statistic"], *(f"{row[key]:.4f}" for key in ("mean", "cvar", "worst", "bound"))]
        for row in _rows("statistics")
    ]
    head = ["minimised", "mean", "cvar", "worst", "bound of what is minimised"]
    return markdown_table(head, body)


def unseen() -> str:
    """Return what each choice of the search's windows is worth on steps that were not fitted."""
    rows = json.loads(UNSEEN.read_text())["results"]["variants"]
    body = [
        [
            row["variant"],
            *(f"{figure:.4f}" for figure in (row["mean"], *row["by_recording"])),
            f"{row['difference']:+.4f}" if number else "",
            f"{row['standard_error']:.4f}" if number else "",
        ]
        for number, row in enumerate(rows)
    ]
    head = ["", "mean", "drift_a", "shift_a", "difference", "standard error"]
    return markdown_table(head, body)


SEARCH_TABLES: dict[str, Callable[[], str]] = {
    "search-scenarios": scenarios,
    "search-left-out": left_out,
    "search-steps": steps,
    "search-nearest": nearest,
    "search-one-load": one_load,
    "search-statistics": statistics,
    "search-unseen": unseen,
}
