"""Chunk sizes of a prefill step: equal time on all ranks rather than equal tokens.

A token deep in a long prompt costs many times what a token near its start does, so equal token
budgets make ranks wait for whoever works deepest. Here every rank gets the same time, and spends
it on a mix of expensive tokens (deep in long prompts) and cheap ones, so that tokens, which decide
what a rank has to send, stay level as well.
Shape letters: J requests on ranks, oldest first within a rank; R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput
from eplb.runtime.requests.cost import PrefillCost

__all__ = ["ChunkPlanner", "equal_tokens"]

# Rounds in which the token cap follows the mean that it changes.
CAP_ROUNDS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlanner:
    """Sizes the chunks of a lock-step prefill step.

    Parameters
    ----------
    cost : PrefillCost
    budget_tokens : int
        New tokens a rank computes in a step on average, while there are enough.
    token_skew : float
        No rank computes more than this times the mean over ranks (the Pareto knob of chunking:
        1 keeps tokens level, more lets ranks without long prompts make up for time with tokens,
        as far as sending them takes no longer than the step computes).
        A rank may always compute ``budget_tokens / token_skew``, so that one that runs out of
        requests does not slow the others down to nothing.
    least_tokens : int
        What the oldest request of a rank gets in every step, however expensive: with this a prompt
        of n tokens is done within n / least_tokens steps of being its rank's oldest.
    """

    cost: PrefillCost
    budget_tokens: int = 8192
    token_skew: float = 1.5
    least_tokens: int = 128

    def __post_init__(self) -> None:
        if self.budget_tokens < 1 or self.least_tokens < 1:
            raise InvalidInput(
                f"budget_tokens ({self.budget_tokens}) and least_tokens ({self.least_tokens}) "
                "must be at least 1"
            )
        if not self.token_skew >= 1:
            raise InvalidInput(f"token_skew must be at least 1, got {self.token_skew}")

    def plan(
        self,
        first_R: IntArray,
        remaining_J: IntArray,
        position_J: IntArray,
        speed_R: FloatArray,
    ) -> IntArray:
        """Return how many tokens of each request to compute, shape [J].

        Parameters
        ----------
        first_R : array of int64, shape [R + 1]
            Requests ``first_R[r]`` to ``first_R[r + 1]`` are on rank r, oldest first.
        remaining_J, position_J : array of int64
            Tokens left to compute, at least 1, and tokens before them: cached or done.
        speed_R : array of float64
            1 for ordinary ranks, less for slow ones, 0 for dead ones.
        """
        cost = self.cost
        return _equal_time(first_R, remaining_J, position_J, speed_R, cost.token_s, cost.pair_s,
                           cost.context_s, cost.shared_s, cost.send_s, float(self.budget_tokens),
                           self.token_skew, self.least_tokens)  # fmt: skip


@njit(cache=True, nogil=True)
def equal_tokens(first_R: IntArray, remaining_J: IntArray, budget_tokens: int) -> IntArray:
    """Return the chunks that engines use: first come first served up to a token budget a rank."""
    chunk_J = np.zeros(remaining_J.shape[0], np.int64)
    for r in range(first_R.shape[0] - 1):
        left = budget_tokens
        for j in range(first_R[r], first_R[r + 1]):
            chunk_J[j] = min(left, remaining_J[j])
            left -= chunk_J[j]
    return chunk_J


@njit(cache=True, nogil=True)
def _equal_time(
    first_R: IntArray,
    remaining_J: IntArray,
    position_J: IntArray,
    speed_R: FloatArray,
    token_s: float,
    pair_s: float,
    context_s: float,
    shared_s: float,
    send_s: float,
    budget: float,
    token_skew: float,
    least: int,
) -> IntArray:
    num_ranks = first_R.shape[0] - 1
    num_alive, time_all = 0.0, 0.0
    token_cost = np.empty(num_ranks)
    num_busy = 0
    chunk_J = np.zeros(remaining_J.shape[0], np.int64)
    for r in range(num_ranks):
        if speed_R[r] <= 0.0:
            continue
        num_alive += 1.0
        if first_R[r] == first_R[r + 1]:
            continue
        own, tokens = 0.0, 0.0
        for j in range(first_R[r], first_R[r + 1]):
            own += _chunk_s(remaining_J[j], position_J[j], token_s, pair_s, context_s)
            tokens += remaining_J[j]
        time_all += own / speed_R[r]
        token_cost[num_busy] = own / tokens
        num_busy += 1
    if num_busy == 0:
        return chunk_J
    # At the usual cost of a token, tokens and time run out together, so that later steps are like
    # this one; the median, because a rank with a giant prompt must not set the pace for all. With
    # less than a step's work it is divided over the ranks, and the rest waits for what arrives.
    time = min(budget * np.median(token_cost[:num_busy]), time_all / num_alive)
    for r in range(num_ranks):
        if speed_R[r] > 0.0 and first_R[r + 1] > first_R[r]:
            j = first_R[r]
            oldest_s = _chunk_s(min(least, remaining_J[j]), position_J[j], token_s, pair_s,
                                context_s)  # fmt: skip
            time = max(time, oldest_s / speed_R[r])
    # Tokens beyond the budget are free only as long as sending them is hidden by computing.
    cap = token_skew * budget
    if send_s > 0.0:
        cap = min(cap, max(budget, (time + shared_s * budget) / send_s))
    for _ in range(CAP_ROUNDS):
        most, total = 0.0, 0.0
        for r in range(num_ranks):
            tokens = 0.0
            if speed_R[r] > 0.0:
                tokens = _fill(first_R[r], first_R[r + 1], remaining_J, position_J, chunk_J,
                               time * speed_R[r], budget, cap, least, token_s, pair_s,
                               context_s)  # fmt: skip
            most, total = max(most, tokens), total + tokens
        allowed = max(token_skew * total / num_alive, budget / token_skew)
        if most <= allowed + 1.0:
            break
        cap = allowed
    return chunk_J


@njit(cache=True, nogil=True)
def _chunk_s(new: float, before: float, token_s: float, pair_s: float, context_s: float) -> float:
    """Return a chunk's own time, as PrefillCost.chunk_s."""
    if new <= 0:
        return 0.0
    return (
        token_s * new + pair_s * (new * before + new * (new + 1.0) / 2.0)
        + context_s * (before + new)
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _tokens_in(
    time: float, before: float, most: float, token_s: float, pair_s: float, context_s: float
) -> float:
    """Return the largest chunk, at most ``most`` whole tokens, that takes no longer than ``time``.

    The root of the quadratic that _chunk_s is.
    """
    if time >= _chunk_s(most, before, token_s, pair_s, context_s):
        return most
    linear = token_s + context_s + pair_s * (before + 0.5)
    spare = time - context_s * before
    if spare <= 0.0:
        return 0.0
    if pair_s == 0.0:
        return float(np.floor(min(spare / linear, most)))
    # Written so that nothing cancels where pairs cost little.
    root = 2.0 * spare / (linear + np.sqrt(linear * linear + 2.0 * pair_s * spare))
    return float(np.floor(min(root, most)))


@njit(cache=True, nogil=True)
def _take(
    begin: int,
    end: int,
    heavy_J: IntArray,
    heavy: int,
    remaining_J: IntArray,
    position_J: IntArray,
    chunk_J: IntArray,
    time: float,
    tokens: float,
    token_s: float,
    pair_s: float,
    context_s: float,
) -> tuple[float, float]:
    """Take tokens of one class, oldest first, within a time and a number; return both as used.

    Requests that have tokens in ``chunk_J`` already are extended.
    """
    used_time, used_tokens = 0.0, 0.0
    for j in range(begin, end):
        if heavy_J[j - begin] != heavy:
            continue
        have = chunk_J[j]
        had_s = _chunk_s(have, position_J[j], token_s, pair_s, context_s)
        most = min(float(remaining_J[j]), have + tokens - used_tokens)
        size = _tokens_in(time - used_time + had_s, position_J[j], most, token_s, pair_s, context_s)
        if size > have:
            used_time += _chunk_s(size, position_J[j], token_s, pair_s, context_s) - had_s
            used_tokens += size - have
            chunk_J[j] = int(size)
        if used_tokens >= tokens:
            break
    return used_time, used_tokens


@njit(cache=True, nogil=True)
def _mix(
    x: float,
    begin: int,
    end: int,
    heavy_J: IntArray,
    remaining_J: IntArray,
    position_J: IntArray,
    chunk_J: IntArray,
    time: float,
    cap: float,
    least: int,
    token_s: float,
    pair_s: float,
    context_s: float,
) -> float:
    """Fill a rank's step: x tokens of expensive requests, then cheap ones, then more expensive."""
    chunk_J[begin:end] = 0
    tokens = float(min(float(least), float(remaining_J[begin]), np.floor(cap)))
    chunk_J[begin] = int(tokens)
    spent = _chunk_s(tokens, position_J[begin], token_s, pair_s, context_s)
    for heavy, most in ((1, x), (0, cap), (1, cap)):
        more_s, more = _take(begin, end, heavy_J, heavy, remaining_J, position_J, chunk_J,
                             time - spent, min(most, cap - tokens), token_s, pair_s,
                             context_s)  # fmt: skip
        spent, tokens = spent + more_s, tokens + more
    return tokens


@njit(cache=True, nogil=True)
def _fill(
    begin: int,
    end: int,
    remaining_J: IntArray,
    position_J: IntArray,
    chunk_J: IntArray,
    time: float,
    budget: float,
    cap: float,
    least: int,
    token_s: float,
    pair_s: float,
    context_s: float,
) -> float:
    """Fill one rank's step; return its tokens.

    Expensive requests get x tokens and cheap ones the time that is left. The more x, the fewer
    tokens altogether: x is the most that still leaves the rank its budget of tokens.
    """
    if begin == end:
        return 0.0
    heavy_J = np.zeros(end - begin, np.int64)
    heavy_most = 0.0
    for j in range(begin, end):
        size = min(float(remaining_J[j]), budget)
        if _chunk_s(size, position_J[j], token_s, pair_s, context_s) > size * time / budget:
            heavy_J[j - begin] = 1
            heavy_most += remaining_J[j]
    low, high = 0.0, min(heavy_most, np.floor(cap))
    # Without expensive tokens first, to see how many tokens there can be.
    tokens = _mix(low, begin, end, heavy_J, remaining_J, position_J, chunk_J, time, cap, least,
                  token_s, pair_s, context_s)  # fmt: skip
    goal = min(budget, tokens)
    if high == 0.0:
        return tokens
    tokens = _mix(high, begin, end, heavy_J, remaining_J, position_J, chunk_J, time, cap, least,
                  token_s, pair_s, context_s)  # fmt: skip
    if tokens >= goal:
        return tokens
    while high - low > 1.0:
        middle = np.floor((low + high) / 2.0)
        tokens = _mix(middle, begin, end, heavy_J, remaining_J, position_J, chunk_J, time, cap,
                      least, token_s, pair_s, context_s)  # fmt: skip
        if tokens >= goal:
            low = middle
        else:
            high = middle
    return _mix(low, begin, end, heavy_J, remaining_J, position_J, chunk_J, time, cap, least,
                token_s, pair_s, context_s)  # fmt: skip
