"""What requests cost a data-parallel rank: seconds of a prefill chunk, seconds of a decode step.

Expert parallelism makes every layer a barrier, and layers are alike, so a step is a sum of phases
and each phase lasts as long as on its slowest rank. What requests decide is a rank's *own* part:
attention, projections, dense layers and shared experts of the tokens it holds, and sending them.
The routed experts are work that all ranks share; balancing them is what placement is for.

Chunk of n new tokens on p that are cached or done (causal attention): ``n*p + n*(n+1)/2`` pairs;
MLA prefill also expands the latent vectors of all p + n.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from eplb.attention import attention_preset
from eplb.errors import InvalidInput
from eplb.model import model_preset

__all__ = ["DecodeCost", "PrefillCost", "chunk_pairs", "decode_cost", "prefill_cost"]

# Measured on one H100 by benchmarks/calibrate_requests.py (benchmarks/results/request-cost.json):
# FP8 matrix products, BF16 attention with expanded keys and values (cuDNN), BF16 expansion. The
# H800 has the same tensor cores and memory and slower links.
LINEAR_FLOPS_PER_S = 1436e12
PREFILL_ATTENTION_FLOPS_PER_S = 633e12
EXPANSION_FLOPS_PER_S = 568e12
# FlashMLA's README for MLA decode on H800, bound by computing and by memory: what production runs.
# The plain Triton kernel of the calibration reaches 224e12.
DECODE_ATTENTION_FLOPS_PER_S = 660e12
DECODE_KV_BYTES_PER_S = 3000e9
# DeepEP docs/legacy.md @0297fc8, H800: normal kernels of EP32, and low-latency kernels (39 GB/s at
# EP128 and EP256, 8 destinations a token).
NORMAL_DISPATCH_BYTES_PER_S, NORMAL_COMBINE_BYTES_PER_S = 58e9, 57e9
LOW_LATENCY_BYTES_PER_S = 39.5e9
# FP8 values with one float32 scale for 128 of them; BF16 back (DeepSeek-V3 report, 3.2).
DISPATCH_BYTES_PER_VALUE, COMBINE_BYTES_PER_VALUE = 1 + 4 / 128, 2.0
# What a decode step costs whatever it holds, chosen so that 88 requests and 440K KV tokens a rank
# take 47 ms, as in DeepSeek's open-infra-index (day 6: 20-22 tokens/s a user).
DECODE_FIXED_S = 13e-3
# Normal kernels send a token once to each node; a prefill unit has four.
NODES_PER_TOKEN = 4


def chunk_pairs(new_tokens: float, cached_tokens: float) -> float:
    """Return the pairs of a causal chunk, per layer."""
    return new_tokens * cached_tokens + new_tokens * (new_tokens + 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCost:
    """Prefill costs in seconds, over all layers.

    Parameters
    ----------
    token_s : float
        A new token's projections, dense layers, shared experts and router, on its own rank.
    pair_s : float
        A pair of a new token and a token it attends to.
    context_s : float
        A token of a chunk's context, cached ones included (expansion of MLA's latent vectors).
    shared_s : float
        A new token's routed experts; spread over all ranks.
    send_s : float
        Dispatch and combine of a new token. Two micro-batches hide it behind computing as far as
        it is shorter (DeepSeek's open-infra-index, day 6).
    """

    token_s: float
    pair_s: float
    context_s: float
    shared_s: float
    send_s: float

    def __post_init__(self) -> None:
        _check_costs(self, positive=("token_s",))

    def chunk_s(self, new_tokens: float, cached_tokens: float) -> float:
        """Return a chunk's own time on its rank."""
        if new_tokens <= 0:
            return 0.0
        return self.token_s * new_tokens + self.attention_s(new_tokens, cached_tokens)

    def attention_s(self, new_tokens: float, cached_tokens: float) -> float:
        """Return a chunk's core attention: pairs and expansion."""
        if new_tokens <= 0:
            return 0.0
        pairs = chunk_pairs(new_tokens, cached_tokens)
        return self.pair_s * pairs + self.context_s * (cached_tokens + new_tokens)

    def scaled(self, *, attention: float = 1.0, send: float = 1.0) -> PrefillCost:
        """Return these costs with attention or communication dearer or cheaper."""
        return replace(
            self, pair_s=self.pair_s * attention, context_s=self.context_s * attention,
            send_s=self.send_s * send,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCost:
    """Decode costs in seconds a step, over all layers.

    Parameters
    ----------
    kv_token_s : float
        A token of KV cache attended to.
    request_s : float
        A running request: its dispatch and combine, not overlapped.
    fixed_s : float
        The step itself: weights read, latencies, what does not grow with the batch.
    kv_bytes : float
        KV cache of one token, bytes; prices moving a request.
    """

    kv_token_s: float
    request_s: float
    fixed_s: float
    kv_bytes: float

    def __post_init__(self) -> None:
        _check_costs(self, positive=("kv_token_s", "kv_bytes"))

    def step_s(self, kv_tokens: float, num_requests: float) -> float:
        """Return a step's time where the fullest rank holds this much."""
        return self.fixed_s + self.kv_token_s * kv_tokens + self.request_s * num_requests

    def scaled(self, *, attention: float = 1.0, send: float = 1.0) -> DecodeCost:
        """Return these costs with attention or communication dearer or cheaper."""
        return replace(
            self, kv_token_s=self.kv_token_s * attention, request_s=self.request_s * send
        )


def prefill_cost(model: str = "deepseek-v3") -> PrefillCost:
    """Return the prefill costs of a preset model on H800-class ranks."""
    spec, sent_values = attention_preset(model), _sent_values(model)
    window = spec.num_window_layers * spec.window_tokens * spec.prefill_flops_per_pair
    per_value = (
        DISPATCH_BYTES_PER_VALUE / NORMAL_DISPATCH_BYTES_PER_S
        + COMBINE_BYTES_PER_VALUE / NORMAL_COMBINE_BYTES_PER_S
    )
    return PrefillCost(
        # A layer with a short window costs about the same for every token.
        token_s=2 * spec.own_params / LINEAR_FLOPS_PER_S + window / PREFILL_ATTENTION_FLOPS_PER_S,
        pair_s=spec.num_layers * spec.prefill_flops_per_pair / PREFILL_ATTENTION_FLOPS_PER_S,
        context_s=spec.num_layers * spec.expand_flops_per_context_token / EXPANSION_FLOPS_PER_S,
        shared_s=2 * spec.routed_params / LINEAR_FLOPS_PER_S,
        send_s=NODES_PER_TOKEN * sent_values * per_value,
    )


def decode_cost(model: str = "deepseek-v3", *, kv_bytes_per_value: float = 2.0) -> DecodeCost:
    """Return the decode costs of a preset model on H800-class ranks, KV cache in BF16 unless said.

    Low-latency kernels send a token once for each of its experts.
    """
    spec, moe = attention_preset(model), model_preset(model)
    assert moe.top_k is not None
    kv_bytes = spec.kv_bytes_per_token(kv_bytes_per_value)
    computing = spec.num_layers * spec.decode_flops_per_pair / DECODE_ATTENTION_FLOPS_PER_S
    values = DISPATCH_BYTES_PER_VALUE + COMBINE_BYTES_PER_VALUE
    return DecodeCost(
        kv_token_s=max(computing, kv_bytes / DECODE_KV_BYTES_PER_S),
        request_s=moe.top_k * _sent_values(model) * values / LOW_LATENCY_BYTES_PER_S,
        fixed_s=DECODE_FIXED_S,
        kv_bytes=kv_bytes,
    )


def _sent_values(model: str) -> int:
    """Return the values of one token that one destination gets, over all layers with experts."""
    moe = model_preset(model)
    assert moe.hidden_size is not None
    return len(moe.layer_ids) * moe.hidden_size


def _check_costs(cost: PrefillCost | DecodeCost, positive: tuple[str, ...]) -> None:
    for name in cost.__slots__:
        value = getattr(cost, name)
        if not 0 <= value < 1e12 or (name in positive and value == 0):
            raise InvalidInput(f"{name} must be a finite cost, not negative, got {value!r}")
