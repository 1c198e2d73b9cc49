"""The picture of ``eplb replay --plot``: imbalance and bytes moved over time.

Shape letters: W windows.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from eplb.errors import SolverUnavailable

if TYPE_CHECKING:
    from eplb.placement.replay import Replay

__all__ = ["draw"]


def draw(results: dict[str, Replay], expert_bytes: int | None, kind: str) -> bytes:
    """Return a picture of what became of policies, by name.

    Raises
    ------
    SolverUnavailable
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SolverUnavailable(
            "pictures need matplotlib; pip install 'eplb-toolkit[plots]'"
        ) from None
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    unit = 1.0 if expert_bytes is None else expert_bytes / 1e9
    for name, result in results.items():
        line = above.plot(result.step_W, result.imbalance_W, linewidth=0.7, label=name)
        steps = [decision.step for decision in result.decisions]
        moved = np.cumsum([decision.moved for decision in result.decisions]) * unit
        color = line[0].get_color()
        below.step(steps, moved, where="post", color=color)
        for decision in result.decisions:
            if decision.jumped:
                above.axvline(decision.step, color=color, linestyle=":", linewidth=1)
    above.set(ylabel="imbalance of a step")
    above.legend(fontsize=8)
    below.set(
        xlabel="step",
        ylabel="experts moved so far" if expert_bytes is None else "GB moved so far",
        ylim=(0, None),
    )
    stream = io.BytesIO()
    # No date: the same replay gives the same bytes.
    figure.savefig(stream, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return stream.getvalue()
