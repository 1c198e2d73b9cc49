"""Replay of a trace on lock-step decode ranks under one policy.

Time runs in steps of nominal length: what a step costs where all ranks are equally full. So every
policy meets the same requests at the same steps and holds the same number of them, and what differs
is how long its steps are.
Shape letters: Q requests, R ranks, T steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.runtime.requests.cost import DecodeCost
from eplb.runtime.requests.decode import DecodeBalancer, DecodeOptions
from eplb.runtime.requests.decode_ranks import DecodeRanks
from eplb.runtime.requests.disturbances import Disturbances
from eplb.runtime.requests.rules import RankView, Rule, TurnState
from eplb.runtime.requests.values import Swap
from eplb.runtime.requests.workload import Capacity, Workload

__all__ = ["DecodeLog", "DecodePolicy", "EplbDecode", "RuleDecode", "replay_decode"]


class DecodePolicy(Protocol):
    """Decides where requests run. Requests are named by their index in the workload."""

    def dispatch(self, ranks: DecodeRanks, requests: IntArray, time_s: FloatArray) -> None:
        """Take the arrivals of a step while it runs."""

    def settle(
        self, ranks: DecodeRanks, step: int, ended: IntArray, retracted: IntArray
    ) -> tuple[float, int]:
        """Act between two steps; return seconds that transfers add, and KV tokens moved."""

    def lose(self, rank: int) -> None:
        """Learn that a rank is out of service."""


class RuleDecode:
    """A rule of another scheduler: sends at once, and the rank queues."""

    def __init__(self, rule: Rule, capacity: Capacity, seed: int) -> None:
        self.rule, self.capacity = rule, capacity
        self.state = TurnState(capacity.num_ranks, seed)
        self.alive_R = np.ones(capacity.num_ranks, np.bool_)

    def dispatch(self, ranks: DecodeRanks, requests: IntArray, time_s: FloatArray) -> None:
        """Choose ranks by the rule."""
        if not len(requests):
            return
        view = RankView(
            requests_R=ranks.running_R + ranks.waiting_R,
            waiting_R=ranks.waiting_R,
            tokens_R=ranks.prompt_R.astype(np.float64),
            kv_R=ranks.kv_with_queue_R(),
            kv_capacity=float(self.capacity.kv_tokens),
            alive_R=self.alive_R,
        )
        prompt = ranks.prompt_Q[requests]
        chosen = self.rule.choose(
            view, self.state, time_s, prompt, prompt + ranks.done_Q[requests],
            np.zeros((len(requests), 1), np.int64),
        )  # fmt: skip
        ranks.send(requests, chosen)

    def settle(
        self, ranks: DecodeRanks, step: int, ended: IntArray, retracted: IntArray
    ) -> tuple[float, int]:
        """Leave what was put back to the rank's own queue."""
        ranks.send(retracted, ranks.rank_Q[retracted])
        return 0.0, 0

    def lose(self, rank: int) -> None:
        """Send nothing there any more."""
        self.alive_R[rank] = False


class EplbDecode:
    """The decode balancer, as an engine would call it."""

    def __init__(
        self,
        capacity: Capacity,
        cost: DecodeCost,
        options: DecodeOptions,
        disturbances: Disturbances,
    ) -> None:
        self.balancer = DecodeBalancer(
            capacity.num_ranks, kv_capacity_tokens=capacity.kv_tokens,
            max_requests=capacity.max_requests, cost=cost, options=options,
        )  # fmt: skip
        if disturbances.slow_rank is not None:
            self.balancer.set_speed(disturbances.slow_rank, disturbances.slow_speed)
        self.arrived: list[int] = []
        self.moving: dict[int, list[Swap]] = {}
        self.unheard: list[IntArray] = [
            np.zeros(0, np.int64) for _ in range(disturbances.feedback_steps)
        ]

    def dispatch(self, ranks: DecodeRanks, requests: IntArray, time_s: FloatArray) -> None:
        """Hold the arrivals until the step ends."""
        self.arrived += requests.tolist()

    def settle(
        self, ranks: DecodeRanks, step: int, ended: IntArray, retracted: IntArray
    ) -> tuple[float, int]:
        """Hear what ended, place the arrivals, exchange."""
        balancer = self.balancer
        if step >= 0:
            balancer.advance()
        self.unheard.append(ended)
        for q in [*self.unheard.pop(0).tolist(), *retracted.tolist()]:
            balancer.finished(q)
        arrived = [*retracted.tolist(), *self.arrived]
        kv = (ranks.prompt_Q[arrived] + ranks.done_Q[arrived]).tolist()
        self.arrived = []
        placed, _ = balancer.place_arrays(arrived, kv)
        if placed:
            request, rank, _ = np.array(placed, np.int64).T
            ranks.send(request, rank)
        for swap in self.moving.pop(step, []):
            # One of the two may have ended while it was copied.
            if balancer.swapped(swap):
                ranks.exchange(int(swap.high_id), int(swap.low_id), step + 1)
        swaps = balancer.plan_swaps()
        for swap in swaps:
            self.moving.setdefault(step + swap.steps, []).append(swap)
        return balancer.exposed_s(swaps), sum(swap.kv_tokens for swap in swaps)

    def lose(self, rank: int) -> None:
        """Have the balancer forget the rank; its requests come again."""
        self.balancer.set_speed(rank, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeLog:
    """What happened.

    Parameters
    ----------
    kv_TR, requests_TR : array of int64
        KV tokens and running requests during each step.
    exposed_s_T : array of float64
        What transfers added to it.
    speed_TR : array of float64
        0 for ranks out of service.
    moved_kv_tokens : int
    swaps : int
        Steps with exchanges.
    retractions : int
    first_step_Q, last_step_Q, arrival_Q : array
        When requests began and ended, -1 where they did not; when they arrived, in steps.
    output_tokens_Q : array of int64
    nominal_step_s : float
    """

    kv_TR: IntArray
    requests_TR: IntArray
    exposed_s_T: FloatArray
    speed_TR: FloatArray
    moved_kv_tokens: int
    retractions: int
    first_step_Q: IntArray
    last_step_Q: IntArray
    arrival_Q: FloatArray
    output_tokens_Q: IntArray
    nominal_step_s: float


def replay_decode(
    workload: Workload,
    capacity: Capacity,
    cost: DecodeCost,
    policy: DecodePolicy,
    *,
    num_steps: int,
    seed: int,
    disturbances: Disturbances | None = None,
) -> DecodeLog:
    """Run a policy over a workload."""
    upset = disturbances or Disturbances()
    upset.check(capacity.num_ranks)
    output_Q = _with_aborts(workload, upset.abort_part, seed)
    ranks = DecodeRanks(capacity.num_ranks, capacity.max_requests, capacity.kv_tokens,
                        workload.prompt_tokens_Q, output_Q)  # fmt: skip
    kv_TR = np.zeros((num_steps, capacity.num_ranks), np.int64)
    requests_TR, exposed_s_T = np.zeros_like(kv_TR), np.zeros(num_steps)
    speed_TR = np.ones((num_steps, capacity.num_ranks))
    if upset.slow_rank is not None:
        speed_TR[:, upset.slow_rank] = upset.slow_speed
    warm = np.arange(workload.num_warm)
    ranks.done_Q[warm] = workload.done_warm_Q
    per_rank = workload.num_warm / capacity.num_ranks
    kv = (workload.prompt_tokens_Q[warm] + workload.done_warm_Q).sum() / capacity.num_ranks
    nominal_s = cost.step_s(float(kv), per_rank)
    none = np.zeros(0, np.int64)
    order = np.random.default_rng([seed, 4]).permutation(workload.num_warm)
    policy.dispatch(ranks, order, np.linspace(-nominal_s, 0, workload.num_warm, endpoint=False))
    policy.settle(ranks, -1, none, none)
    ranks.admit(0)
    bounds = np.searchsorted(workload.arrival_Q[workload.num_warm :], np.arange(num_steps + 1))
    bounds += workload.num_warm
    moved, again = 0, none
    for step in range(num_steps):
        if upset.lost_rank is not None and step >= upset.lost_step:
            speed_TR[step, upset.lost_rank] = 0.0
            if step == upset.lost_step:
                again = ranks.lose(upset.lost_rank, step)
                policy.lose(upset.lost_rank)
        kv_TR[step], requests_TR[step] = ranks.kv_R, ranks.running_R
        arrived = np.concatenate([again, np.arange(bounds[step], bounds[step + 1])])
        time = np.maximum(workload.arrival_Q[arrived], step) * nominal_s
        policy.dispatch(ranks, arrived, time)
        again = none
        ended, retracted = ranks.advance(step)
        exposed_s_T[step], more = policy.settle(ranks, step, ended, retracted)
        moved += more
        ranks.admit(step + 1)
    return DecodeLog(
        kv_TR=kv_TR, requests_TR=requests_TR, exposed_s_T=exposed_s_T, speed_TR=speed_TR,
        moved_kv_tokens=moved, retractions=ranks.retractions, first_step_Q=ranks.first_step_Q,
        last_step_Q=ranks.last_step_Q, arrival_Q=workload.arrival_Q, output_tokens_Q=output_Q,
        nominal_step_s=nominal_s,
    )  # fmt: skip


def _with_aborts(workload: Workload, part: float, seed: int) -> IntArray:
    """Return output lengths with some requests cut off early."""
    output_Q = workload.output_tokens_Q.copy()
    if part > 0:
        rng = np.random.default_rng([seed, 5])
        cut = rng.random(len(output_Q)) < part
        cut[: workload.num_warm] = False
        output_Q[cut] = np.maximum(1, output_Q[cut] * rng.random(int(cut.sum()))).astype(np.int64)
    return output_Q
