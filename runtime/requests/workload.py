"""From a trace to what a replay serves: superposed, warped to a utilisation, differing by seed.

A trace of one server is too thin for a large deployment. Copies of it, each rotated by a random
offset (its end followed by its beginning), are laid over each other as long as needed, and time is
stretched so that the residents fill the wanted part of what the ranks can hold. Bursts remain.
Shape letters: Q requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput
from eplb.profiles.request_trace import RequestTrace

__all__ = ["Capacity", "Workload", "decode_workload", "prefill_workload"]

# Copies of a trace whose blocks must not be taken for each other's.
BLOCK_STRIDE = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What every rank can hold.

    Parameters
    ----------
    num_ranks : int
    kv_tokens : int
        KV cache of a rank. DeepSeek's decode ranks hold 420-460K tokens (research of its published
        day: 84-92 requests of 4,989 tokens); 32 GB of MLA latents in BF16 are 455K.
    max_requests : int
        Running requests of a rank (decode: what low-latency dispatch is set up for, 128 in DeepEP).
    utilisation : float
        Part of it to be filled: of the KV cache, or of the requests where those are fewer.
    """

    num_ranks: int
    kv_tokens: int = 455_000
    max_requests: int = 128
    utilisation: float = 0.8

    def __post_init__(self) -> None:
        for name in ("num_ranks", "kv_tokens", "max_requests"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.utilisation <= 2:
            raise InvalidInput(f"utilisation must be above 0 and at most 2, got {self.utilisation}")

    def residents(self, kv_per_request: float) -> float:
        """Return the requests of a rank that fill the wanted part."""
        return self.utilisation * min(self.max_requests, self.kv_tokens / kv_per_request)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of one replay.

    Parameters
    ----------
    arrival_Q : array of float64
        Decode: in steps of nominal length. Prefill: the order only.
    prompt_tokens_Q, output_tokens_Q : array of int64
    trace_Q : array of int64
        The request of the trace, for its prefix blocks.
    copy_Q : array of int64
        The copy of the trace it is from; blocks are shared within a copy.
    num_warm : int
        The first so many run when the replay begins.
    done_warm_Q : array of int64
        Output tokens that those have already.
    """

    arrival_Q: FloatArray
    prompt_tokens_Q: IntArray
    output_tokens_Q: IntArray
    trace_Q: IntArray
    copy_Q: IntArray
    num_warm: int
    done_warm_Q: IntArray


def decode_workload(
    trace: RequestTrace, capacity: Capacity, *, num_steps: int, seed: int
) -> Workload:
    """Return the requests that keep decode ranks at a utilisation for so many steps.

    By Little's law a request that arrives stays for its output length, so the mean number of
    residents is arrivals a step times the mean output. The first residents are drawn as a look at a
    running system finds them: by output length, at a uniformly random point of it.
    """
    rng = np.random.default_rng([seed, 1])
    fits = trace.prompt_tokens_Q + trace.output_tokens_Q <= capacity.kv_tokens
    prompt, output = trace.prompt_tokens_Q[fits], trace.output_tokens_Q[fits]
    if not len(prompt):
        raise InvalidInput(
            f"no request of {trace.source} fits into {capacity.kv_tokens} KV tokens; raise "
            "--kv-tokens"
        )
    kv_per_request = float(((prompt + output / 2) * output).sum() / output.sum())
    residents = capacity.residents(kv_per_request) * capacity.num_ranks
    per_step = residents / output.mean()
    copies = max(1, int(np.ceil(per_step * num_steps / len(prompt))))
    # One pass of the trace lasts this many steps once all copies run beside each other.
    span = copies * len(prompt) / per_step
    duration = trace.arrival_s_Q[-1] * len(prompt) / max(1, len(prompt) - 1)
    offset = rng.uniform(0, span, copies)
    if duration > 0:
        # Divided first: a trace may be arbitrarily short.
        base = trace.arrival_s_Q[fits] / duration * span
    else:
        base = rng.uniform(0, span, len(prompt))
    arrival = ((base[np.newaxis] + offset[:, np.newaxis]) % span).reshape(-1)
    which = np.tile(np.arange(len(prompt)), copies)
    copy = np.repeat(np.arange(copies), len(prompt))
    order = np.argsort(arrival, kind="stable")
    order = order[arrival[order] < num_steps]

    num_warm = max(1, round(residents))
    warm = rng.choice(len(prompt), num_warm, p=output / output.sum())
    done = (rng.uniform(0, 1, num_warm) * output[warm]).astype(np.int64)
    index = np.concatenate([warm, which[order]])
    return Workload(
        arrival_Q=np.concatenate([np.zeros(num_warm), arrival[order]]),
        prompt_tokens_Q=prompt[index],
        output_tokens_Q=output[index],
        trace_Q=np.flatnonzero(fits)[index],
        copy_Q=np.concatenate([np.full(num_warm, -1), copy[order]]),
        num_warm=num_warm,
        done_warm_Q=done,
    )


def prefill_workload(trace: RequestTrace, *, num_requests: int, seed: int) -> Workload:
    """Return requests in the order of a trace from a random point on, repeated as needed."""
    rng = np.random.default_rng([seed, 2])
    count = trace.num_requests
    index = int(rng.integers(count)) + np.arange(max(num_requests, count))
    which = index % count
    return Workload(
        arrival_Q=np.arange(len(which), dtype=np.float64),
        prompt_tokens_Q=trace.prompt_tokens_Q[which],
        output_tokens_Q=trace.output_tokens_Q[which],
        trace_Q=which,
        copy_Q=index // count,
        num_warm=0,
        done_warm_Q=np.zeros(0, np.int64),
    )
