"""Charts as ECharts options: plain JSON values, without code.

Colours are names of the palette (``$after``), which the page resolves for light and dark screens.
Heat maps carry ``rows``, which the page turns into ECharts' triplets: a third of the bytes.
Shape letters: X columns, Y rows of a heat map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eplb.arrays import FloatArray

__all__ = ["Line", "bars", "heat_map", "lines", "numbers", "scatter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a chart: its values over x, and how it looks without colour."""

    name: str
    values: FloatArray
    colour: str
    dash: str = "solid"


def numbers(values: Any, digits: int = 4) -> Any:
    """Return an array as JSON values of so many digits after the point; NaN becomes null."""
    array = np.asarray(values, float)
    if array.ndim > 1:
        return [numbers(row, digits) for row in array]
    return [
        None if np.isnan(value) else int(value) if value == int(value) else value
        for value in np.round(array, digits).tolist()
    ]


def heat_map(
    values_YX: FloatArray,
    *,
    x: tuple[str, Sequence[str]],
    y: tuple[str, Sequence[str]],
    value_name: str,
    palette: str,
    span: tuple[float, float],
    x_step: int | None = None,
    digits: int = 3,
) -> dict[str, Any]:
    """Return a heat map.

    Parameters
    ----------
    values_YX : array of float64
    x, y : (name, labels)
        Of the axes; y runs downwards.
    value_name : str
    palette : str
        A scale of the palette.
    span : (float, float)
        Values of its two ends; what is beyond has their colour.
    x_step : int, optional
        Columns from one label, and one boundary, to the next: the ranks of a node.
    """
    step = {} if x_step is None else {"interval": x_step - 1}
    return {
        "xAxis": {
            "type": "category",
            "name": x[0],
            "data": list(x[1]),
            "axisLabel": dict(step),
            "axisTick": {"show": x_step is not None, **step},
            "splitLine": {"show": x_step is not None, **step},
        },
        "yAxis": {"type": "category", "name": y[0], "data": list(y[1]), "inverse": True},
        "visualMap": {
            "show": False,
            "min": span[0],
            "max": span[1],
            "inRange": {"color": f"${palette}"},
        },
        "series": [{"type": "heatmap", "name": value_name, "rows": numbers(values_YX, digits)}],
    }


def lines(
    x_values: Sequence[float] | FloatArray,
    series: Sequence[Line],
    *,
    x_name: str,
    y_name: str,
    bands: Sequence[tuple[float, float]] = (),
    band_name: str = "",
    marks: Sequence[float] = (),
    step: bool = False,
    floor: float | None = None,
) -> dict[str, Any]:
    """Return lines over a numeric axis.

    Parameters
    ----------
    bands : sequence of (from, to)
        Stretches of x that are shaded, and called ``band_name``.
    marks : sequence of float
        Places on x with a vertical line.
    step : bool
        Draw each value as wide as its stretch of x: for what has no values between.
    floor : float, optional
        Where the y axis begins, unless values lie below.
    """
    x = numbers(x_values)
    drawn: list[dict[str, Any]] = [
        {
            "type": "line",
            "name": line.name,
            "data": [list(pair) for pair in zip(x, numbers(line.values), strict=True)],
            "color": f"${line.colour}",
            "lineStyle": {"type": line.dash, "width": 2},
            # A line of one point would not be seen.
            "symbol": "circle" if len(x) < 3 else "none",
            **({"step": "middle"} if step else {}),
        }
        for line in series
    ]
    if drawn and bands:
        drawn[0]["markArea"] = {
            "silent": True,
            "itemStyle": {"color": "$fitted"},
            "label": {"show": bool(band_name), "position": "insideTopLeft"},
            "data": [[{"xAxis": a, "name": band_name}, {"xAxis": b}] for a, b in bands],
        }
    if drawn and len(marks):
        drawn[0]["markLine"] = {
            "silent": True,
            "symbol": "none",
            "label": {"show": False},
            "lineStyle": {"color": "$muted", "type": "dotted", "width": 1},
            "data": [{"xAxis": mark} for mark in numbers(marks)],
        }
    y_axis: dict[str, Any] = {"type": "value", "name": y_name, "scale": True}
    if floor is not None:
        known = [v for line in series for v in numbers(line.values) if v is not None]
        y_axis["min"] = min([floor, *known])
    return {
        "xAxis": {"type": "value", "name": x_name, "min": "dataMin", "max": "dataMax"},
        "yAxis": y_axis,
        # The dash tells lines apart, not a mark in its middle.
        "legend": {"itemStyle": {"opacity": 0}},
        "tooltip": {"trigger": "axis"},
        "series": drawn,
    }


def bars(
    labels: Sequence[str], series: Sequence[Line], *, x_name: str, y_name: str
) -> dict[str, Any]:
    """Return bars over named places."""
    return {
        "xAxis": {"type": "category", "name": x_name, "data": list(labels)},
        "yAxis": {"type": "value", "name": y_name},
        "legend": {"show": len(series) > 1},
        "tooltip": {"trigger": "axis"},
        "series": [
            {
                "type": "bar",
                "name": line.name,
                "data": numbers(line.values),
                "color": f"${line.colour}",
            }
            for line in series
        ],
    }


def scatter(
    points: Sequence[tuple[str, float, float, str]],
    curve: Sequence[tuple[float, float]],
    *,
    x_name: str,
    y_name: str,
) -> dict[str, Any]:
    """Return named points ``(name, x, y, colour)``, and a curve beside them."""
    shapes = ("circle", "rect", "triangle", "diamond")
    drawn: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "name": name,
            "data": [numbers([x, y])],
            "color": f"${colour}",
            "symbol": shapes[i % len(shapes)],
            "symbolSize": 14,
        }
        for i, (name, x, y, colour) in enumerate(points)
    ]
    if curve:
        drawn.append(
            {
                "type": "line",
                "name": "replan",
                "data": numbers(curve),
                "color": "$extra",
                "lineStyle": {"type": "dashed", "width": 2},
                "symbol": "none",
            }
        )
    return {
        "xAxis": {"type": "value", "name": x_name, "min": 0},
        "yAxis": {"type": "value", "name": y_name, "scale": True},
        "legend": {},
        "tooltip": {"trigger": "item"},
        "series": drawn,
    }
