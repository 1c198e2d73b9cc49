"""What heat maps share: height, labels, scales around 1, and words for cells that are shared."""

from __future__ import annotations

import numpy as np

from eplb.arrays import FloatArray
from eplb.cli.report.values import Legend

__all__ = ["MOST_COLUMNS", "half_span", "legend_around_one", "map_height", "range_label", "sharing"]

# Columns that can still be told apart on a wide screen.
MOST_COLUMNS = 288


def map_height(num_rows: int) -> int:
    """Return the height of a heat map: rows of 14 pixels while they fit, and room for its axis."""
    return int(np.clip(14 * num_rows + 70, 200, 460))


def range_label(bounds: tuple[int, int]) -> str:
    """Return one number, or the first and last of several."""
    first, last = bounds
    return str(first) if first == last else f"{first}-{last}"


def half_span(loads: list[FloatArray]) -> float:
    """Return how far from 1 a scale of ratios goes: the 0.5% farthest lie beyond; at most 1."""
    away = np.concatenate([np.abs(load_LR[~np.isnan(load_LR)] - 1) for load_LR in loads])
    return float(np.clip(np.ceil(np.quantile(away, 0.995) * 20) / 20, 0.1, 1.0))


def legend_around_one(half: float, middle: str, name: str) -> Legend:
    """Return the legend of a scale of ratios from ``1 - half`` to ``1 + half``."""
    low = "0" if half == 1 else f"{1 - half:.2f}"
    return Legend(palette="loads", marks=(low, middle, f"{1 + half:.2f}+"), name=name)


def sharing(what: str, size: int, places: int, noun: str = "columns") -> str:
    """Return the sentence that says how many share a place; empty where each has its own."""
    if size == places:
        return ""
    return f" {size} {what} share {places} {noun}, each showing the largest."
