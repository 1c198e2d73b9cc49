"""A decode balancer for several threads. A prefill balancer needs none: it holds no state."""

from __future__ import annotations

from collections.abc import Sequence
from threading import RLock

from eplb.runtime.requests.cost import DecodeCost
from eplb.runtime.requests.decode import DecodeBalancer, DecodeOptions
from eplb.runtime.requests.values import DecodeRequest, Placed, Refused, Swap

__all__ = ["GuardedDecodeBalancer"]


class GuardedDecodeBalancer(DecodeBalancer):
    """A :class:`DecodeBalancer` whose every call runs by itself, whichever thread makes it."""

    def __init__(
        self,
        num_ranks: int,
        *,
        kv_capacity_tokens: int,
        max_requests: int,
        cost: DecodeCost | None = None,
        options: DecodeOptions | None = None,
    ) -> None:
        super().__init__(num_ranks, kv_capacity_tokens=kv_capacity_tokens,
                         max_requests=max_requests, cost=cost, options=options)  # fmt: skip
        self._lock = RLock()

    def place(
        self, requests: Sequence[DecodeRequest] = ()
    ) -> tuple[tuple[Placed, ...], tuple[Refused, ...]]:
        """Place arrivals, alone."""
        with self._lock:
            return super().place(requests)

    def finished(self, request_id: int | str) -> None:
        """Note that a request has ended, alone."""
        with self._lock:
            super().finished(request_id)

    def advance(self, steps: int = 1) -> None:
        """Note that steps were done, alone."""
        with self._lock:
            super().advance(steps)

    def report(self, rank: int, *, sequence: int, kv_tokens: int, num_requests: int) -> bool:
        """Take a rank's figures, alone."""
        with self._lock:
            return super().report(
                rank, sequence=sequence, kv_tokens=kv_tokens, num_requests=num_requests
            )

    def set_speed(self, rank: int, speed: float) -> tuple[int | str, ...]:
        """Set a rank's speed, alone."""
        with self._lock:
            return super().set_speed(rank, speed)

    def plan_swaps(self) -> tuple[Swap, ...]:
        """Return exchanges that pay, alone."""
        with self._lock:
            return super().plan_swaps()

    def swapped(self, swap: Swap) -> bool:
        """Note that a swap was carried out, alone."""
        with self._lock:
            return super().swapped(swap)
