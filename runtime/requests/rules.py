"""Rules of other schedulers, written anew from what they document and what their code does.

All of them look at one request after the other and take a rank by a score. What they see of the
ranks may be old: a *snapshot*, taken over every so often, which overwrites what they have counted
on top of it since.
Shape letters: Q arrivals, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numba import njit
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray

__all__ = ["RULES", "RankView", "Rule", "TurnState"]

(RANDOM, ROUND_ROBIN, REQUESTS, TOKENS, KV, TWO_REQUESTS, VLLM, TENSORRT_LLM, DYNAMO,
 CACHE_AWARE) = range(10)  # fmt: skip

# vLLM v1/engine/core_client.py @00080ee: score = max(own in flight, waiting + running)
# + 6 * waiting * max(0, kv_usage - 0.5).
VLLM_WAITING, VLLM_KV_FROM = 6.0, 0.5
# sgl-model-gateway, cache_aware: prefix match from 0.3 of the prompt; shortest queue once
# max - min > 64 and max > 1.5 * min.
CACHE_MATCH, QUEUE_GAP, QUEUE_RATIO = 0.3, 64, 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RankView:
    """What ranks would say of themselves at the last step.

    Parameters
    ----------
    requests_R, waiting_R : array of int64
        Requests on the rank, and those of them that have not begun.
    tokens_R : array of float64
        Prompt tokens of its requests (decode), or tokens it has left to compute (prefill).
    kv_R : array of float64
        KV cache in use, and what waiting requests will use.
    kv_capacity : float
    alive_R : array of bool
    """

    requests_R: IntArray
    waiting_R: IntArray
    tokens_R: FloatArray
    kv_R: FloatArray
    kv_capacity: float
    alive_R: NDArray[np.bool_]


class TurnState:
    """What a rule keeps between calls: its working copy of the ranks, its turn, its own counts."""

    def __init__(self, num_ranks: int, seed: int) -> None:
        self.count_R = np.zeros(num_ranks)
        self.tokens_R = np.zeros(num_ranks)
        self.kv_R = np.zeros(num_ranks)
        self.sent_R = np.zeros(num_ranks)
        # Turn of round robin, time of the last snapshot, steps waited.
        self.turn = np.zeros(3)
        self.random = np.random.default_rng([seed, 3])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One scheduler's way of choosing a rank.

    Parameters
    ----------
    code : int
        Which score.
    refresh_s : float
        How often the snapshot is taken over; 0 means that it is never old.
    source : str
        Where the rule was read.
    """

    code: int
    refresh_s: float = 0.0
    source: str = ""

    def choose(
        self,
        view: RankView,
        state: TurnState,
        time_s_Q: FloatArray,
        tokens_Q: IntArray,
        kv_Q: IntArray,
        cached_QC: IntArray,
    ) -> IntArray:
        """Return a rank for each arrival.

        Parameters
        ----------
        view : RankView
        state : TurnState
            Of this rule and replay; changed.
        time_s_Q : array of float64
            When requests arrive, not falling.
        tokens_Q, kv_Q : array of int64
            Prompt tokens, and KV tokens they bring.
        cached_QC : array of int64, shape [Q, R] or [Q, 1]
            Tokens of the prompt that a rank has in its prefix cache.
        """
        order_Q = np.arange(len(tokens_Q))
        if self.code == TENSORRT_LLM:
            order_Q = np.argsort(-tokens_Q, kind="stable")
        draw_Q2 = state.random.random((len(tokens_Q), 2))
        return choose_in_turn(
            self.code, order_Q, time_s_Q, tokens_Q.astype(np.float64), kv_Q.astype(np.float64),
            np.ascontiguousarray(cached_QC, np.float64), draw_Q2, view.requests_R, view.waiting_R,
            view.tokens_R, view.kv_R, view.kv_capacity, view.alive_R, self.refresh_s, state.count_R,
            state.tokens_R, state.kv_R, state.sent_R, state.turn)  # fmt: skip


@njit(cache=True, nogil=True)
def choose_in_turn(
    code: int,
    order_Q: IntArray,
    time_s_Q: FloatArray,
    tokens_Q: FloatArray,
    kv_Q: FloatArray,
    cached_QC: FloatArray,
    draw_Q2: FloatArray,
    requests_R: IntArray,
    waiting_R: IntArray,
    view_tokens_R: FloatArray,
    view_kv_R: FloatArray,
    kv_capacity: float,
    alive_R: NDArray[np.bool_],
    refresh_s: float,
    count_R: FloatArray,
    tokens_R: FloatArray,
    kv_R: FloatArray,
    sent_R: FloatArray,
    turn: FloatArray,
) -> IntArray:
    """Choose ranks one request after the other; the working copies are changed."""
    per_rank = cached_QC.shape[1] > 1
    rank_Q = np.zeros(order_Q.shape[0], np.int64)
    alive = np.flatnonzero(alive_R)
    if refresh_s == 0.0:
        count_R[:] = requests_R
        tokens_R[:] = view_tokens_R
        kv_R[:] = view_kv_R
    # vLLM counts its own requests in flight exactly; other frontends there are none here.
    sent_R[:] = requests_R
    expected = np.ceil((requests_R[alive].sum() + order_Q.shape[0]) / len(alive))
    expected = max(expected, requests_R[alive].max())
    for q in order_Q:
        if refresh_s > 0.0 and time_s_Q[q] >= turn[1]:
            count_R[:] = requests_R
            tokens_R[:] = view_tokens_R
            kv_R[:] = view_kv_R
            turn[1] = (np.floor(time_s_Q[q] / refresh_s) + 1.0) * refresh_s
        best, best_score = alive[0], np.inf
        if code == RANDOM:
            best = alive[int(draw_Q2[q, 0] * len(alive))]
        elif code == ROUND_ROBIN:
            best = alive[int(turn[0]) % len(alive)]
            turn[0] += 1.0
        elif code == TWO_REQUESTS:
            first = alive[int(draw_Q2[q, 0] * len(alive))]
            second = alive[int(draw_Q2[q, 1] * len(alive))]
            best = first if count_R[first] <= count_R[second] else second
        else:
            start = int(turn[0]) if code == VLLM else 0
            matched, affine = CACHE_MATCH * tokens_Q[q], False
            if code == CACHE_AWARE and per_rank:
                least, most = count_R[alive].min(), count_R[alive].max()
                affine = not (most - least > QUEUE_GAP and most > QUEUE_RATIO * least)
                affine = affine and cached_QC[q].max() > matched
            for i in range(len(alive)):
                r = alive[(start + i) % len(alive)]
                cached = cached_QC[q, r if per_rank else 0]
                score = _score(code, tokens_Q[q], cached, count_R[r], tokens_R[r], kv_R[r],
                               sent_R[r], waiting_R[r], view_kv_R[r] / kv_capacity,
                               expected)  # fmt: skip
                if code == CACHE_AWARE and affine:
                    score = -cached
                if score < best_score:
                    best, best_score = r, score
            if code == VLLM:
                turn[0] += 1.0
        count_R[best] += 1.0
        tokens_R[best] += tokens_Q[q] - cached_QC[q, best if per_rank else 0]
        kv_R[best] += kv_Q[q]
        sent_R[best] += 1.0
        rank_Q[q] = best
    return rank_Q


@njit(cache=True, nogil=True)
def _score(
    code: int,
    tokens: float,
    cached: float,
    count: float,
    rank_tokens: float,
    kv: float,
    sent: float,
    waiting: float,
    usage: float,
    expected: float,
) -> float:
    """Return a rank's score for a request; the lowest is taken."""
    if code == TOKENS:
        return rank_tokens
    if code == KV:
        return kv + count * 1e-9
    if code == VLLM:
        return max(sent, count) + VLLM_WAITING * waiting * max(0.0, usage - VLLM_KV_FROM)
    if code == TENSORRT_LLM:
        return rank_tokens if sent < expected else np.inf
    if code == DYNAMO:
        return tokens - cached + kv
    return count


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "random": Rule(code=RANDOM, source="a rank at random"),
        "round-robin": Rule(code=ROUND_ROBIN, source="ranks in turn (SGLang, the default)"),
        "join-shortest-queue": Rule(code=REQUESTS, source="fewest requests, never old"),
        "least-tokens": Rule(code=TOKENS, source="fewest prompt tokens, never old"),
        "least-kv": Rule(code=KV, source="least KV cache, never old"),
        "power-of-two": Rule(code=TWO_REQUESTS, source="the emptier of two at random"),
        "sglang-total-requests": Rule(
            code=REQUESTS, refresh_s=0.020,
            source="SGLang 0.5.23 data_parallel_controller.py: fewest requests, a load report "
            "every 20 ms overwrites its own counts",
        ),
        "sglang-total-tokens": Rule(
            code=KV, refresh_s=0.020,
            source="SGLang 0.5.23: least KV in use and queued, requests as tie-break, the same "
            "reports",
        ),
        "vllm": Rule(
            code=VLLM, refresh_s=0.100,
            source="vLLM core_client.py @00080ee: its score, reports every 100 ms",
        ),
        "tensorrt-llm": Rule(
            code=TENSORRT_LLM,
            source="TensorRT-LLM attention DP: new requests by falling length, each to the rank "
            "with fewest prompt tokens below the expected count",
        ),
        "dynamo": Rule(
            code=DYNAMO,
            source="Dynamo KV router: prefill blocks not cached + active blocks, temperature 0",
        ),
        "cache-aware": Rule(
            code=CACHE_AWARE,
            source="sgl-model-gateway: best prefix match from 0.3 on, shortest queue where "
            "counts differ by more than 64 and 1.5x",
        ),
    }
)  # fmt: skip
