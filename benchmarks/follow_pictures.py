"""Draw the picture of docs/migration.md: ``python benchmarks/follow_pictures.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results" / "follow.json"
PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "follow-moves.svg"


def draw(results: dict[str, Any]) -> Figure:
    """Return balance against moves: ``follow`` under limits, and the other policies."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    recordings = list(dict.fromkeys(row["recording"] for row in results["curve"]))
    for axes, recording in zip(figure.subplots(1, 2, sharey=True), recordings, strict=True):
        points = [
            (100 * row["moved_part"], row["imbalance_mean"])
            for row in [*results["policies"], *results["curve"]]
            if row["recording"] == recording
            and (row["policy"] == "keep" or row["policy"][0].isdigit())
        ]
        axes.plot(*zip(*sorted(points), strict=True), marker=".", label="follow, under limits")
        for row in results["policies"]:
            if row["recording"] == recording and row["policy"] not in {"follow", "keep"}:
                axes.scatter(
                    100 * row["moved_part"], row["imbalance_mean"], s=18, label=row["policy"]
                )
        axes.set(title=recording, xlabel="slots filled anew at a decision, %", xscale="symlog")
    figure.axes[0].set_ylabel("imbalance of steps to come")
    figure.axes[1].legend(fontsize=6)
    return figure


def main() -> None:
    """Write the picture."""
    # No date and no chance in it: the same figures give the same bytes.
    rcParams["svg.hashsalt"] = "eplb"
    draw(json.loads(RESULTS.read_text())["results"]).savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
