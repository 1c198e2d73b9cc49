"""What commands print for people: tables, heat strips, and progress.

Colour and block characters appear only where they can be read: rich leaves colour out for pipes
and under NO_COLOR, and strips fall back to digits where the output cannot encode blocks.
Shape letters: W windows, L layers, R ranks.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from eplb.arrays import FloatArray
from eplb.load_profile import LoadProfile
from eplb.metrics import Balance

__all__ = [
    "NARROW",
    "FittingStrip",
    "console",
    "cost_strip",
    "expert_strip",
    "heat_strip",
    "layer_groups",
    "layer_table",
    "name",
    "percent",
    "plain",
    "plural",
    "profile_line",
    "progress",
    "ratio",
    "rows",
    "table",
    "window_table",
]

PIPE_WIDTH = 110
# Below this there is room for figures and one short strip.
NARROW = 56
STRIP_CELLS = 32
BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
DIGITS = "12345678"
# From cold to hot, told apart by the colour-blind (ColorBrewer RdYlBu); height says the same.
COLOURS = ("#4575b4", "#74add1", "#abd9e9", "#e0f3f8", "#fee090", "#fdae61", "#f46d43", "#d73027")


def console() -> Console:
    """Return the console for results: as wide as the terminal, or fixed for a pipe."""
    is_terminal = sys.stdout.isatty()
    return Console(
        width=None if is_terminal else PIPE_WIDTH, highlight=False, soft_wrap=not is_terminal
    )


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Show on standard error that work goes on, if it is a terminal."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield
        return
    with errors.status(text):
        yield


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table; the first column is text, the others are figures and kept whole."""
    grid = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, show_edge=False
    )
    for i, column in enumerate(columns):
        # Names wrap where the terminal is narrow, and do not vanish.
        grid.add_column(
            column,
            justify="left" if i == 0 else "right",
            no_wrap=i > 0,
            min_width=min(len(column), 5) if i == 0 else None,
        )
    return grid


def ratio(value: float) -> str:
    """Format an imbalance or balancedness."""
    return f"{value:.3f}"


def plain(text: str) -> str:
    """Return text of a user's file or path as markup that shows it, whatever characters it has."""
    # Control characters would act on the terminal; half of a surrogate pair cannot be encoded.
    return escape("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def name(text: str) -> str:
    """Return a file or other name as bold markup."""
    return f"[bold]{plain(text)}[/]"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def profile_line(profile: LoadProfile) -> str:
    """Return one line on what a profile holds."""
    ids, scenarios = profile.layer_ids, profile.scenarios
    parts = [
        plural(profile.num_windows, "window"),
        *([f"{len(scenarios)} scenarios"] if len(scenarios) > 1 else []),
        f"{plural(profile.num_layers, 'layer')} ({ids[0]}-{ids[-1]})",
        plural(profile.num_experts, "expert"),
    ]
    return f"{name(profile.source)}: {', '.join(parts)}"


def percent(value: float) -> str:
    """Format a part of one."""
    return f"{100 * value:.2f}%"


def rows(value: float) -> str:
    """Format a number of rows or tokens."""
    return f"{value:,.0f}"


def heat_strip(rank_load_R: FloatArray, cells: int = STRIP_CELLS) -> Text:
    """Draw loads relative to their mean: the mean is the fourth of eight steps of 1/8.

    More ranks (or experts) than ``cells`` share cells, of which each shows its largest.
    """
    mean = rank_load_R.mean()
    rank_load_R = _in_cells(rank_load_R, cells)
    relative = rank_load_R / mean if mean > 0 else rank_load_R
    return _strip(3 + 8 * (relative - 1))


def cost_strip(cost_W: FloatArray, span: tuple[float, float], cells: int = STRIP_CELLS) -> Text:
    """Draw values, such as what windows cost, in eight steps of a span.

    More of them than ``cells`` share cells, of which each shows its largest.
    """
    low, high = span
    return _strip((_in_cells(cost_W, cells) - low) / max(high - low, 1e-9) * (len(BLOCKS) - 1))


def _in_cells(values: FloatArray, cells: int) -> FloatArray:
    if len(values) <= cells:
        return values
    edges = np.linspace(0, len(values), cells + 1).astype(int)
    largest: FloatArray = np.maximum.reduceat(values, edges[:-1])
    return largest


def _strip(level: FloatArray) -> Text:
    level = np.clip(np.round(level), 0, len(BLOCKS) - 1)
    marks = BLOCKS if _can_encode(BLOCKS) else DIGITS
    strip = Text(no_wrap=True)
    for i in level.astype(int):
        strip.append(marks[i], style=COLOURS[i])
    return strip


class FittingStrip:
    """A strip of as many cells as its column has room for.

    Parameters
    ----------
    size : int
        Values it shows.
    draw : callable
        Returns the strip of so many cells at most.
    """

    def __init__(self, size: int, draw: Callable[[int], Text]) -> None:
        self._most, self._draw = min(size, STRIP_CELLS), draw

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, self._most)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._draw(min(options.max_width, STRIP_CELLS))


def expert_strip(load_E: FloatArray) -> FittingStrip:
    """Return the strip of expert loads from none to the hottest, for a table."""
    return FittingStrip(len(load_E), partial(cost_strip, load_E, (0.0, float(load_E.max()))))


def window_table(sides: Sequence[tuple[str, FloatArray]]) -> Table:
    """Return what windows cost over time, a row and a strip for each placement, on one scale.

    Parameters
    ----------
    sides : sequence of (name, array of float64)
        What each window costs: its mean imbalance over layers.
    """
    known = [(name, cost_W[~np.isnan(cost_W)]) for name, cost_W in sides]
    span = (
        min(float(cost_W.min()) for _, cost_W in known),
        max(float(cost_W.max()) for _, cost_W in known),
    )
    grid = table("imbalance of windows", "least", "most")
    grid.add_column(f"from first to last ({plural(len(known[0][1]), 'window')})")
    for name, cost_W in known:
        strip = FittingStrip(len(cost_W), partial(cost_strip, cost_W, span))
        grid.add_row(name, ratio(float(cost_W.min())), ratio(float(cost_W.max())), strip)
    return grid


def layer_groups(num_layers: int, most: int = 8) -> list[slice]:
    """Split the layers into at most ``most`` runs of nearly equal length."""
    edges = np.linspace(0, num_layers, min(num_layers, most) + 1).round().astype(int)
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def layer_table(
    profile: LoadProfile,
    columns: Sequence[tuple[str, Balance, FloatArray]],
    bound_L: FloatArray | None = None,
) -> Table:
    """Return imbalance by group of layers, a column and a heat strip for each placement.

    Parameters
    ----------
    profile : LoadProfile
    columns : sequence of (name, figures, rank loads [W, L, R])
    bound_L : array, optional
        A column for the bound.
    """
    grid = table("layers", *(label for label, _, _ in columns))
    if bound_L is not None:
        grid.add_column("bound", justify="right", no_wrap=True)
    drawn = columns if console().width >= NARROW else columns[-1:]
    for label, _, load_WLR in drawn:
        num_ranks = load_WLR.shape[2]
        if len(drawn) < len(columns):
            grid.add_column(label)
            continue
        which = f" {label}" if len(columns) > 1 else ""
        # Strips give way where the terminal is narrow: figures are kept whole.
        grid.add_column(f"rank loads{which} ({num_ranks} ranks)")
    imbalance_CL = [
        np.array([layer.imbalance_mean for layer in balance.by_layer.values()])
        for _, balance, _ in columns
    ]
    for group in layer_groups(profile.num_layers):
        ids = profile.layer_ids[group]
        cells: list[Any] = [str(ids[0]) if len(ids) == 1 else f"{ids[0]}-{ids[-1]}"]
        cells += [ratio(float(imbalance_L[group].mean())) for imbalance_L in imbalance_CL]
        if bound_L is not None:
            cells.append(ratio(float(bound_L[group].mean())))
        cells += [_rank_strip(_typical_load(load_WLR[:, group])) for _, _, load_WLR in drawn]
        grid.add_row(*cells)
    return grid


def _rank_strip(load_R: FloatArray) -> FittingStrip:
    return FittingStrip(len(load_R), partial(heat_strip, load_R))


def _typical_load(load_WLR: FloatArray) -> FloatArray:
    """Return what ranks carry in the layer of the group that is worst balanced, over windows."""
    load_LR: FloatArray = load_WLR.sum(axis=0)
    worst = (load_LR.max(axis=1) / load_LR.mean(axis=1)).argmax()
    row: FloatArray = load_LR[worst]
    return row


def _can_encode(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
