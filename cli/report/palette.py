"""Colours of the report, for light and for dark screens.

``loads`` is ColorBrewer's RdBu and its counterpart with a dark middle, which the colour-blind can
tell apart (Brewer 2002, colorbrewer2.org); ``cost`` and ``count`` change in lightness alone; lines
are Okabe and Ito's (jfly.uni-koeln.de/color, 2008) and differ in dash as well. The tests compute
contrast by WCAG 2.2 and distances as the colour-blind see them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["DARK", "LIGHT", "css_variables"]

Palette = Mapping[str, str | tuple[str, ...]]

LIGHT: Palette = MappingProxyType(
    {
        "page": "#f6f7f9",
        "card": "#ffffff",
        "text": "#1b2330",
        "muted": "#556072",
        "line": "#d9dee6",
        "link": "#0b5cad",
        "better": "#0a6b4d",
        "worse": "#a8310c",
        "after": "#0072b2",
        "before": "#d55e00",
        "bound": "#4d5766",
        "extra": "#00845f",
        "fitted": "#eaeef4",
        "loads": ("#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b"),
        "cost": ("#fff7ec", "#fdd49e", "#fc8d59", "#d7301f", "#7f0000"),
        "count": ("#eef3f9", "#c6dbef", "#6baed6", "#2171b5", "#08306b"),
    }
)
DARK: Palette = MappingProxyType(
    {
        "page": "#10141b",
        "card": "#181e27",
        "text": "#e6eaf0",
        "muted": "#a3adbb",
        "line": "#313a47",
        "link": "#7db8f2",
        "better": "#56d3a4",
        "worse": "#ff9d76",
        "after": "#56b4e9",
        "before": "#f0944d",
        "bound": "#b4bdc9",
        "extra": "#3fc79a",
        "fitted": "#222a36",
        "loads": ("#9bd0ff", "#4a90d0", "#264a70", "#262c36", "#6b3323", "#d4694a", "#ffc0a8"),
        "cost": ("#2a211b", "#6e3513", "#b85a1c", "#f09a45", "#ffe3b8"),
        "count": ("#1d2733", "#1f4468", "#2f77b4", "#6db6ee", "#d3ecff"),
    }
)


def css_variables(palette: Palette) -> str:
    """Return the colours as declarations of CSS variables, scales as gradients."""
    return " ".join(
        f"--{name}: {value if isinstance(value, str) else _gradient(value)};"
        for name, value in palette.items()
    )


def _gradient(colours: tuple[str, ...]) -> str:
    return f"linear-gradient(to right, {', '.join(colours)})"
