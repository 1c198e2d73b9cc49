"""Tables and the picture of docs/hot-swap.md; ``python benchmarks/hot_swap_tables.py`` draws it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from table_format import markdown_table

__all__ = ["HOT_SWAP_TABLES", "picture"]

RESULTS = Path(__file__).parent / "results" / "hot-swap.json"
PREPARING = RESULTS.parent / "preparing.json"
PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "hot-swap.svg"
# What the copy engine gave on four H100 with 16 experts of 44 MB, torch 2.11.
COPY_ENGINE_GB_PER_S = 384.0
WIDTH, HEIGHT, LEFT, TOP = 720, 190, 46, 34
COLORS = {"idle": "#9aa0a6", "agreeing": "#6fa8dc", "moving": "#3b78c3", "checking": "#e0b345",
          "switching": "#e07a45", "switched": "#c3423b"}  # fmt: skip


def _results() -> tuple[dict[str, Any], str]:
    report = json.loads(RESULTS.read_text())
    made = report["environment"]
    on = f"\n{made['device']}, torch {made['torch']}, {made['date'][:10]}.\n"
    return report["results"], on


def transfers() -> str:
    """Return bandwidths with nothing beside."""
    results, on = _results()
    body = [
        [row["way"], str(row["experts"]), f"{row['gb_per_s']:.0f}",
         f"{row['gb_per_s'] / COPY_ENGINE_GB_PER_S:.0%}"]
        for row in results["transfers"]
    ]  # fmt: skip
    head = ["way", "experts at a time", "GB/s a rank", f"of {COPY_ENGINE_GB_PER_S:.0f} GB/s"]
    return markdown_table(head, body) + on


def beside() -> str:
    """Return steps beside which 705 MB move every tenth step."""
    results, on = _results()
    alone = {row["tokens"]: row for row in results["beside_serving"] if row["way"] == "alone"}
    body = []
    for row in results["beside_serving"]:
        without = alone[row["tokens"]]
        lost_ms = (row["mean_ms"] - without["mean_ms"]) * row["steps"]
        body.append(
            [f"{row['tokens']:,}", row["way"], f"{row['mean_ms']:.2f}", f"{row['median_ms']:.2f}",
             f"{row['max_ms']:.1f}", f"{row['mean_ms'] / without['mean_ms'] - 1:+.1%}",
             f"{lost_ms / row['moved_gb']:.1f}" if row["moved_gb"] else ""]
        )  # fmt: skip
    head = ["tokens a rank", "way", "ms, mean", "median", "longest", "mean slower by",
            "ms lost per GB"]  # fmt: skip
    return markdown_table(head, body) + on


def swaps() -> str:
    """Return steps of whole swaps, by stage."""
    results, on = _results()
    body = []
    for row in results["swaps"]:
        of_stage: dict[str, list[float]] = {}
        for stage, time_ms in zip(row["stages"], row["times_ms"], strict=True):
            of_stage.setdefault(stage, []).append(time_ms)
        idle = of_stage["idle"]
        budget = row["budget_gb_per_s"]
        moving_s = sum(of_stage["moving"]) / 1e3
        lost_ms = sum(
            sum(times) - len(times) * statistics.mean(idle)
            for stage, times in of_stage.items()
            if stage != "idle"
        )
        for stage, times in of_stage.items():
            is_moving = stage == "moving"
            body.append(
                [f"{row['tokens']:,}", "none" if budget is None else f"{budget:.0f} GB/s", stage,
                 str(len(times)), f"{statistics.mean(times):.2f}",
                 f"{statistics.mean(times) / statistics.mean(idle) - 1:+.1%}",
                 f"{max(times) / statistics.median(idle):.2f}",
                 f"{row['moved_gb'] / moving_s:.1f}" if is_moving else "",
                 f"{lost_ms / row['moved_gb']:.1f}" if is_moving else ""]
            )  # fmt: skip
    head = ["tokens a rank", "budget", "stage", "steps", "ms, mean", "slower by",
            "longest / median idle", "GB/s a rank", "ms lost per GB, all stages"]  # fmt: skip
    return markdown_table(head, body) + on


def deaths() -> str:
    """Return what survivors said after a SIGKILL at each stage."""
    results, on = _results()
    body = [
        [one["stage"], ", ".join(map(str, one["dead"])), f"{one['stopped_after_s']:.2f}",
         f"{one['recovered_after_s']:.1f}", str(one["loaded"]),
         f"{one['max_relative_error']:.4f}"]
        for death in results["deaths"]
        for one in death["survivors"]
    ]  # fmt: skip
    head = ["killed while", "named dead", "stopped after s", "serving again after s more",
            "experts loaded", "error then"]  # fmt: skip
    return markdown_table(head, body) + on


def random_swaps() -> str:
    """Return what swaps between random plans did to outputs, tokens and memory."""
    results, on = _results()
    found = results["random_swaps"]
    free = found["free_bytes_every_50_swaps"]
    body = [
        [f"{found['swaps']}", f"{found['steps']:,}", f"{found['max_relative_error']:.4f}",
         str(found["tokens_lost"]), f"{max(free) - min(free):,}" if free else ""]
    ]  # fmt: skip
    head = ["swaps", "steps", "largest |dy| / |y| (BF16)", "tokens lost",
            "free memory, largest difference in bytes"]  # fmt: skip
    return markdown_table(head, body) + on


def picture(row: dict[str, Any]) -> str:
    """Return an SVG of the time of each step, before, during and after two swaps."""
    times, stages = row["times_ms"], row["stages"]
    most = max(times) * 1.05
    per_step = (WIDTH - LEFT - 10) / len(times)
    scale = HEIGHT / most
    floor = TOP + HEIGHT
    title = (
        f"Milliseconds of each step: {row['tokens']:,} tokens a rank, two swaps of "
        f"{row['moved_gb'] / 2:.1f} GB a rank at {row['budget_gb_per_s']:.0f} GB/s"
    )
    parts = [f'<text x="4" y="14" font-weight="bold">{title}</text>']
    for number, (stage, color) in enumerate(COLORS.items()):
        x = LEFT + number * 110
        parts.append(f'<rect x="{x}" y="20" width="9" height="9" fill="{color}"/>')
        parts.append(f'<text x="{x + 13}" y="28">{stage}</text>')
    for tick in range(0, int(most) + 1, max(1, int(most) // 4)):
        y = floor - tick * scale
        parts.append(f'<text x="4" y="{y + 4:.1f}">{tick} ms</text>')
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 10}" stroke="#dddddd"/>')
    for number, (time_ms, stage) in enumerate(zip(times, stages, strict=True)):
        left, height = LEFT + number * per_step, time_ms * scale
        parts.append(
            f'<rect x="{left:.1f}" y="{floor - height:.1f}" width="{per_step * 0.85:.1f}" '
            f'height="{height:.1f}" fill="{COLORS[stage]}"/>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {floor + 8}" '
        f'width="{WIDTH}" font-family="sans-serif" font-size="11">\n'
        f'<rect width="{WIDTH}" height="{floor + 8}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def drawn() -> str:
    """Return the picture of the largest batch under a budget."""
    rows = [row for row in _results()[0]["swaps"] if row["budget_gb_per_s"] is not None]
    return picture(max(rows, key=lambda row: row["tokens"]))


def preparing() -> str:
    """Return steps beside the thread that prepares a swap."""
    report = json.loads(PREPARING.read_text())
    made = report["environment"]
    body = [
        [str(row["spare_rows"]), "yes" if row["rests_per_work"] else "no",
         f"{row['seconds']:.2f}", f"{row['mean']:.1f}", f"{row['longest']:.1f}",
         f"{row['longest_idle']:.1f}"]
        for row in report["results"]
    ]  # fmt: skip
    head = ["spare rows", "with rests", "seconds", "step, mean", "longest", "longest idle"]
    return markdown_table(head, body) + (
        f"\n{made['processor']}, torch {made['torch']}, {made['date'][:10]}.\n"
    )


HOT_SWAP_TABLES: dict[str, Callable[[], str]] = {
    "hot-swap-transfers": transfers,
    "hot-swap-beside": beside,
    "hot-swap-stages": swaps,
    "hot-swap-deaths": deaths,
    "hot-swap-random": random_swaps,
    "hot-swap-preparing": preparing,
}

if __name__ == "__main__":
    PICTURE.write_text(drawn())
