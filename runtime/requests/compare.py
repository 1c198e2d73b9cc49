"""Policies on a trace: one registry, one run a seed, means and intervals.

The registry names ours (``eplb`` and parts of it) and the rules of other schedulers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eplb.errors import InvalidInput, unknown_name
from eplb.profiles.request_trace import RequestTrace
from eplb.runtime.requests.chunks import ChunkPlanner
from eplb.runtime.requests.cost import DecodeCost, PrefillCost, decode_cost, prefill_cost
from eplb.runtime.requests.decode import DecodeOptions
from eplb.runtime.requests.decode_replay import (
    DecodeLog,
    DecodePolicy,
    EplbDecode,
    RuleDecode,
    replay_decode,
)
from eplb.runtime.requests.disturbances import Disturbances
from eplb.runtime.requests.figures import decode_figures, over_seeds, prefill_figures
from eplb.runtime.requests.prefill import PrefillBalancer
from eplb.runtime.requests.prefill_replay import (
    EplbPrefill,
    PrefillLog,
    PrefillPolicy,
    RulePrefill,
    replay_prefill,
)
from eplb.runtime.requests.prefix_cache import PrefixCaches
from eplb.runtime.requests.rules import RULES
from eplb.runtime.requests.workload import Capacity, decode_workload, prefill_workload

__all__ = ["PHASES", "Replay", "Settings", "compare", "policy_names", "replay"]

PHASES = ("prefill", "decode")
DECODE_OURS = ("eplb", "eplb-static")
PREFILL_OURS = ("eplb", "eplb-level-tokens", "eplb-token-budget")
# Steps that are left out while ranks settle, and steps that count: as long as a request lasts, with
# these limits.
WARM_UP_STEPS, MEASURED_STEPS = (200, 1500), (400, 1500)
# Prefill: the part of the steps that is left out, and how many times the backlog is served.
PREFILL_WARM_UP, PREFILL_TURNS = 0.2, 8
PREFILL_MAX_REQUESTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A deployment and how it is loaded.

    Parameters
    ----------
    phase : str
        ``prefill`` or ``decode``.
    num_ranks : int
    model : str
        A preset with known attention; prices attention and KV.
    utilisation : float
    kv_tokens : int
        KV cache of a rank.
    max_requests : int, optional
        Of a rank; 128 in decode and 32 in prefill unless given.
    budget_tokens : int
        Prefill: new tokens of a rank and step.
    token_skew : float
        Prefill: the cap on tokens of a rank over the mean.
    cache : str
        Prefill of traces with prefix blocks: ``rank`` (as large as the KV cache), ``shared`` (one
        that all ranks use, eight times as large) or ``none``.
    swaps : int
        Decode: exchanges a step at most.
    attention_scale, send_scale : float
        Cost constants times this, for sensitivity.
    disturbances : Disturbances
    """

    phase: str
    num_ranks: int
    model: str = "deepseek-v3"
    utilisation: float = 0.8
    kv_tokens: int = 455_000
    max_requests: int | None = None
    budget_tokens: int = 8192
    token_skew: float = 1.5
    cache: str = "rank"
    swaps: int = 8
    attention_scale: float = 1.0
    send_scale: float = 1.0
    disturbances: Disturbances = field(default_factory=Disturbances)

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise unknown_name("phase", self.phase, PHASES)
        if self.cache not in {"rank", "shared", "none"}:
            raise unknown_name("cache", self.cache, ("rank", "shared", "none"))
        self.disturbances.check(self.capacity.num_ranks)
        if self.phase == "prefill" and self.disturbances.abort_part:
            raise InvalidInput("aborts are replayed in decode only; leave abort_part out")

    @property
    def capacity(self) -> Capacity:
        """What ranks can hold."""
        default = 128 if self.phase == "decode" else PREFILL_MAX_REQUESTS
        return Capacity(
            num_ranks=self.num_ranks, kv_tokens=self.kv_tokens, utilisation=self.utilisation,
            max_requests=default if self.max_requests is None else self.max_requests,
        )  # fmt: skip

    @property
    def decode_cost(self) -> DecodeCost:
        """Costs of a decode step."""
        return decode_cost(self.model).scaled(attention=self.attention_scale, send=self.send_scale)

    @property
    def prefill_cost(self) -> PrefillCost:
        """Costs of a prefill step."""
        return prefill_cost(self.model).scaled(attention=self.attention_scale, send=self.send_scale)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """One policy on one seed: figures, and the log they come from."""

    policy: str
    seed: int
    figures: dict[str, float]
    log: DecodeLog | PrefillLog
    warm_up: int


def policy_names(phase: str) -> tuple[str, ...]:
    """Return the policies of a phase, ours first."""
    ours = DECODE_OURS if phase == "decode" else PREFILL_OURS
    return (*ours, *RULES)


def replay(trace: RequestTrace, settings: Settings, policy: str, seed: int = 0) -> Replay:
    """Run one policy on one seed.

    Raises
    ------
    InvalidInput
        The policy is unknown.
    """
    if policy not in policy_names(settings.phase):
        raise unknown_name(f"{settings.phase} policy", policy, policy_names(settings.phase))
    run = _replay_decode if settings.phase == "decode" else _replay_prefill
    return run(trace, settings, policy, seed)


def _replay_decode(trace: RequestTrace, settings: Settings, policy: str, seed: int) -> Replay:
    capacity, cost = settings.capacity, settings.decode_cost
    lasting = float(trace.output_tokens_Q.mean())
    warm_up = int(np.clip(lasting, *WARM_UP_STEPS))
    num_steps = warm_up + int(np.clip(lasting, *MEASURED_STEPS))
    workload = decode_workload(trace, capacity, num_steps=num_steps, seed=seed)
    upset = settings.disturbances
    runner: DecodePolicy
    if policy in DECODE_OURS:
        options = DecodeOptions(max_swaps=settings.swaps if policy == "eplb" else 0)
        runner = EplbDecode(capacity, cost, options, upset)
    else:
        runner = RuleDecode(RULES[policy], capacity, seed)
    log = replay_decode(workload, capacity, cost, runner, num_steps=num_steps, seed=seed,
                        disturbances=upset)  # fmt: skip
    figures = decode_figures(log, cost, warm_up)
    return Replay(policy=policy, seed=seed, figures=figures, log=log, warm_up=warm_up)


def _replay_prefill(trace: RequestTrace, settings: Settings, policy: str, seed: int) -> Replay:
    capacity, cost = settings.capacity, settings.prefill_cost
    fits = trace.prompt_tokens_Q <= capacity.kv_tokens
    if not fits.all():
        raise InvalidInput(
            f"{int((~fits).sum())} prompts of {trace.source} are larger than the KV cache of a "
            f"rank ({capacity.kv_tokens} tokens); raise --kv-tokens"
        )
    backlog = capacity.residents(float(trace.prompt_tokens_Q.mean())) * capacity.num_ranks
    workload = prefill_workload(trace, num_requests=int(PREFILL_TURNS * backlog), seed=seed)
    caches = None
    if trace.has_blocks and settings.cache != "none":
        shared = settings.cache == "shared"
        blocks = capacity.kv_tokens // trace.block_tokens * (8 if shared else 1)
        caches = PrefixCaches(capacity.num_ranks, blocks, shared=shared)
    runner: PrefillPolicy
    if policy in PREFILL_OURS:
        planner = ChunkPlanner(
            cost=cost, budget_tokens=settings.budget_tokens,
            token_skew=1.0 if policy == "eplb-level-tokens" else settings.token_skew,
        )  # fmt: skip
        balancer = PrefillBalancer(cost=cost, kv_capacity_tokens=capacity.kv_tokens)
        runner = EplbPrefill(balancer, planner, equal_time=policy != "eplb-token-budget")
    else:
        runner = RulePrefill(RULES[policy], capacity, settings.budget_tokens, seed)
    log = replay_prefill(trace, workload, capacity, cost, runner, caches=caches,
                         disturbances=settings.disturbances)  # fmt: skip
    warm_up = int(PREFILL_WARM_UP * len(log.served_T))
    figures = prefill_figures(log, cost, warm_up)
    return Replay(policy=policy, seed=seed, figures=figures, log=log, warm_up=warm_up)


def compare(
    trace: RequestTrace,
    settings: Settings,
    policies: Sequence[str],
    seeds: Sequence[int],
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run policies on the same requests and return one JSON document."""
    unknown = [name for name in policies if name not in policy_names(settings.phase)]
    if unknown:
        raise unknown_name(f"{settings.phase} policy", unknown[0], policy_names(settings.phase))
    if not policies or not seeds:
        raise InvalidInput("nothing to compare; name at least one policy and one seed")
    results: dict[str, dict[str, float]] = {}
    for name in policies:
        progress(name)
        results[name] = over_seeds(list(_figures(trace, settings, name, seeds)))
    return {
        "phase": settings.phase,
        "trace": trace.source,
        "requests_in_trace": trace.num_requests,
        "notes": list(trace.notes),
        "num_ranks": settings.num_ranks,
        "model": settings.model,
        "utilisation": settings.utilisation,
        "kv_tokens": settings.kv_tokens,
        "max_requests": settings.capacity.max_requests,
        "token_skew": settings.token_skew if settings.phase == "prefill" else None,
        "seeds": list(seeds),
        "policies": results,
    }


def _figures(
    trace: RequestTrace, settings: Settings, policy: str, seeds: Sequence[int]
) -> Iterator[dict[str, float]]:
    for seed in seeds:
        yield replay(trace, settings, policy, seed).figures
