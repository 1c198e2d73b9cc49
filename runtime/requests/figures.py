"""What a replay is scored by: balance of both objectives, step time, throughput, latency.

Shape letters: T steps, R ranks, Q requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eplb.arrays import FloatArray
from eplb.errors import InvalidInput
from eplb.runtime.requests.cost import DecodeCost, PrefillCost
from eplb.runtime.requests.decode_replay import DecodeLog
from eplb.runtime.requests.prefill_replay import PrefillLog

__all__ = ["decode_figures", "decode_step_s", "over_seeds", "prefill_figures", "prefill_step_s"]

# Two-sided 95% points of Student's t by degrees of freedom, 1 to 9; above, the last is on the safe
# side.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def imbalance_T(load_TR: FloatArray, speed_TR: FloatArray) -> FloatArray:
    """Return max / mean over the ranks in service, for each step in which there is any load."""
    alive_TR = speed_TR > 0
    most = np.where(alive_TR, load_TR, 0).max(axis=1)
    mean = np.where(alive_TR, load_TR, 0).sum(axis=1) / np.maximum(1, alive_TR.sum(axis=1))
    result: FloatArray = most[mean > 0] / mean[mean > 0]
    return result


def decode_step_s(log: DecodeLog, cost: DecodeCost) -> tuple[FloatArray, FloatArray]:
    """Return each step's time on the average rank and as it is, on the slowest in each phase."""
    alive_TR = log.speed_TR > 0
    slow_TR = np.where(alive_TR, 1 / np.where(alive_TR, log.speed_TR, 1), 0.0)
    count_T = alive_TR.sum(axis=1)
    kv_TR, requests_TR = log.kv_TR * slow_TR, log.requests_TR * slow_TR
    mean_T = cost.fixed_s + (
        cost.kv_token_s * kv_TR.sum(axis=1) + cost.request_s * requests_TR.sum(axis=1)
    ) / np.maximum(1, count_T)
    step_T = cost.fixed_s + log.exposed_s_T
    step_T += cost.kv_token_s * kv_TR.max(axis=1) + cost.request_s * requests_TR.max(axis=1)
    return mean_T, step_T


def decode_figures(log: DecodeLog, cost: DecodeCost, warm_up: int) -> dict[str, float]:
    """Return the figures of the steps after the warm-up.

    ``step_balance`` is the sum of steps as the average rank has them over the sum as they are: what
    is missing to 1 is time that the average rank waits. Time per output token is of requests that
    began after the warm-up and ended; 0 where none did.

    Raises
    ------
    InvalidInput
        Nothing ran after the warm-up.
    """
    mean_T, step_T = decode_step_s(log, cost)
    measured = slice(warm_up, None)
    if not log.requests_TR[measured].any():
        raise InvalidInput(
            "no request runs after the warm-up; the trace is too thin for this deployment: raise "
            "the utilisation or lower the number of ranks"
        )
    speed_TR = log.speed_TR[measured]
    clock = np.concatenate([[0.0], np.cumsum(step_T)])
    done = (log.first_step_Q >= warm_up) & (log.last_step_Q >= 0)
    if not done.any():
        done = log.last_step_Q >= 0
    first, last = log.first_step_Q[done], log.last_step_Q[done]
    per_token = (clock[last + 1] - clock[np.maximum(first, 0)]) / (last + 1 - np.maximum(first, 0))
    # A request that arrives during a step cannot begin before its end.
    waited = np.maximum(first - np.floor(log.arrival_Q[done]) - 1, 0) * log.nominal_step_s
    kv = imbalance_T(log.kv_TR[measured].astype(float), speed_TR)
    requests = imbalance_T(log.requests_TR[measured].astype(float), speed_TR)
    total_T = log.requests_TR[measured].sum(axis=1)
    alive_T = (speed_TR > 0).sum(axis=1)
    least = np.ceil(total_T / alive_T) * alive_T / np.maximum(1, total_T)
    steps = len(log.exposed_s_T)
    return {
        "kv_imbalance_mean": float(kv.mean()),
        "kv_imbalance_p99": float(np.quantile(kv, 0.99)),
        "requests_imbalance_mean": float(requests.mean()),
        "requests_imbalance_p99": float(np.quantile(requests, 0.99)),
        "requests_imbalance_bound": float(least.mean()),
        "step_balance": float(mean_T[measured].sum() / step_T[measured].sum()),
        "tokens_per_s": float(total_T.sum() / step_T[measured].sum()),
        "step_s_mean": float(step_T[measured].mean()),
        "time_per_output_token_s_p50": _quantile(per_token, 0.5),
        "time_per_output_token_s_p99": _quantile(per_token, 0.99),
        "wait_s_p99": _quantile(waited, 0.99),
        "requests_mean": float(log.requests_TR[measured].mean()),
        "kv_tokens_mean": float(log.kv_TR[measured].mean()),
        "retractions": float(log.retractions),
        "moved_kv_tokens_per_step": log.moved_kv_tokens / steps,
    }


def prefill_step_s(log: PrefillLog, cost: PrefillCost) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return each step's time on the average rank, as it is, and the part its slowest rank owns."""
    alive_TR = log.speed_TR > 0
    speed_TR = np.where(alive_TR, log.speed_TR, 1.0)
    count_T = np.maximum(1, alive_TR.sum(axis=1))
    own_TR = (cost.token_s * log.tokens_TR + log.attention_s_TR) / speed_TR
    tokens_T = log.tokens_TR.sum(axis=1) / count_T
    shared_T = cost.shared_s * tokens_T
    mean_T = np.maximum(own_TR.sum(axis=1) / count_T + shared_T, cost.send_s * tokens_T)
    step_T = np.maximum(own_TR.max(axis=1) + shared_T, cost.send_s * log.tokens_TR.max(axis=1))
    own_T: FloatArray = own_TR.max(axis=1)
    return mean_T, step_T, own_T


def prefill_figures(log: PrefillLog, cost: PrefillCost, warm_up: int) -> dict[str, float]:
    """Return the figures of the steps after the warm-up.

    ``step_balance`` as in decode; ``own_balance`` leaves out the routed experts, which all ranks
    share, and so shows only what requests decide.
    """
    mean_T, step_T, own_max_T = prefill_step_s(log, cost)
    measured = slice(warm_up, None)
    speed_TR = log.speed_TR[measured]
    speed = np.where(speed_TR > 0, speed_TR, 1.0)
    own_TR = (cost.token_s * log.tokens_TR[measured] + log.attention_s_TR[measured]) / speed
    own_mean = own_TR.sum(axis=1) / np.maximum(1, (speed_TR > 0).sum(axis=1))
    tokens = imbalance_T(log.tokens_TR[measured].astype(float), speed_TR)
    attention = imbalance_T(log.attention_s_TR[measured], speed_TR)
    return {
        "attention_imbalance_mean": float(attention.mean()),
        "attention_imbalance_p99": float(np.quantile(attention, 0.99)),
        "tokens_imbalance_mean": float(tokens.mean()),
        "tokens_imbalance_p99": float(np.quantile(tokens, 0.99)),
        "step_balance": float(mean_T[measured].sum() / step_T[measured].sum()),
        "own_balance": float(own_mean.sum() / own_max_T[measured].sum()),
        "tokens_per_s": float(log.served_T[measured].sum() / step_T[measured].sum()),
        "step_s_mean": float(step_T[measured].mean()),
        "tokens_per_step_mean": float(log.tokens_TR[measured].mean()),
        "wait_s_p50": _quantile(log.wait_s_Q, 0.5),
        "wait_s_p99": _quantile(log.wait_s_Q, 0.99),
        "cached_part": log.cached_part,
    }


def _quantile(values: FloatArray, q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else 0.0


def over_seeds(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return means over seeds, and the half width of the 95% interval of each main figure."""
    means = {name: float(np.mean([f[name] for f in figures])) for name in figures[0]}
    count = len(figures)
    if count > 1:
        t = T_95[min(count - 1, len(T_95)) - 1]
        for name in ("kv_imbalance_mean", "requests_imbalance_mean", "attention_imbalance_mean",
                     "tokens_imbalance_mean", "step_balance", "tokens_per_s"):  # fmt: skip
            if name in means:
                spread = np.std([f[name] for f in figures], ddof=1)
                means[f"{name}_ci95"] = float(t * spread / np.sqrt(count))
    return means
