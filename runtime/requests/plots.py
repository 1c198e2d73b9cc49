"""Pictures of replays: bands of the ranks over time, wasted time, latency.

Shape letters: T steps, R ranks.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from eplb.arrays import FloatArray
from eplb.errors import InvalidInput, SolverUnavailable
from eplb.runtime.requests.compare import Replay, Settings
from eplb.runtime.requests.decode_replay import DecodeLog
from eplb.runtime.requests.figures import decode_step_s, prefill_step_s

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FORMATS", "draw"]

FORMATS = ("png", "svg", "pdf")


def draw(replay: Replay, settings: Settings, kind: str) -> bytes:
    """Return a picture of one replay.

    Raises
    ------
    InvalidInput
        The format is not one of ``FORMATS``.
    SolverUnavailable
        matplotlib is not installed.
    """
    if kind not in FORMATS:
        raise InvalidInput(f"pictures are {', '.join(FORMATS)}, not {kind!r}; name such a file")
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise SolverUnavailable(
            "pictures need matplotlib; pip install 'eplb-toolkit[plots]'"
        ) from None
    first_TR: Any
    second_TR: Any
    log = replay.log
    if isinstance(log, DecodeLog):
        first_TR, second_TR = log.kv_TR, log.requests_TR
        names = ("KV tokens of a rank", "requests of a rank")
        mean_T, step_T = decode_step_s(log, settings.decode_cost)
        latency = ("time_per_output_token_s_p50", "time_per_output_token_s_p99", "wait_s_p99")
    else:
        first_TR, second_TR = log.attention_s_TR, log.tokens_TR
        names = ("attention of a rank, s", "tokens of a rank")
        mean_T, step_T, _ = prefill_step_s(log, settings.prefill_cost)
        latency = ("step_s_mean", "wait_s_p50", "wait_s_p99")
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    time_T = np.cumsum(step_T)
    for ax, load_TR, name in zip(axes[0], (first_TR, second_TR), names, strict=True):
        _band(ax, time_T, load_TR, name)
    axes[1][0].plot(time_T, 100 * (1 - mean_T / step_T), linewidth=0.7)
    axes[1][0].set(xlabel="time, s", ylabel="step time wasted, %", ylim=(0, None))
    axes[1][1].bar(range(len(latency)), [replay.figures[name] for name in latency])
    axes[1][1].set_xticks(range(len(latency)), [name.replace("_s", ", s,", 1) for name in latency])
    axes[1][1].tick_params(axis="x", labelsize=7)
    figure.suptitle(f"{replay.policy}, {settings.phase}, {settings.num_ranks} ranks")
    stream = io.BytesIO()
    # No date: the same replay gives the same bytes.
    figure.savefig(stream, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return stream.getvalue()


def _band(ax: Axes, time_T: FloatArray, load_TR: FloatArray, name: str) -> None:
    """Draw the least, mean and most loaded rank over time."""
    ax.fill_between(time_T, load_TR.min(axis=1), load_TR.max(axis=1), alpha=0.3,
                    label="least to most")  # fmt: skip
    ax.plot(time_T, load_TR.mean(axis=1), linewidth=0.8, label="mean")
    ax.set(xlabel="time, s", ylabel=name, ylim=(0, None))
    ax.legend(loc="lower right", fontsize=8)
