"""Attention of the preset models: what a request costs and how much KV cache it holds.

MoE placement needs none of this; the request balancers do. A *pair* is a query token and a key
token it attends to, in one layer and over all heads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from eplb.errors import InvalidInput, unknown_name

__all__ = ["ATTENTION_PRESETS", "AttentionSpec", "attention_preset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Attention of one model, and the weights a token meets.

    Parameters
    ----------
    name : str
        Of the model, as in ``MODEL_PRESETS``.
    num_layers : int
        Layers whose KV cache grows with the context.
    num_heads : int
    qk_head_dim, v_head_dim : int
        Of a query or key head and of a value head, with rotary dimensions.
    kv_values : int
        Values cached for a token in one layer.
    kv_lora_rank, rope_dim : int
        Of multi-head latent attention (MLA); 0 for others (GQA, MHA).
    num_window_layers, window_tokens : int
        Further layers that attend to the last ``window_tokens`` only.
    own_params : int
        Weights that a token meets on its own rank over all layers: attention projections, dense
        feed-forward layers, shared experts, routers.
    routed_params : int
        Weights that a token meets in its routed experts over all layers.

    Raises
    ------
    InvalidInput
        A figure that is not a whole number in its range.
    """

    name: str
    num_layers: int
    num_heads: int
    qk_head_dim: int
    v_head_dim: int
    kv_values: int
    kv_lora_rank: int = 0
    rope_dim: int = 0
    num_window_layers: int = 0
    window_tokens: int = 0
    own_params: int
    routed_params: int

    def __post_init__(self) -> None:
        optional = {"kv_lora_rank", "rope_dim", "num_window_layers", "window_tokens"}
        for field in fields(self)[1:]:
            value, least = getattr(self, field.name), 0 if field.name in optional else 1
            if type(value) is not int or value < least:
                raise InvalidInput(
                    f"{field.name} must be a whole number of at least {least}, got {value!r}"
                )

    @property
    def is_mla(self) -> bool:
        """Whether keys and values are cached as one latent vector."""
        return self.kv_lora_rank > 0

    @property
    def prefill_flops_per_pair(self) -> int:
        """Operations of a pair in one layer: scores and values, all heads, keys expanded.

        Two operations a multiply-add (FlashMLA, docs/20250422-new-kernel-deep-dive.md).
        """
        return 2 * self.num_heads * (self.qk_head_dim + self.v_head_dim)

    @property
    def decode_flops_per_pair(self) -> int:
        """Operations of a pair in one layer as decode computes it: MLA on the latent vectors."""
        if not self.is_mla:
            return self.prefill_flops_per_pair
        return 2 * self.num_heads * (2 * self.kv_lora_rank + self.rope_dim)

    @property
    def expand_flops_per_context_token(self) -> int:
        """Operations that turn one cached latent vector into the keys and values of all heads.

        Prefill of MLA does it in each layer for each token of the context, and again for each
        chunk of a prompt. 0 without MLA.
        """
        nope_dim = self.qk_head_dim - self.rope_dim
        return 2 * self.kv_lora_rank * self.num_heads * (nope_dim + self.v_head_dim)

    def kv_bytes_per_token(self, bytes_per_value: float = 2.0) -> float:
        """KV cache of one token over all layers that keep the whole context."""
        return self.num_layers * self.kv_values * bytes_per_value


def _gated(hidden: int, intermediate: int) -> int:
    return 3 * hidden * intermediate


def _mla(
    name: str, *, hidden: int, layers: int, dense: int, heads: int, q_rank: int, dense_size: int,
    expert_size: int, experts: int, top_k: int, shared: int, kv_rank: int = 512, nope: int = 128,
    rope: int = 64, v: int = 128,
) -> AttentionSpec:  # fmt: skip
    """Return the attention of a DeepSeek-style model; arguments as in its config.json."""
    queries = heads * (nope + rope)
    query_params = hidden * q_rank + q_rank * queries if q_rank else hidden * queries
    projections = (
        query_params + hidden * (kv_rank + rope) + kv_rank * heads * (nope + v) + heads * v * hidden
    )
    sparse = layers - dense
    return AttentionSpec(
        name=name, num_layers=layers, num_heads=heads, qk_head_dim=nope + rope, v_head_dim=v,
        kv_values=kv_rank + rope, kv_lora_rank=kv_rank, rope_dim=rope,
        own_params=layers * projections + dense * _gated(hidden, dense_size)
        + sparse * (shared * _gated(hidden, expert_size) + hidden * experts),
        routed_params=sparse * top_k * _gated(hidden, expert_size),
    )  # fmt: skip


def _gqa(
    name: str, *, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int,
    expert_size: int, experts: int, top_k: int, dense: int = 0, dense_size: int = 0,
    shared: int = 0, window_layers: int = 0, window: int = 0,
) -> AttentionSpec:  # fmt: skip
    """Return the attention of a grouped-query model; arguments as in its config.json."""
    projections = hidden * head_dim * (2 * heads + 2 * kv_heads)
    sparse = layers - dense
    return AttentionSpec(
        name=name, num_layers=layers - window_layers, num_heads=heads, qk_head_dim=head_dim,
        v_head_dim=head_dim, kv_values=2 * kv_heads * head_dim,
        num_window_layers=window_layers, window_tokens=window,
        own_params=layers * projections + dense * _gated(hidden, dense_size)
        + sparse * (shared * _gated(hidden, expert_size) + hidden * experts),
        routed_params=sparse * top_k * _gated(hidden, expert_size),
    )  # fmt: skip


# Each row is the config.json published with the model on Hugging Face: hidden_size,
# num_hidden_layers, first_k_dense_replace, num_attention_heads, num_key_value_heads, head_dim (or
# q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim), intermediate_size,
# moe_intermediate_size, the numbers of experts, sliding_window and layer_types. Models with
# attention of other kinds (Qwen3-Next, Llama 4) are left out rather than approximated.
ATTENTION_PRESETS: dict[str, AttentionSpec] = {
    spec.name: spec
    for spec in (
        _mla("deepseek-v3", hidden=7168, layers=61, dense=3, heads=128, q_rank=1536,
             dense_size=18432, expert_size=2048, experts=256, top_k=8, shared=1),
        _mla("deepseek-v2", hidden=5120, layers=60, dense=1, heads=128, q_rank=1536,
             dense_size=12288, expert_size=1536, experts=160, top_k=6, shared=2),
        _mla("deepseek-v2-lite", hidden=2048, layers=27, dense=1, heads=16, q_rank=0,
             dense_size=10944, expert_size=1408, experts=64, top_k=6, shared=2),
        _mla("kimi-k2", hidden=7168, layers=61, dense=1, heads=64, q_rank=1536,
             dense_size=18432, expert_size=2048, experts=384, top_k=8, shared=1),
        _gqa("qwen3-235b-a22b", hidden=4096, layers=94, heads=64, kv_heads=4, head_dim=128,
             expert_size=1536, experts=128, top_k=8),
        _gqa("qwen3-30b-a3b", hidden=2048, layers=48, heads=32, kv_heads=4, head_dim=128,
             expert_size=768, experts=128, top_k=8),
        _gqa("mixtral-8x7b", hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128,
             expert_size=14336, experts=8, top_k=2),
        _gqa("gpt-oss-120b", hidden=2880, layers=36, heads=64, kv_heads=8, head_dim=64,
             expert_size=2880, experts=128, top_k=4, window_layers=18, window=128),
        _gqa("gpt-oss-20b", hidden=2880, layers=24, heads=64, kv_heads=8, head_dim=64,
             expert_size=2880, experts=32, top_k=4, window_layers=12, window=128),
        _gqa("glm-4.5", hidden=5120, layers=92, heads=96, kv_heads=8, head_dim=128,
             expert_size=1536, experts=160, top_k=8, dense=3, dense_size=12288, shared=1),
        _gqa("minimax-m2", hidden=3072, layers=62, heads=48, kv_heads=8, head_dim=128,
             expert_size=1536, experts=256, top_k=8),
    )
}  # fmt: skip


def attention_preset(name: str) -> AttentionSpec:
    """Return a preset by the name of its model.

    Raises
    ------
    InvalidInput
        The name is unknown, or the model's attention is.
    """
    if name not in ATTENTION_PRESETS:
        raise unknown_name("model with known attention", name, ATTENTION_PRESETS)
    return ATTENTION_PRESETS[name]
