"""``eplb profile watch``: a live view of a recording in the terminal."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from eplb.profiles.live import Follower, WindowFigures

__all__ = ["watch_command"]

SHOWN = 12


@click.command("watch")
@click.argument("file", metavar="FILE", type=click.Path())
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Seconds between looks at the file.",
)
@click.option("--once", is_flag=True, help="Print what there is, and end.")
def watch_command(file: str, interval: float, once: bool) -> None:
    """Follow a recording while it is made: skew, drift and hottest experts of its last windows.

    \b
    eplb profile watch loads.npz
    """
    from rich.live import Live

    from eplb.cli import show
    from eplb.profiles.live import Follower

    follower = Follower(Path(file))
    figures: deque[WindowFigures] = deque(maxlen=SHOWN)
    out = show.console()
    count = _look(follower, figures)
    if once or follower.is_finished() or not out.is_terminal:
        out.print(_table(file, figures, count, finished=follower.is_finished()))
        return
    with Live(console=out, auto_refresh=False) as live:
        while not follower.is_finished():
            live.update(_table(file, figures, count, finished=False), refresh=True)
            time.sleep(interval)
            count += _look(follower, figures)
        live.update(_table(file, figures, count, finished=True), refresh=True)


def _look(follower: Follower, figures: deque[Any]) -> int:
    found = follower.poll()
    figures.extend(found)
    return len(found)


def _table(file: str, figures: deque[WindowFigures], count: int, *, finished: bool) -> Table:
    from rich.markup import escape

    from eplb.cli import show

    state = "finished" if finished else "recording"
    grid = show.table(
        "window", "began", "tokens", "max/mean", "drift", "hottest experts",
        title=f"{escape(file)}: {state}, {show.plural(count, 'window')}",
    )  # fmt: skip
    for number, window in enumerate(figures, start=count - len(figures) + 1):
        label = "" if window.scenario == "default" else f" {window.scenario}"
        began = "" if window.time_s is None else time.strftime(
            "%H:%M:%S", time.localtime(window.time_s)
        )  # fmt: skip
        hottest = "  ".join(f"{expert}: {show.percent(part)}" for expert, part in window.hottest)
        grid.add_row(
            escape(f"{number} {window.phase}{label}"),
            began,
            "" if window.tokens is None else show.rows(window.tokens),
            f"{window.max_over_mean:.2f}",
            "" if window.drift is None else show.percent(window.drift),
            f"layer {window.worst_layer}: {hottest}",
        )
    return grid
