"""Decode balancer: prefilled requests to data-parallel ranks, KV cache and counts both level.

DeepSeek names two goals for decode: equal KV cache use and equal request counts (dispatch send) on
all ranks (open-infra-index, day 6). Requests stay where they are placed and leave at times nobody
knows, so levelling goes on all the time: arrivals of a step are placed together, largest first, to
ranks within a band of counts, the one with least KV; and where that is not enough, running requests
are exchanged one for one, which moves KV and leaves counts as they are.
Shape letters: Q arrivals, R ranks, M places of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput
from eplb.runtime.requests.cost import DecodeCost
from eplb.runtime.requests.decode_kernels import NOT_PLACED, find_swaps, place_arrivals
from eplb.runtime.requests.values import DecodeRequest, Placed, Refused, Swap

__all__ = ["DecodeBalancer", "DecodeOptions"]

# Until requests have finished, how long one is taken to go on, in steps.
FIRST_RESIDUAL_STEPS = 100.0
# Part of that time for which an exchange is taken to help: ranks change all the time, and the
# fullest is then another one.
LASTING_PART = 0.1
# Weight of the newest finished request in the running mean of lengths.
LENGTH_WEIGHT = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOptions:
    """How a decode balancer weighs things.

    Parameters
    ----------
    count_slack : float
        The Pareto knob: how far above the mean count a rank may go, rounded up to a whole request.
        0 keeps counts as level as they can be; more gives KV more choice.
    reserve_tokens : int
        Room that each running request of a rank keeps to grow into, when one more is admitted.
    max_wait_steps : int
        A request that has waited longer is placed before all others, oldest first, and while no
        rank has room for it one rank takes nothing else: with outputs of at most D steps and k
        older overdue requests it is placed within ``max_wait_steps + (k + 1) * D`` steps (as in
        ``PrefillBalancer``).
    max_swaps : int
        Exchanges a step; 0 where the engine cannot move running requests.
    max_swap_steps : int
        Steps that a transfer may take. Several small ones bring a full rank down sooner than a
        large one, which helps only at its end.
    kv_band : float
        Ranks above the mean by more than this look for an exchange.
    link_bytes_per_s : float
        What a rank sends to another node.
    exposed : float
        Part of a transfer that slows a step down although the link is idle while ranks compute. An
        assumption: measure it, and set it, for the network at hand.
    """

    count_slack: float = 0.0
    reserve_tokens: int = 64
    max_wait_steps: int = 200
    max_swaps: int = 8
    max_swap_steps: int = 1
    kv_band: float = 0.03
    link_bytes_per_s: float = 50e9
    exposed: float = 0.05

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InvalidInput(f"{name} must be a number from 0 on, got {value!r}")
        if self.link_bytes_per_s == 0:
            raise InvalidInput("link_bytes_per_s must be positive; use max_swaps=0 for no swaps")


class DecodeBalancer:
    """Places decode requests and keeps account of them. Not thread-safe: see ``Guarded``.

    Call ``place`` with the arrivals of each step, ``finished`` for each request that is done, and
    ``advance`` once a step; then ``plan_swaps``, and ``swapped`` for what was carried out.

    Parameters
    ----------
    num_ranks : int
    kv_capacity_tokens : int
        KV cache of a rank.
    max_requests : int
        Running requests of a rank.
    cost : DecodeCost, optional
        Prices swaps; without it there are none.
    options : DecodeOptions, optional

    Raises
    ------
    InvalidInput
        Sizes below 1.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        kv_capacity_tokens: int,
        max_requests: int,
        cost: DecodeCost | None = None,
        options: DecodeOptions | None = None,
    ) -> None:
        for name, value in (
            ("num_ranks", num_ranks),
            ("kv_capacity_tokens", kv_capacity_tokens),
            ("max_requests", max_requests),
        ):
            if value < 1:
                raise InvalidInput(f"{name} must be at least 1, got {value}")
        self.options = options or DecodeOptions()
        self.cost = cost
        self.max_requests = max_requests
        self.step = 0
        self._capacity_R = np.full(num_ranks, float(kv_capacity_tokens))
        self._speed_R = np.ones(num_ranks)
        self._count_R = np.zeros(num_ranks, np.int64)
        self._base_RM = np.zeros((num_ranks, max_requests), np.int64)
        self._born_RM = np.zeros((num_ranks, max_requests), np.int64)
        self._sequence_RM = np.zeros((num_ranks, max_requests), np.int64)
        self._kv_at_zero_R = np.zeros(num_ranks, np.int64)
        self._ids: list[list[int | str]] = [[] for _ in range(num_ranks)]
        self._place_of: dict[int | str, tuple[int, int]] = {}
        self._waiting: dict[int | str, tuple[int, int]] = {}
        self._sent_R = np.zeros(num_ranks, np.int64)
        self._heard_R = np.full(num_ranks, -1, np.int64)
        # What ranks report beyond what is known here: memory of aborted requests, fragmentation.
        self._more_kv_R = np.zeros(num_ranks)
        self._more_count_R = np.zeros(num_ranks, np.int64)
        self._moving_R = np.zeros(num_ranks, np.bool_)
        self._residual_steps = FIRST_RESIDUAL_STEPS

    @property
    def num_ranks(self) -> int:
        """Ranks, those out of service included."""
        return len(self._speed_R)

    @property
    def kv_tokens_R(self) -> FloatArray:
        """KV tokens on each rank."""
        return self._kv_at_zero_R + self._count_R * self.step + self._more_kv_R

    @property
    def num_requests_R(self) -> IntArray:
        """Running requests of each rank."""
        return self._count_R + self._more_count_R

    @property
    def waiting(self) -> tuple[int | str, ...]:
        """Requests that no rank had room for, oldest first."""
        return tuple(self._waiting)

    def place(
        self, requests: Sequence[DecodeRequest] = ()
    ) -> tuple[tuple[Placed, ...], tuple[Refused, ...]]:
        """Place the arrivals of a step and whatever waits; return what was placed and refused.

        Raises
        ------
        InvalidInput
            A request that is known already; nothing was placed then.
        """
        ids = [q.request_id for q in requests]
        ranks, refused = self.place_arrays(ids, [q.kv_tokens for q in requests])
        return (
            tuple(Placed(request_id=i, rank=r, sequence=s) for i, r, s in ranks),
            tuple(
                Refused(
                    request_id=i,
                    reason=f"its KV cache of {kv} tokens and {self.options.reserve_tokens} to grow "
                    f"into are larger than that of any rank ({self._capacity_R.max():.0f} tokens)",
                )
                for i, kv in refused
            ),
        )

    def place_arrays(
        self, ids: Sequence[int | str], kv_tokens: Sequence[int]
    ) -> tuple[list[tuple[int | str, int, int]], list[tuple[int | str, int]]]:
        """Do what :meth:`place` does: return (id, rank, sequence) and refused (id, KV tokens)."""
        known = [i for i in ids if i in self._place_of or i in self._waiting]
        if known or len(set(ids)) < len(ids):
            raise InvalidInput(
                f"request {known[0] if known else ids[0]!r} was placed before; ids must be unique "
                "among running and waiting requests"
            )
        refused = []
        most = self._capacity_R.max() - self.options.reserve_tokens
        for i, kv in zip(ids, kv_tokens, strict=True):
            if kv > most:
                refused.append((i, int(kv)))
            else:
                self._waiting[i] = (int(kv), self.step)
        if not self._waiting:
            return [], refused
        waiting = list(self._waiting)
        kv_Q, since_Q = np.array([self._waiting[i] for i in waiting], np.int64).T
        overdue_Q = self.step - since_Q > self.options.max_wait_steps
        order_Q = np.lexsort((-kv_Q, np.where(overdue_Q, since_Q, 0), ~overdue_Q))
        rank_Q = place_arrivals(
            order_Q, kv_Q, overdue_Q, self.kv_tokens_R, self.num_requests_R, self._capacity_R,
            self._speed_R, self.max_requests, self.options.count_slack,
            float(self.options.reserve_tokens))  # fmt: skip
        placed = []
        for q, rank in zip(order_Q.tolist(), rank_Q[order_Q].tolist(), strict=True):
            if rank != NOT_PLACED:
                kv, _ = self._waiting.pop(waiting[q])
                self._sent_R[rank] += 1
                sequence = int(self._sent_R[rank])
                self._put(waiting[q], rank, kv - self.step, self.step, sequence)
                placed.append((waiting[q], rank, sequence))
        return placed, refused

    def finished(self, request_id: int | str) -> None:
        """Note that a request has ended (done, aborted or moved away).

        Raises
        ------
        InvalidInput
            No such request is running or waiting.
        """
        if request_id in self._waiting:
            del self._waiting[request_id]
            return
        if request_id not in self._place_of:
            raise InvalidInput(
                f"request {request_id!r} is not known: it was never placed, or has finished "
                "before; send one finished message a request"
            )
        rank, m = self._place_of[request_id]
        lived = self.step - self._born_RM[rank, m]
        self._residual_steps += LENGTH_WEIGHT * (float(lived) - self._residual_steps)
        self._take(request_id)

    def advance(self, steps: int = 1) -> None:
        """Note that every running request has got a token, ``steps`` times."""
        if steps < 0:
            raise InvalidInput(f"steps must not go back, got {steps}")
        self.step += steps

    def report(self, rank: int, *, sequence: int, kv_tokens: int, num_requests: int) -> bool:
        """Take a rank's own figures; return False where they are older than ones taken before.

        Parameters
        ----------
        rank : int
        sequence : int
            The last ``Placed.sequence`` of this rank that the figures include. What was sent later
            stays counted on top of them, so a report that crosses a dispatch overwrites nothing.
        kv_tokens, num_requests : int

        Raises
        ------
        InvalidInput
            An unknown rank, or a sequence number that was never given out.
        """
        self._check_rank(rank)
        if sequence > self._sent_R[rank] or sequence < 0 or kv_tokens < 0 or num_requests < 0:
            raise InvalidInput(
                f"report of rank {rank}: sequence {sequence} of {self._sent_R[rank]} sent, "
                f"{kv_tokens} KV tokens, {num_requests} requests; figures must be from 0 on and "
                "the sequence one that was given out"
            )
        if sequence < self._heard_R[rank]:
            return False
        self._heard_R[rank] = sequence
        count = self._count_R[rank]
        seen = self._sequence_RM[rank, :count] <= sequence
        known_kv = int(self._base_RM[rank, :count][seen].sum()) + int(seen.sum()) * self.step
        self._more_kv_R[rank] = kv_tokens - known_kv
        self._more_count_R[rank] = num_requests - int(seen.sum())
        return True

    def set_speed(self, rank: int, speed: float) -> tuple[int | str, ...]:
        """Set a rank's speed (1 ordinary, less slow, 0 dead); return the requests a dead one lost.

        Those are forgotten: place them again, with the KV cache they then have.
        """
        self._check_rank(rank)
        if not 0 <= speed < float("inf"):
            raise InvalidInput(f"speed of rank {rank} must be 0 (dead) or more, got {speed}")
        self._speed_R[rank] = speed
        lost = tuple(self._ids[rank]) if speed == 0 else ()
        for request_id in lost:
            self._take(request_id)
        if speed == 0:
            self._more_kv_R[rank] = self._more_count_R[rank] = 0
        return lost

    def plan_swaps(self) -> tuple[Swap, ...]:
        """Return exchanges of running requests that pay for themselves; call once a step.

        None is carried out yet: say so with :meth:`swapped` for each of them. Until then its two
        ranks are left alone. The step gets shorter by what the fullest rank loses, for a part of
        the time that requests still last; that has to be worth the exposed part of the longest
        transfer. All are worth it together or none is.
        """
        if self.cost is None or not self.options.max_swaps:
            return ()
        oldest = min((since for _, since in self._waiting.values()), default=self.step)
        if self.step - oldest > self.options.max_wait_steps:
            # An overdue request waits for a rank to empty, which must not be filled anew.
            return ()
        before_R = self.kv_tokens_R
        after_R = before_R.copy()
        swap_X4 = find_swaps(self._base_RM, self._count_R, after_R, self._capacity_R,
                             self._speed_R, self._moving_R, self.step, self.options.kv_band,
                             self.options.max_swaps, self._idle_tokens()
                             * self.options.max_swap_steps)  # fmt: skip
        if not len(swap_X4):
            return ()
        swaps = tuple(self._swap(*row) for row in swap_X4.tolist())
        alive_R = self._speed_R > 0
        gained = (before_R[alive_R] / self._speed_R[alive_R]).max() - (
            after_R[alive_R] / self._speed_R[alive_R]
        ).max()
        lasting = LASTING_PART * self._residual_steps
        if float(gained) * self.cost.kv_token_s * lasting <= self.exposed_s(swaps):
            return ()
        for swap in swaps:
            self._moving_R[[swap.high_rank, swap.low_rank]] = True
        return swaps

    def exposed_s(self, swaps: Sequence[Swap]) -> float:
        """Return how much carrying these out at once lengthens steps, all taken together."""
        if self.cost is None:
            return 0.0
        most = max((swap.high_kv_tokens for swap in swaps), default=0)
        return self.options.exposed * most * self.cost.kv_bytes / self.options.link_bytes_per_s

    def _swap(self, high: int, i: int, low: int, j: int) -> Swap:
        """Return the exchange of two places."""
        high_kv = int(self._base_RM[high, i]) + self.step
        low_kv = int(self._base_RM[low, j]) + self.step
        return Swap(
            high_id=self._ids[high][i],
            low_id=self._ids[low][j],
            high_rank=high,
            low_rank=low,
            high_kv_tokens=high_kv,
            kv_tokens=high_kv + low_kv,
            steps=max(1, math.ceil(high_kv / self._idle_tokens())),
        )

    def _idle_tokens(self) -> float:
        """Return the KV tokens that a link can carry in a step while its rank computes."""
        assert self.cost is not None
        idle_s = self.cost.step_s(float(self.kv_tokens_R.mean()), 0.0)
        return idle_s * self.options.link_bytes_per_s / self.cost.kv_bytes

    def swapped(self, swap: Swap) -> bool:
        """Note that a swap was carried out; return False where one of the two had ended by then."""
        self._moving_R[[swap.high_rank, swap.low_rank]] = False
        for request_id, rank in ((swap.high_id, swap.high_rank), (swap.low_id, swap.low_rank)):
            if self._place_of.get(request_id, (NOT_PLACED, 0))[0] != rank:
                return False
        high, low = self._take(swap.high_id), self._take(swap.low_id)
        for request_id, (base, born), rank in (
            (swap.high_id, high, swap.low_rank),
            (swap.low_id, low, swap.high_rank),
        ):
            self._sent_R[rank] += 1
            self._put(request_id, rank, base, born, int(self._sent_R[rank]))
        return True

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.num_ranks:
            raise InvalidInput(f"rank {rank} is not one of 0 to {self.num_ranks - 1}")

    def _put(self, request_id: int | str, rank: int, base: int, born: int, sequence: int) -> None:
        m = int(self._count_R[rank])
        if m == self._base_RM.shape[1]:
            # A rank that reports fewer requests than are known here may be given more.
            self._base_RM = np.pad(self._base_RM, ((0, 0), (0, m)))
            self._born_RM = np.pad(self._born_RM, ((0, 0), (0, m)))
            self._sequence_RM = np.pad(self._sequence_RM, ((0, 0), (0, m)))
        self._base_RM[rank, m], self._born_RM[rank, m] = base, born
        self._sequence_RM[rank, m] = sequence
        self._ids[rank].append(request_id)
        self._place_of[request_id] = (rank, m)
        self._count_R[rank] += 1
        self._kv_at_zero_R[rank] += base

    def _take(self, request_id: int | str) -> tuple[int, int]:
        """Forget a running request; the last one of its rank moves into its place."""
        rank, m = self._place_of.pop(request_id)
        base, born = int(self._base_RM[rank, m]), int(self._born_RM[rank, m])
        self._count_R[rank] -= 1
        self._kv_at_zero_R[rank] -= base
        last = int(self._count_R[rank])
        moved = self._ids[rank].pop()
        if m != last:
            for array_RM in (self._base_RM, self._born_RM, self._sequence_RM):
                array_RM[rank, m] = array_RM[rank, last]
            self._ids[rank][m] = moved
            self._place_of[moved] = (rank, m)
        return base, born
