"""Simulated lock-step decode ranks: queues, running requests, KV growth, retraction, loss.

Shape letters: Q requests of the workload, R ranks, M places of a rank.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from eplb.arrays import FloatArray, IntArray

__all__ = ["DecodeRanks"]

NEVER = np.int64(1) << 60


class DecodeRanks:
    """Ranks that run what they are sent, first come first served within their KV cache.

    Parameters
    ----------
    num_ranks, max_requests : int
    kv_capacity : int
    prompt_tokens_Q, output_tokens_Q : array of int64
        Of all requests of the workload; others are named by their index.
    """

    def __init__(
        self,
        num_ranks: int,
        max_requests: int,
        kv_capacity: int,
        prompt_tokens_Q: IntArray,
        output_tokens_Q: IntArray,
    ) -> None:
        count = len(prompt_tokens_Q)
        self.kv_capacity = kv_capacity
        self.prompt_Q, self.output_Q = prompt_tokens_Q, output_tokens_Q
        self.done_Q = np.zeros(count, np.int64)
        self.rank_Q = np.full(count, -1, np.int64)
        self.first_step_Q = np.full(count, -1, np.int64)
        self.last_step_Q = np.full(count, -1, np.int64)
        self.running_R = np.zeros(num_ranks, np.int64)
        self.kv_R = np.zeros(num_ranks, np.int64)
        self.request_RM = np.full((num_ranks, max_requests), -1, np.int64)
        self.finish_RM = np.full((num_ranks, max_requests), NEVER, np.int64)
        # Queues are linked lists: head and tail of each rank, and who is next.
        self.head_R = np.full(num_ranks, -1, np.int64)
        self.tail_R = np.full(num_ranks, -1, np.int64)
        self.next_Q = np.full(count, -1, np.int64)
        self.waiting_R = np.zeros(num_ranks, np.int64)
        self.waiting_kv_R = np.zeros(num_ranks, np.int64)
        self.prompt_R = np.zeros(num_ranks, np.int64)
        self.retractions = 0

    def send(self, requests: IntArray, ranks: IntArray) -> None:
        """Put requests into the queues of ranks."""
        _enqueue(requests, ranks, self.rank_Q, self.head_R, self.tail_R, self.next_Q,
                 self.waiting_R, self.waiting_kv_R, self.prompt_R, self.prompt_Q,
                 self.done_Q)  # fmt: skip

    def admit(self, step: int) -> None:
        """Begin queued requests where they fit."""
        _admit(step, self.kv_capacity, self.head_R, self.tail_R, self.next_Q, self.waiting_R,
               self.waiting_kv_R, self.running_R, self.kv_R, self.request_RM, self.finish_RM,
               self.prompt_Q, self.output_Q, self.done_Q, self.first_step_Q)  # fmt: skip

    def advance(self, step: int) -> tuple[IntArray, IntArray]:
        """Run one step; return the requests that end with it, and those put back for lack of KV."""
        ended, retracted = _advance(step, self.kv_capacity, self.running_R, self.kv_R,
                                    self.request_RM, self.finish_RM, self.prompt_Q, self.output_Q,
                                    self.done_Q, self.last_step_Q, self.prompt_R)  # fmt: skip
        self.retractions += len(retracted)
        return ended, retracted

    def exchange(self, high: int, low: int, step: int) -> bool:
        """Exchange two running requests between their ranks; False where one has ended."""
        return bool(_exchange(high, low, step, self.rank_Q, self.running_R, self.kv_R,
                              self.request_RM, self.finish_RM, self.prompt_Q, self.output_Q,
                              self.prompt_R))  # fmt: skip

    def lose(self, rank: int, step: int) -> IntArray:
        """Take a rank out of service; return its requests, with what they had got so far."""
        running = self.request_RM[rank, : self.running_R[rank]].copy()
        left = self.finish_RM[rank, : self.running_R[rank]] - step
        self.done_Q[running] = self.output_Q[running] - left
        queued, q = [], self.head_R[rank]
        while q >= 0:
            queued.append(q)
            q = self.next_Q[q]
        self.request_RM[rank], self.finish_RM[rank] = -1, NEVER
        for array_R in (self.running_R, self.kv_R, self.waiting_R, self.waiting_kv_R,
                        self.prompt_R):  # fmt: skip
            array_R[rank] = 0
        self.head_R[rank] = self.tail_R[rank] = -1
        return np.concatenate([running, np.array(queued, np.int64)])

    def kv_with_queue_R(self) -> FloatArray:
        """Return the KV tokens of running and queued requests."""
        return (self.kv_R + self.waiting_kv_R).astype(np.float64)


@njit(cache=True, nogil=True)
def _enqueue(
    requests: IntArray, ranks: IntArray, rank_Q: IntArray, head_R: IntArray, tail_R: IntArray,
    next_Q: IntArray, waiting_R: IntArray, waiting_kv_R: IntArray, prompt_R: IntArray,
    prompt_Q: IntArray, done_Q: IntArray,
) -> None:  # fmt: skip
    for i in range(requests.shape[0]):
        q, r = requests[i], ranks[i]
        rank_Q[q] = r
        next_Q[q] = -1
        if tail_R[r] < 0:
            head_R[r] = q
        else:
            next_Q[tail_R[r]] = q
        tail_R[r] = q
        waiting_R[r] += 1
        waiting_kv_R[r] += prompt_Q[q] + done_Q[q]
        prompt_R[r] += prompt_Q[q]


@njit(cache=True, nogil=True)
def _admit(
    step: int, kv_capacity: int, head_R: IntArray, tail_R: IntArray, next_Q: IntArray,
    waiting_R: IntArray, waiting_kv_R: IntArray, running_R: IntArray, kv_R: IntArray,
    request_RM: IntArray, finish_RM: IntArray, prompt_Q: IntArray, output_Q: IntArray,
    done_Q: IntArray, first_step_Q: IntArray,
) -> None:  # fmt: skip
    for r in range(head_R.shape[0]):
        while head_R[r] >= 0 and running_R[r] < request_RM.shape[1]:
            q = head_R[r]
            kv = prompt_Q[q] + done_Q[q]
            # The step itself makes every running request a token longer.
            if kv_R[r] + kv + running_R[r] + 1 > kv_capacity:
                break
            head_R[r] = next_Q[q]
            if head_R[r] < 0:
                tail_R[r] = -1
            waiting_R[r] -= 1
            waiting_kv_R[r] -= kv
            m = running_R[r]
            request_RM[r, m] = q
            finish_RM[r, m] = step + output_Q[q] - done_Q[q]
            running_R[r] += 1
            kv_R[r] += kv
            if first_step_Q[q] < 0:
                first_step_Q[q] = step


@njit(cache=True, nogil=True)
def _remove(r: int, m: int, running_R: IntArray, request_RM: IntArray, finish_RM: IntArray) -> None:
    last = running_R[r] - 1
    request_RM[r, m], finish_RM[r, m] = request_RM[r, last], finish_RM[r, last]
    request_RM[r, last], finish_RM[r, last] = -1, NEVER
    running_R[r] = last


@njit(cache=True, nogil=True)
def _advance(
    step: int, kv_capacity: int, running_R: IntArray, kv_R: IntArray, request_RM: IntArray,
    finish_RM: IntArray, prompt_Q: IntArray, output_Q: IntArray, done_Q: IntArray,
    last_step_Q: IntArray, prompt_R: IntArray,
) -> tuple[IntArray, IntArray]:  # fmt: skip
    ended = np.empty(running_R.sum(), np.int64)
    retracted = np.empty(running_R.sum(), np.int64)
    num_ended, num_retracted = 0, 0
    for r in range(running_R.shape[0]):
        kv_R[r] += running_R[r]
        for m in range(running_R[r] - 1, -1, -1):
            if finish_RM[r, m] == step + 1:
                q = request_RM[r, m]
                ended[num_ended] = q
                num_ended += 1
                kv_R[r] -= prompt_Q[q] + output_Q[q]
                prompt_R[r] -= prompt_Q[q]
                last_step_Q[q] = step
                _remove(r, m, running_R, request_RM, finish_RM)
        # Out of memory: the request that has got least is put back, to be computed again.
        while running_R[r] > 1 and kv_R[r] + running_R[r] > kv_capacity:
            newest, least = -1, NEVER
            for m in range(running_R[r]):
                q = request_RM[r, m]
                got = output_Q[q] - (finish_RM[r, m] - step - 1)
                if got < least:
                    newest, least = m, got
            q = request_RM[r, newest]
            done_Q[q] = least
            kv_R[r] -= prompt_Q[q] + least
            prompt_R[r] -= prompt_Q[q]
            retracted[num_retracted] = q
            num_retracted += 1
            _remove(r, newest, running_R, request_RM, finish_RM)
    return ended[:num_ended].copy(), retracted[:num_retracted].copy()


@njit(cache=True, nogil=True)
def _exchange(
    high: int, low: int, step: int, rank_Q: IntArray, running_R: IntArray, kv_R: IntArray,
    request_RM: IntArray, finish_RM: IntArray, prompt_Q: IntArray, output_Q: IntArray,
    prompt_R: IntArray,
) -> bool:  # fmt: skip
    a, b = rank_Q[high], rank_Q[low]
    at, bt = -1, -1
    for m in range(running_R[a]):
        if request_RM[a, m] == high:
            at = m
    for m in range(running_R[b]):
        if request_RM[b, m] == low:
            bt = m
    if at < 0 or bt < 0:
        return False
    high_kv = prompt_Q[high] + output_Q[high] - (finish_RM[a, at] - step)
    low_kv = prompt_Q[low] + output_Q[low] - (finish_RM[b, bt] - step)
    kv_R[a] += low_kv - high_kv
    kv_R[b] += high_kv - low_kv
    prompt_R[a] += prompt_Q[low] - prompt_Q[high]
    prompt_R[b] += prompt_Q[high] - prompt_Q[low]
    request_RM[a, at], request_RM[b, bt] = low, high
    finish_RM[a, at], finish_RM[b, bt] = finish_RM[b, bt], finish_RM[a, at]
    rank_Q[high], rank_Q[low] = b, a
    return True
