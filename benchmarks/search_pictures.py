"""Draw the pictures of docs/searching.md: ``python benchmarks/search_pictures.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "search.json"
PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
COLORS = ("#9aa0a6", "#e08e45", "#3b78c3", "#1d4e89", "#6fa8dc")
WIDTH, LABEL, BAR, GAP = 640, 150, 13, 12


def bars(title: str, groups: dict[str, dict[str, float]]) -> str:
    """Return an SVG of grouped bars: what each value has above 1, in percent."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    color = dict(zip(names, COLORS, strict=False))
    most = max(value - 1 for values in groups.values() for value in values.values())
    scale = (WIDTH - LABEL - 60) / most
    parts = [f'<text x="4" y="16" font-weight="bold">{title}</text>']
    for number, name in enumerate(names):
        x = 4 + number * (WIDTH - 8) / len(names)
        parts.append(f'<rect x="{x:.0f}" y="27" width="10" height="10" fill="{color[name]}"/>')
        parts.append(f'<text x="{x + 14:.0f}" y="36">{name}</text>')
    y = 50
    for group, values in groups.items():
        parts.append(f'<text x="4" y="{y + 11}">{group}</text>')
        for name, value in values.items():
            width = (value - 1) * scale
            parts.append(
                f'<rect x="{LABEL}" y="{y}" width="{width:.1f}" height="{BAR - 2}" '
                f'fill="{color[name]}"/>'
                f'<text x="{LABEL + width + 4:.1f}" y="{y + 10}">{value - 1:.1%}</text>'
            )
            y += BAR
        y += GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" '
        f'font-family="sans-serif" font-size="11">\n'
        f'<rect width="{WIDTH}" height="{y}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def pictures(results: dict[str, Any]) -> dict[str, str]:
    """Return the pictures by file name."""
    scenarios: dict[str, dict[str, float]] = {}
    for row in results["scenarios"]:
        scenarios.setdefault(row["unit"], {})[row["solver"]] = row["mean"]
    steps: dict[str, dict[str, float]] = {}
    for row in results["steps"]:
        if row["recording"] == "drift_a" and row["solver"] in {"DeepSeek", "FlashLB", "search"}:
            steps.setdefault(f"{row['unit']}, {row['split']} split", {})[row["solver"]] = row[
                "next"
            ]
    return {
        "search-scenarios.svg": bars(
            "Largest rank above the mean: four scenarios fitted, six arrays scored", scenarios
        ),
        "search-steps.svg": bars(
            "Largest rank above the mean: steps 120-239 of drift_a, fitted to 0-119", steps
        ),
    }


def main() -> None:
    """Write the pictures."""
    PICTURES.mkdir(exist_ok=True)
    for name, text in pictures(json.loads(RESULTS.read_text())["results"]).items():
        (PICTURES / name).write_text(text)


if __name__ == "__main__":
    main()
