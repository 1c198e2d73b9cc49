"""Tells a jump of the traffic from its usual drift, with a stated rate of false alarms.

Traffic always drifts, so a test for any change alarms all the time. A jump is a change between two
short stretches of steps that is large beside the changes that the same stream showed before. Loads
are looked at as parts of a few kinds of traffic (:mod:`eplb.placement.forecast`), in which a new
mix stands out of the noise of single experts, and changes are measured against their covariance
over the stream (Hotelling, Ann. Math. Stat. 2, 1931). The newest block of steps is scored by its
largest change; so is every earlier block, each against the covariance of the steps away from it,
so that under no jump the newest is one of many alike. Logarithms of these maxima are near enough
normal, and whether the newest belongs to them is the t test for a further observation.

Shape letters: W windows, F factors, B blocks, D pairs of stretches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.placement.forecast import FACTOR_WINDOWS, NUM_FACTORS, traffic_parts
from eplb.placement.windows import scaled_windows

__all__ = ["FALSE_ALARM_RATE", "Jump", "find_jump"]

# At each decision, where the stream has no jump.
FALSE_ALARM_RATE = 0.01
# Steps of each of the two stretches.
STRETCH_STEPS = 8
# Earlier blocks without which there is nothing to compare with.
MIN_BLOCKS = 4
# Part of the mean variance that is added to the covariance: kinds of traffic that never changed.
RIDGE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Jump:
    """What the newest steps of a stream say.

    Parameters
    ----------
    found : bool
        The p value is at most the rate of false alarms.
    p_value : float
        1 where the stream is too short to tell.
    step : int or None
        The window from which on the traffic is another one, where a jump was found.
    """

    found: bool
    p_value: float
    step: int | None = None


def find_jump(
    profile: LoadProfile, num_new: int, *, false_alarm_rate: float = FALSE_ALARM_RATE
) -> Jump:
    """Test whether the traffic jumped within the newest windows of a stream.

    Parameters
    ----------
    profile : LoadProfile
        The past, oldest window first.
    num_new : int
        Windows since the last test. A jump is found once ``STRETCH_STEPS`` windows followed it, so
        also the last windows of the block before are looked at.
    false_alarm_rate : float
        Probability of an alarm at one test of a stream without jumps.

    Raises
    ------
    InvalidInput
        ``num_new`` is below 1, or the rate is not between 0 and 1.
    """
    if num_new < 1:
        raise InvalidInput(f"num_new must be at least 1 window, got {num_new}")
    if not 0 < false_alarm_rate < 1:
        raise InvalidInput(f"false_alarm_rate must be between 0 and 1, got {false_alarm_rate}")
    kept = profile.windows(max(profile.num_windows - FACTOR_WINDOWS, 0), None)
    first = profile.num_windows - kept.num_windows
    num_blocks = (kept.num_windows - 2 * STRETCH_STEPS + 1) // num_new
    if num_blocks <= MIN_BLOCKS or kept.num_windows < 4 * NUM_FACTORS:
        return Jump(found=False, p_value=1.0)
    part_WF, _ = traffic_parts(scaled_windows(kept, 1), NUM_FACTORS)
    start_D, change_DF = _changes(np.sqrt(part_WF.astype(np.float64)))
    block_D = (start_D.max() - start_D) // num_new
    size_D = _sizes(change_DF, block_D)
    largest_B = np.array([size_D[block_D == b].max() for b in range(num_blocks)])
    p_value = _p_value(np.log(np.maximum(largest_B, np.finfo(float).tiny)))
    if p_value > false_alarm_rate:
        return Jump(found=False, p_value=p_value)
    newest = np.flatnonzero(block_D == 0)
    step = first + int(start_D[newest[size_D[newest].argmax()]])
    return Jump(found=True, p_value=p_value, step=step)


def _changes(point_WF: FloatArray) -> tuple[IntArray, FloatArray]:
    """Return where each second stretch starts, and the change of means from the first, [D, F]."""
    size = STRETCH_STEPS
    total = np.concatenate([np.zeros((1, point_WF.shape[1])), np.cumsum(point_WF, axis=0)])
    start_D = np.arange(size, len(point_WF) - size + 1)
    change_DF = total[start_D + size] - 2 * total[start_D] + total[start_D - size]
    return start_D, change_DF / size


def _sizes(change_DF: FloatArray, block_D: IntArray) -> FloatArray:
    """Return the squared size of each change, by the covariance of those away from its block."""
    size_D = np.zeros(len(change_DF))
    for block in np.unique(block_D):
        inside = np.flatnonzero(block_D == block)
        away = np.ones(len(change_DF), np.bool_)
        away[max(inside[0] - 2 * STRETCH_STEPS, 0) : inside[-1] + 2 * STRETCH_STEPS + 1] = False
        covariance_FF = change_DF[away].T @ change_DF[away] / max(int(away.sum()), 1)
        least = RIDGE * np.trace(covariance_FF) / len(covariance_FF)
        covariance_FF += max(least, np.finfo(float).tiny) * np.eye(len(covariance_FF))
        whitened_FD = np.linalg.solve(covariance_FF, change_DF[inside].T)
        size_D[inside] = np.einsum("df,fd->d", change_DF[inside], whitened_FD)
    return size_D


def _p_value(value_B: FloatArray) -> float:
    """Return the one-sided p value of the first number being like the others."""
    from scipy.stats import t  # noqa: PLC0415  (takes a second to import)

    others = value_B[1:]
    spread = float(others.std(ddof=1)) * np.sqrt(1 + 1 / len(others))
    if spread == 0.0:
        return 1.0 if value_B[0] <= others[0] else 0.0
    return float(t.sf((value_B[0] - others.mean()) / spread, len(others) - 1))
