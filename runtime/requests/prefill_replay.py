"""Replay of a trace on lock-step prefill ranks under one policy.

A backlog is kept: as soon as requests are done the trace gives new ones, so that the requests on
the ranks and waiting fill the wanted part of the KV caches (or of the number of requests). Each
step takes as long as its slowest rank.
Shape letters: Q requests of the workload, A active ones, R ranks, T steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.profiles.request_trace import RequestTrace
from eplb.runtime.requests.chunks import ChunkPlanner, equal_tokens
from eplb.runtime.requests.cost import PrefillCost
from eplb.runtime.requests.disturbances import Disturbances
from eplb.runtime.requests.prefill import PrefillBalancer
from eplb.runtime.requests.prefix_cache import PrefixCaches
from eplb.runtime.requests.rules import RankView, Rule, TurnState
from eplb.runtime.requests.values import RankState
from eplb.runtime.requests.workload import BLOCK_STRIDE, Capacity, Workload

__all__ = ["EplbPrefill", "PrefillLog", "PrefillPolicy", "PrefillState", "RulePrefill",
           "replay_prefill"]  # fmt: skip

# What the prefill balancer looks at of a long queue: so many requests a rank, and so many steps.
AHEAD_REQUESTS, AHEAD_STEPS = 8, 2


class PrefillState:
    """Requests in the system and what the ranks have done for them.

    Parameters
    ----------
    trace : RequestTrace
    workload : Workload
    capacity : Capacity
    caches : PrefixCaches, optional
    """

    def __init__(
        self,
        trace: RequestTrace,
        workload: Workload,
        capacity: Capacity,
        caches: PrefixCaches | None,
    ) -> None:
        count = len(workload.prompt_tokens_Q)
        self.trace, self.workload, self.capacity = trace, workload, capacity
        self.caches = caches if trace.has_blocks else None
        self.prompt_Q = workload.prompt_tokens_Q
        self.rank_Q = np.full(count, -1, np.int64)
        # Tokens found in a cache or computed: the position of the next one.
        self.position_Q = np.zeros(count, np.int64)
        self.cached_Q = np.zeros(count, np.int64)
        self.started_Q = np.zeros(count, np.bool_)
        self.submit_s_Q = np.zeros(count)
        self.finish_s_Q = np.full(count, np.nan)
        self.active_A = np.zeros(0, np.int64)
        self.alive_R = np.ones(capacity.num_ranks, np.bool_)
        self.speed_R = np.ones(capacity.num_ranks)

    def blocks(self, q: int) -> list[int]:
        """Return the prefix blocks of a request, apart from those of other copies of the trace."""
        own = self.trace.blocks(int(self.workload.trace_Q[q]))
        apart: list[int] = (own + BLOCK_STRIDE * int(self.workload.copy_Q[q])).tolist()
        return apart

    def cached_tokens(self, requests: IntArray) -> IntArray:
        """Return tokens in the ranks' caches, shape [Q, R], or [Q, 1] without caches."""
        if self.caches is None or not len(requests):
            return np.zeros((len(requests), 1), np.int64)
        blocks_QR = np.stack([self.caches.cached_blocks_R(self.blocks(q)) for q in requests])
        # The last token is always computed: its output is the first token.
        most_Q1 = self.prompt_Q[requests, np.newaxis] - 1
        tokens_QR: IntArray = np.minimum(blocks_QR * self.trace.block_tokens, most_Q1)
        return tokens_QR

    def bind(self, requests: IntArray, ranks: IntArray, cached_QC: IntArray) -> None:
        """Give requests to ranks, -1 for none yet; prefixes in the caches there are used."""
        self.rank_Q[requests] = ranks
        column = ranks if cached_QC.shape[1] > 1 else np.zeros_like(ranks)
        cached = np.where(ranks >= 0, cached_QC[np.arange(len(requests)), column], 0)
        self.cached_Q[requests] = self.position_Q[requests] = cached

    def lose(self, rank: int) -> IntArray:
        """Take a rank out of service; return its requests, which begin anew."""
        self.speed_R[rank], self.alive_R[rank] = 0.0, False
        lost: IntArray = self.active_A[self.rank_Q[self.active_A] == rank]
        self.rank_Q[lost] = -1
        self.position_Q[lost] = self.cached_Q[lost] = 0
        self.started_Q[lost] = False
        if self.caches is not None:
            self.caches.lose(rank)
        return lost


class PrefillPolicy(Protocol):
    """Decides which rank computes which request, and in what chunks."""

    def dispatch(self, state: PrefillState, new: IntArray, now_s: float) -> None:
        """Bind new requests, or any that have not started."""

    def chunks(
        self, first_R: IntArray, remaining_J: IntArray, position_J: IntArray, speed_R: FloatArray
    ) -> IntArray:
        """Return chunk sizes; requests lie rank by rank, oldest first."""


class RulePrefill:
    """A rule of another scheduler: binds at once; first come first served, equal token budgets."""

    def __init__(self, rule: Rule, capacity: Capacity, budget_tokens: int, seed: int) -> None:
        self.rule, self.capacity, self.budget_tokens = rule, capacity, budget_tokens
        self.state = TurnState(capacity.num_ranks, seed)

    def dispatch(self, state: PrefillState, new: IntArray, now_s: float) -> None:
        """Choose ranks by the rule, as requests come in."""
        if not len(new):
            return
        active, ranks = state.active_A, self.capacity.num_ranks
        bound = active[state.rank_Q[active] >= 0]
        at = state.rank_Q[bound]
        left = (state.prompt_Q[bound] - state.position_Q[bound]).astype(np.float64)
        view = RankView(
            requests_R=np.bincount(at, minlength=ranks),
            waiting_R=np.bincount(at, ~state.started_Q[bound], minlength=ranks).astype(np.int64),
            tokens_R=np.bincount(at, left, minlength=ranks).astype(np.float64),
            kv_R=np.bincount(at, state.prompt_Q[bound], minlength=ranks).astype(np.float64),
            kv_capacity=float(self.capacity.kv_tokens),
            alive_R=state.alive_R,
        )
        cached = state.cached_tokens(new)
        prompt = state.prompt_Q[new]
        chosen = self.rule.choose(view, self.state, np.full(len(new), now_s), prompt, prompt,
                                  cached)  # fmt: skip
        state.bind(new, chosen, cached)

    def chunks(
        self, first_R: IntArray, remaining_J: IntArray, position_J: IntArray, speed_R: FloatArray
    ) -> IntArray:
        """Fill each rank's token budget in order."""
        return equal_tokens(first_R, remaining_J, self.budget_tokens)


class EplbPrefill:
    """The prefill balancer and its chunk planner: requests are bound when they start.

    Without ``equal_time`` chunks are sized as other engines do, which tells the two parts apart.
    """

    def __init__(
        self, balancer: PrefillBalancer, planner: ChunkPlanner, *, equal_time: bool = True
    ) -> None:
        self.balancer, self.planner, self.equal_time = balancer, planner, equal_time

    def dispatch(self, state: PrefillState, new: IntArray, now_s: float) -> None:
        """Assign all that have not started to ranks with what those have left to do."""
        active, ranks = state.active_A, state.capacity.num_ranks
        started = active[state.started_Q[active]]
        waiting = active[~state.started_Q[active]]
        later = self._later(state, waiting)
        state.rank_Q[waiting[later:]] = -1
        waiting = waiting[:later]
        at = state.rank_Q[started]
        cost = self.planner.cost
        position = state.position_Q[started].astype(np.float64)
        left = state.prompt_Q[started] - position
        work = cost.pair_s * (left * position + left * (left + 1) / 2)
        work += cost.context_s * state.prompt_Q[started]
        tokens_R = np.bincount(at, left, minlength=ranks)
        work_R = np.bincount(at, work, minlength=ranks)
        kv_R = np.bincount(at, state.prompt_Q[started], minlength=ranks)
        count_R = np.bincount(at, minlength=ranks)
        capacity = state.capacity
        states = [
            RankState(tokens=t, work_s=w, kv_free_tokens=capacity.kv_tokens - int(kv),
                      free_requests=capacity.max_requests - int(n), speed=s)
            for t, w, kv, n, s in zip(tokens_R.tolist(), work_R.tolist(), kv_R, count_R,
                                      state.speed_R.tolist(), strict=True)
        ]  # fmt: skip
        cached = state.cached_tokens(waiting)
        assignment = self.balancer.assign_arrays(
            state.prompt_Q[waiting], cached, now_s - state.submit_s_Q[waiting], states
        )
        state.bind(waiting, assignment.rank_Q, cached)

    def _later(self, state: PrefillState, waiting: IntArray) -> int:
        """Return how many of the waiting requests, oldest first, are assigned now.

        Enough for a choice and for steps to come; those behind them would only overtake.
        """
        ranks = state.capacity.num_ranks
        ahead = np.cumsum(state.prompt_Q[waiting])
        enough = int(np.searchsorted(ahead, AHEAD_STEPS * ranks * self.planner.budget_tokens))
        return max(enough + 1, AHEAD_REQUESTS * ranks)

    def chunks(
        self, first_R: IntArray, remaining_J: IntArray, position_J: IntArray, speed_R: FloatArray
    ) -> IntArray:
        """Size chunks for equal time, or equal tokens."""
        if not self.equal_time:
            return equal_tokens(first_R, remaining_J, self.planner.budget_tokens)
        return self.planner.plan(first_R, remaining_J, position_J, speed_R)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefillLog:
    """What happened.

    Parameters
    ----------
    tokens_TR : array of int64
        New tokens each rank computed in each step.
    attention_s_TR : array of float64
        Core attention time of each rank.
    served_T : array of float64
        Prompt tokens that steps served, those found in caches included.
    speed_TR : array of float64
        0 for ranks out of service.
    wait_s_Q : array of float64
        From submission to the end of prefill, of the requests that were done.
    cached_part : float
        Part of the prompt tokens that was found in caches.
    """

    tokens_TR: IntArray
    attention_s_TR: FloatArray
    served_T: FloatArray
    speed_TR: FloatArray
    wait_s_Q: FloatArray
    cached_part: float


def replay_prefill(
    trace: RequestTrace,
    workload: Workload,
    capacity: Capacity,
    cost: PrefillCost,
    policy: PrefillPolicy,
    *,
    caches: PrefixCaches | None = None,
    disturbances: Disturbances | None = None,
) -> PrefillLog:
    """Run a policy over a workload until it has given its last request."""
    upset = disturbances or Disturbances()
    upset.check(capacity.num_ranks)
    state = PrefillState(trace, workload, capacity, caches)
    if upset.slow_rank is not None:
        state.speed_R[upset.slow_rank] = upset.slow_speed
    prompt_Q = state.prompt_Q
    most_kv = capacity.utilisation * capacity.num_ranks * capacity.kv_tokens
    most = max(1, int(capacity.utilisation * capacity.num_ranks * capacity.max_requests))
    given, now_s, resident = 0, 0.0, 0
    steps: list[tuple[IntArray, FloatArray, FloatArray, float]] = []
    while given < len(prompt_Q):
        begin = given
        while given < len(prompt_Q) and len(state.active_A) + given - begin < most and (
            resident + prompt_Q[given] <= most_kv or resident == 0
        ):  # fmt: skip
            resident += int(prompt_Q[given])
            given += 1
        new = np.arange(begin, given)
        state.submit_s_Q[new] = now_s
        state.active_A = np.concatenate([state.active_A, new])
        if upset.lost_rank is not None and len(steps) == upset.lost_step:
            new = np.concatenate([state.lose(upset.lost_rank), new])
        policy.dispatch(state, new, now_s)
        running, chunk, tokens_R, attention_R = _compute(state, policy, cost)
        own_R = (cost.token_s * tokens_R + attention_R) / np.where(state.alive_R, state.speed_R, 1)
        step_s = max(own_R.max() + cost.shared_s * tokens_R.mean(), cost.send_s * tokens_R.max())
        assert step_s > 0, "a step without work"
        now_s += float(step_s)
        fresh = prompt_Q[running] - state.cached_Q[running]
        served = float((chunk * (prompt_Q[running] / fresh)).sum())
        steps.append((tokens_R, attention_R, state.speed_R.copy(), served))
        done = running[state.position_Q[running] == prompt_Q[running]]
        state.finish_s_Q[done] = now_s
        resident -= int(prompt_Q[done].sum())
        state.active_A = state.active_A[np.isnan(state.finish_s_Q[state.active_A])]
    tokens_TR, attention_TR, speed_TR, served_T = (
        np.array(column) for column in zip(*steps, strict=True)
    )
    ended = ~np.isnan(state.finish_s_Q)
    return PrefillLog(
        tokens_TR=tokens_TR,
        attention_s_TR=attention_TR,
        served_T=served_T,
        speed_TR=speed_TR,
        wait_s_Q=(state.finish_s_Q - state.submit_s_Q)[ended],
        cached_part=float(state.cached_Q[ended].sum() / max(1, prompt_Q[ended].sum())),
    )


def _compute(
    state: PrefillState, policy: PrefillPolicy, cost: PrefillCost
) -> tuple[IntArray, IntArray, IntArray, FloatArray]:
    """Compute one step; return running requests, their chunks, and tokens and attention a rank."""
    running, first_R = _running(state)
    position = state.position_Q[running]
    chunk = policy.chunks(first_R, state.prompt_Q[running] - position, position, state.speed_R)
    some, ranks = chunk > 0, state.capacity.num_ranks
    attention = cost.pair_s * (chunk * position + chunk * (chunk + 1) / 2)
    attention += cost.context_s * (position + chunk)
    at = state.rank_Q[running]
    tokens_R = np.bincount(at, chunk, minlength=ranks).astype(np.int64)
    attention_R = np.bincount(at[some], attention[some], minlength=ranks).astype(np.float64)
    state.started_Q[running[some]] = True
    state.position_Q[running] += chunk
    if state.caches is not None:
        for q in running[some].tolist():
            whole = int(state.position_Q[q]) // state.trace.block_tokens
            state.caches.add(int(state.rank_Q[q]), state.blocks(q)[:whole])
    return running, chunk, tokens_R, attention_R


def _running(state: PrefillState) -> tuple[IntArray, IntArray]:
    """Return the requests that ranks have room for, rank by rank, and where each rank begins.

    Started ones first, then in order of submission. A rank holds whole prompts; whoever does not
    fit waits there, and nobody overtakes.
    """
    capacity = state.capacity
    bound = state.active_A[state.rank_Q[state.active_A] >= 0]
    order = np.lexsort((bound, ~state.started_Q[bound], state.rank_Q[bound]))
    bound = bound[order]
    at = state.rank_Q[bound]
    first_R = np.searchsorted(at, np.arange(capacity.num_ranks + 1))
    total = np.concatenate([[0], np.cumsum(state.prompt_Q[bound])])
    used = total[1:] - total[first_R[at]]
    place = np.arange(len(bound)) - first_R[at]
    fits = (used <= capacity.kv_tokens) & (place < capacity.max_requests)
    running = bound[fits]
    return running, np.searchsorted(state.rank_Q[running], np.arange(capacity.num_ranks + 1))
