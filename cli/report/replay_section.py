"""A recorded stream lived through: imbalance step by step, and what was moved when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eplb.arrays import FloatArray
from eplb.cli.report.loads import buckets_of
from eplb.cli.report.maps import range_label
from eplb.cli.report.options import Line, bars, lines
from eplb.cli.report.values import Picture, Section, Table
from eplb.cli.report.window_sections import MOST_POINTS
from eplb.cli.show import ratio
from eplb.errors import InvalidInput

__all__ = ["ReplayLog", "replay_log", "replay_section"]

_COLOURS = (("after", "solid"), ("before", "dashed"), ("extra", "dotted"), ("bound", "solid"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayLog:
    """What ``eplb replay --json`` says of one policy.

    Parameters
    ----------
    policy : str
    imbalance_W : array of float64
        Of each step after the warm-up.
    replans : tuple of (step, experts moved)
    """

    policy: str
    imbalance_W: FloatArray
    replans: tuple[tuple[int, int], ...]

    @property
    def first_step(self) -> int:
        """Step that the first value is of."""
        return self.replans[0][0] if self.replans else 0


def replay_log(document: Any, name: str) -> ReplayLog:
    """Return the log in a JSON document.

    Raises
    ------
    InvalidInput
        It is not what ``eplb replay --json`` prints.
    """
    try:
        imbalance = np.array(document["imbalance"], np.float64)
        replans = tuple(
            (_count(entry["step"]), _count(entry["moved_experts"])) for entry in document["replans"]
        )
        policy = document["policy"]
        known = isinstance(policy, str) and imbalance.ndim == 1 and len(imbalance) > 0
        known = known and bool(np.isfinite(imbalance).all())
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise InvalidInput(
            f"{name} is not what eplb replay --json prints (an object with policy, replans and "
            "imbalance); run it again and keep its output"
        )
    return ReplayLog(policy=policy, imbalance_W=imbalance, replans=replans)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def replay_section(logs: Sequence[ReplayLog]) -> Section:
    """Return imbalance over time and the moves of each policy.

    Raises
    ------
    InvalidInput
        There are more policies than can be told apart.
    """
    if len(logs) > len(_COLOURS):
        raise InvalidInput(
            f"--replay was given {len(logs)} times; {len(_COLOURS)} can be told apart in one "
            "picture"
        )
    names = _names(logs)
    drawn, rows = [], []
    for name, log, (colour, dash) in zip(names, logs, _COLOURS, strict=False):
        values_B, ranges = buckets_of(log.imbalance_W, MOST_POINTS)
        drawn.append((Line(name=name, values=values_B, colour=colour, dash=dash), ranges))
        rows += [
            (name, range_label((a + log.first_step, b + log.first_step)), ratio(value))
            for (a, b), value in zip(ranges, values_B, strict=True)
        ]
    longest = max(drawn, key=lambda pair: len(pair[1]))[1]
    first = logs[0].first_step
    option = lines(
        [a + first for a, _ in longest],
        [_padded(line, len(longest)) for line, _ in drawn],
        x_name="step",
        y_name="imbalance",
        marks=[step for step, moved in logs[0].replans if moved],
        floor=1.0,
    )
    figures = Table(
        title="Policies",
        head=("policy", "imbalance, mean", "p95", "experts moved", "decisions that moved"),
        rows=tuple(
            (
                name,
                ratio(log.imbalance_W.mean()),
                ratio(float(np.percentile(log.imbalance_W, 95))),
                f"{sum(m for _, m in log.replans):,}",
                str(sum(m > 0 for _, m in log.replans)),
            )
            for name, log in zip(names, logs, strict=True)
        ),
    )
    shortened = len(longest) < max(len(log.imbalance_W) for log in logs)
    over_time = Picture(
        key="replay",
        title="Imbalance of steps that had not been seen",
        caption=(
            "Each step is scored on the placement in force, which knows only the past. Vertical "
            f"lines: moves of {names[0]}."
            + (" Neighbouring steps share a point, which shows their largest." if shortened else "")
        ),
        label="; ".join(
            f"{name}: mean {log.imbalance_W.mean():.3f}"
            for name, log in zip(names, logs, strict=True)
        ),
        option=option,
        table=Table(title="By step", head=("policy", "step", "imbalance"), rows=tuple(rows)),
    )
    return Section(
        key="replay",
        title="Following the traffic",
        lead="A recorded stream, lived through step by step under a policy of replanning.",
        tables=(figures,),
        pictures=(over_time, _moves(names, logs)),
    )


def _moves(names: list[str], logs: Sequence[ReplayLog]) -> Picture:
    steps = sorted({step for log in logs for step, _ in log.replans})
    series = []
    for name, log, (colour, dash) in zip(names, logs, _COLOURS, strict=False):
        moved = dict(log.replans)
        values = np.array([moved.get(step, 0) for step in steps], np.float64)
        series.append(Line(name=name, values=values, colour=colour, dash=dash))
    most = max((m for log in logs for _, m in log.replans), default=0)
    return Picture(
        key="replay-moves",
        title=f"At most {most:,} experts moved at once",
        caption="Experts that ranks fetch at each decision.",
        label=f"Moves at {len(steps)} decisions, at most {most}.",
        option=bars([str(s) for s in steps], series, x_name="step", y_name="experts moved"),
        height_px=220,
        table=Table(
            title="By decision",
            head=("step", *names),
            rows=tuple(
                (str(step), *(str(int(line.values[i])) for line in series))
                for i, step in enumerate(steps)
            ),
        ),
    )


def _names(logs: Sequence[ReplayLog]) -> list[str]:
    names: list[str] = []
    for log in logs:
        name, number = log.policy, 2
        while name in names:
            name, number = f"{log.policy} {number}", number + 1
        names.append(name)
    return names


def _padded(line: Line, size: int) -> Line:
    values = np.full(size, np.nan)
    values[: len(line.values)] = line.values
    return Line(name=line.name, values=values, colour=line.colour, dash=line.dash)
