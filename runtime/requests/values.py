"""What goes into the request balancers and what comes out: frozen value objects.

Shape letters: Q requests of one call, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eplb.arrays import IntArray
from eplb.errors import InvalidInput

__all__ = [
    "Assignment",
    "DecodeRequest",
    "Placed",
    "PrefillRequest",
    "RankState",
    "Refused",
    "Swap",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRequest:
    """A request that waits for prefill.

    Parameters
    ----------
    request_id : int or str
    prompt_tokens : int
        At least 1.
    cached_tokens : int or sequence of int
        Prefix found in the cache, on every rank or rank by rank; at least one token is computed.
    arrival_s : float
        On the caller's clock; decides the order once it is overdue.
    """

    request_id: int | str
    prompt_tokens: int
    cached_tokens: int | tuple[int, ...] = 0
    arrival_s: float = 0.0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise InvalidInput(
                f"request {self.request_id!r} has {self.prompt_tokens} prompt tokens; there must "
                "be at least 1"
            )
        cached = self.cached_tokens
        if (cached if isinstance(cached, int) else min(cached, default=0)) < 0:
            raise InvalidInput(f"request {self.request_id!r} has {cached} cached tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """A data-parallel prefill rank before an assignment.

    Parameters
    ----------
    tokens : float
        Tokens that requests already on the rank have left to compute (residual of chunks).
    work_s : float
        Attention time they have left.
    kv_free_tokens : int
        Room in the KV cache; whole prompts are charged.
    free_requests : int
        Further requests the rank may hold.
    speed : float
        1 for an ordinary rank, less for a slow one, 0 for a dead one.
    """

    tokens: float = 0.0
    work_s: float = 0.0
    kv_free_tokens: int = 1 << 40
    free_requests: int = 1 << 30
    speed: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.tokens < np.inf and 0 <= self.work_s < np.inf):
            raise InvalidInput(
                f"residual load of a rank must not be negative, got {self.tokens} tokens and "
                f"{self.work_s} s"
            )
        if not 0 <= self.speed < np.inf:
            raise InvalidInput(f"speed of a rank must be 0 (dead) or more, got {self.speed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A request that no rank can ever hold, and why."""

    request_id: int | str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Where waiting requests go, and how good that is.

    Parameters
    ----------
    rank_Q : array of int64
        Rank of each request in the order given; -1 where it waits on, or is refused.
    refused : tuple of Refused
    tokens_max, tokens_bound : float
        The largest rank's new tokens, residuals included, and what no assignment can go below.
    work_max_s, work_bound_s : float
        The same for attention work.
    objective, bound, gap : float
        The larger of the two, each divided by its bound and weighted; what no assignment of all
        these requests can go below, 0 where some wait on; and (objective - bound) / bound.
    """

    rank_Q: IntArray
    refused: tuple[Refused, ...]
    tokens_max: float
    tokens_bound: float
    work_max_s: float
    work_bound_s: float
    objective: float
    bound: float
    gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRequest:
    """A prefilled request that decode has to place.

    Parameters
    ----------
    request_id : int or str
    kv_tokens : int
        KV cache it brings, at least 1.
    """

    request_id: int | str
    kv_tokens: int

    def __post_init__(self) -> None:
        if self.kv_tokens < 1:
            raise InvalidInput(
                f"request {self.request_id!r} brings {self.kv_tokens} KV tokens; there must be at "
                "least 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A request sent to a rank, with the rank's sequence number for its acknowledgement."""

    request_id: int | str
    rank: int
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """Two running requests to exchange: counts stay, KV moves from ``high`` to ``low``.

    Parameters
    ----------
    high_id, low_id : int or str
        The request that leaves the fuller rank, and the one that goes there.
    high_rank, low_rank : int
    high_kv_tokens, kv_tokens : int
        The cache that leaves the fuller rank, which is the larger one, and both together. They
        travel in opposite directions at once.
    steps : int
        Steps the transfer takes while links are idle; both requests go on where they are until it
        is done.
    """

    high_id: int | str
    low_id: int | str
    high_rank: int
    low_rank: int
    high_kv_tokens: int
    kv_tokens: int
    steps: int
