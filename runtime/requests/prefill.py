"""Prefill balancer: waiting requests to data-parallel ranks, tokens and attention both level.

DeepSeek names two goals for prefill: equal core-attention work and equal input tokens (dispatch
send) on all ranks (open-infra-index, day 6). Both are divided by their lower bounds, so that 1 is
perfect for each, and the larger is minimised.
Shape letters: Q requests, R ranks, C sizes that differ between ranks (R, or 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput
from eplb.runtime.requests.bounds import joint_bound, level_bound
from eplb.runtime.requests.cost import PrefillCost, prefill_cost
from eplb.runtime.requests.packing import NOT_PLACED, pack, refine
from eplb.runtime.requests.values import Assignment, PrefillRequest, RankState, Refused

__all__ = ["PrefillBalancer"]

# Exchanges stop when the highest rank is this close to the bound, or after so many.
GOAL = 1.004
MAX_ROUNDS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillBalancer:
    """Assigns waiting requests. Holds no state: equal calls give equal answers.

    Parameters
    ----------
    cost : PrefillCost, optional
        DeepSeek-V3 on H800-class ranks unless given.
    emphasis : float
        The Pareto knob, 0 to 1: at 0.5 both objectives weigh the same, at 0 only tokens count, at
        1 only attention.
    max_wait_s : float
        A request that has waited longer is overdue: it is placed before all others, oldest first,
        and while no rank has room for it, one rank takes nothing younger. Where requests finish
        within D seconds of being placed and k overdue ones are older, a request is placed within
        ``max_wait_s + (k + 1) * D`` seconds: the oldest keeps the first rank to itself, which is
        empty after D, and an empty rank has room for any request; then the next one is the oldest.
    kv_capacity_tokens : int, optional
        KV cache of a rank. A prompt above it is refused rather than left to wait for ever.
    cache_weight : float
        How much higher a rank may stand, in units of what a request costs there, to be preferred
        for the prefix it has cached.
    """

    cost: PrefillCost | None = None
    emphasis: float = 0.5
    max_wait_s: float = 10.0
    kv_capacity_tokens: int | None = None
    cache_weight: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.emphasis <= 1:
            raise InvalidInput(f"emphasis must be from 0 (tokens) to 1 (attention), got "
                               f"{self.emphasis}")  # fmt: skip
        if not self.max_wait_s >= 0:
            raise InvalidInput(f"max_wait_s must not be negative, got {self.max_wait_s}")
        if self.cost is None:
            object.__setattr__(self, "cost", prefill_cost())

    def assign(
        self, requests: Sequence[PrefillRequest], ranks: Sequence[RankState], *, now_s: float = 0.0
    ) -> Assignment:
        """Assign as many requests as the ranks have room for.

        Parameters
        ----------
        requests : sequence of PrefillRequest
        ranks : sequence of RankState
        now_s : float
            Present time, on the clock of ``arrival_s``. Where it lies before an arrival (a clock
            went back) that request has waited 0 s.

        Raises
        ------
        InvalidInput
            No rank, none in service, or cached tokens for another number of ranks.
        """
        return self.assign_arrays(
            np.array([q.prompt_tokens for q in requests], np.int64),
            _cached(requests, len(ranks)),
            now_s - np.array([q.arrival_s for q in requests], np.float64),
            ranks,
            [q.request_id for q in requests],
        )

    def assign_arrays(
        self,
        prompt_tokens_Q: IntArray,
        cached_tokens_QC: IntArray,
        waited_s_Q: FloatArray,
        ranks: Sequence[RankState],
        request_ids: Sequence[int | str] | None = None,
    ) -> Assignment:
        """Assign requests given as arrays; :meth:`assign` for those who hold arrays already."""
        assert self.cost is not None
        table = np.array(
            [(r.tokens, r.work_s, r.kv_free_tokens, r.free_requests, r.speed) for r in ranks],
            np.float64,
        ).reshape(len(ranks), 5)
        speed_R = table[:, 4]
        alive_R = speed_R > 0
        if not alive_R.any():
            raise InvalidInput(
                f"no rank in service among {len(ranks)}; give at least one with a positive speed"
            )
        tokens_QC = np.maximum(prompt_tokens_Q[:, np.newaxis] - cached_tokens_QC, 1).astype(float)
        cached_QC = prompt_tokens_Q[:, np.newaxis] - tokens_QC
        work_QC = self.cost.pair_s * (tokens_QC * cached_QC + tokens_QC * (tokens_QC + 1) / 2)
        work_QC += self.cost.context_s * prompt_tokens_Q[:, np.newaxis]

        able_Q = np.ones(len(prompt_tokens_Q), np.bool_)
        if self.kv_capacity_tokens is not None:
            able_Q = prompt_tokens_Q <= self.kv_capacity_tokens
        candidates = np.flatnonzero(able_Q)
        tokens_bound = level_bound(
            tokens_QC[able_Q].min(axis=1), table[alive_R, 0], speed_R[alive_R]
        )
        work_bound = level_bound(work_QC[able_Q].min(axis=1), table[alive_R, 1], speed_R[alive_R])
        # Equal weights at 0.5; the dimension that is asked for less than fully bends first.
        tokens_unit = min(1.0, 2 - 2 * self.emphasis) / (tokens_bound or 1.0)
        work_unit = min(1.0, 2 * self.emphasis) / (work_bound or 1.0)
        tokens_QC, work_QC = tokens_QC * tokens_unit, work_QC * work_unit

        overdue_Q = waited_s_Q > self.max_wait_s
        size_Q = np.maximum(tokens_QC.max(axis=1), work_QC.max(axis=1))
        order_Q = np.lexsort((-size_Q, np.where(overdue_Q, -waited_s_Q, 0.0), ~overdue_Q))
        order_Q = order_Q[able_Q[order_Q]] if len(candidates) < len(able_Q) else order_Q
        tokens_R = np.where(alive_R, table[:, 0], 0.0) * tokens_unit
        work_R = np.where(alive_R, table[:, 1], 0.0) * work_unit
        kv_free_R = np.where(alive_R, table[:, 2], -1).astype(np.int64)
        places_R = np.where(alive_R, table[:, 3], 0).astype(np.int64)
        slowness_R = 1 / np.where(alive_R, speed_R, 1.0)
        bound = max(tokens_bound * tokens_unit, work_bound * work_unit)
        if candidates.size and bound > 0 and (speed_R[alive_R] == speed_R[alive_R][0]).all():
            speed = speed_R[alive_R][0]
            bound = joint_bound(
                tokens_QC[able_Q].min(axis=1) / speed, work_QC[able_Q].min(axis=1) / speed,
                tokens_R[alive_R] / speed, work_R[alive_R] / speed, bound)  # fmt: skip
        rank_Q = pack(order_Q, overdue_Q, tokens_QC, work_QC, prompt_tokens_Q, tokens_R, work_R,
                      kv_free_R, places_R, slowness_R, self.cache_weight)  # fmt: skip
        refine(rank_Q, tokens_QC, work_QC, prompt_tokens_Q, tokens_R, work_R, kv_free_R, places_R,
               slowness_R, GOAL * bound, MAX_ROUNDS)  # fmt: skip

        complete = bool((rank_Q[candidates] != NOT_PLACED).all())
        level = float((np.maximum(tokens_R, work_R) * slowness_R)[alive_R].max())
        return Assignment(
            rank_Q=rank_Q,
            refused=self._refusals(able_Q, prompt_tokens_Q, request_ids),
            tokens_max=float((tokens_R * slowness_R)[alive_R].max()) / (tokens_unit or 1.0),
            tokens_bound=tokens_bound,
            work_max_s=float((work_R * slowness_R)[alive_R].max()) / (work_unit or 1.0),
            work_bound_s=work_bound,
            objective=level,
            bound=bound if complete else 0.0,
            gap=(level - bound) / bound if complete and bound > 0 else 0.0,
        )

    def _refusals(
        self,
        able_Q: NDArray[np.bool_],
        prompt_tokens_Q: IntArray,
        request_ids: Sequence[int | str] | None,
    ) -> tuple[Refused, ...]:
        return tuple(
            Refused(
                request_id=q if request_ids is None else request_ids[q],
                reason=f"its prompt of {prompt_tokens_Q[q]} tokens is larger than the KV cache of "
                f"a rank ({self.kv_capacity_tokens} tokens)",
            )
            for q in np.flatnonzero(~able_Q).tolist()
        )


def _cached(requests: Sequence[PrefillRequest], num_ranks: int) -> IntArray:
    """Return cached tokens, shape [Q, 1], or [Q, R] where they differ between ranks."""
    cached = [q.cached_tokens for q in requests]
    if all(isinstance(c, int) for c in cached):
        return np.array(cached, np.int64).reshape(-1, 1)
    rows = [(c,) * num_ranks if isinstance(c, int) else c for c in cached]
    for request, row in zip(requests, rows, strict=True):
        if len(row) != num_ranks:
            raise InvalidInput(
                f"request {request.request_id!r} has cached tokens for {len(row)} ranks of "
                f"{num_ranks}; give one figure a rank"
            )
    return np.array(rows, np.int64).reshape(-1, num_ranks)
