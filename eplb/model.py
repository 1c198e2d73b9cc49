"""Mixture-of-experts models: which decoder layers have experts, how many, and how large."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from eplb.errors import InvalidInput, unknown_name

__all__ = ["MODEL_PRESETS", "UNKNOWN_MODEL", "MoEModel", "model_preset"]

# The name of a model that nothing names.
UNKNOWN_MODEL = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEModel:
    """What placement has to know of a model. ``None`` means not known.

    Parameters
    ----------
    name : str
    num_experts : int
        Routed logical experts of a layer.
    layer_ids : tuple of int
        Absolute decoder ids of the layers with experts, increasing. Layers of multi-token
        prediction come after the last decoder layer.
    num_layers : int, optional
        Decoder layers, dense ones included.
    top_k : int, optional
        Routed experts a token chooses.
    num_groups, groups_per_token : int
        Group-limited routing: expert groups of a layer, and how many of them a token may use.
        1 and 1 where routing is not limited.
    hidden_size : int, optional
    expert_bytes : int, optional
        Weights of one routed expert of one layer as served (scales of block-quantised formats
        left out).
    num_shared_experts : int
        Experts that every token visits; each rank holds them, so no plan places them.
    revision : str, optional
        Of the checkpoint.

    Raises
    ------
    InvalidInput
        Figures that contradict each other.
    """

    name: str
    num_experts: int
    layer_ids: tuple[int, ...]
    num_layers: int | None = None
    top_k: int | None = None
    num_groups: int = 1
    groups_per_token: int = 1
    hidden_size: int | None = None
    expert_bytes: int | None = None
    num_shared_experts: int = 0
    revision: str | None = None

    def __post_init__(self) -> None:
        if type(self.name) is not str or not self.name:
            raise InvalidInput(f"the name of a model must be text, got {self.name!r}")
        if self.revision is not None and type(self.revision) is not str:
            raise InvalidInput(f"the revision of a model must be text, got {self.revision!r}")
        ids = tuple(self.layer_ids)
        if not is_layer_ids(ids):
            raise InvalidInput(
                "layer_ids must be whole numbers from 0 on, increasing, at least one; got "
                f"{list(ids[:6])}"
            )
        object.__setattr__(self, "layer_ids", ids)
        for field in ("num_experts", "num_groups", "groups_per_token"):
            _check_count(field, getattr(self, field), least=1)
        for field in ("num_layers", "top_k", "hidden_size", "expert_bytes"):
            if getattr(self, field) is not None:
                _check_count(field, getattr(self, field), least=1)
        _check_count("num_shared_experts", self.num_shared_experts, least=0)
        if self.top_k is not None and self.top_k > self.num_experts:
            raise InvalidInput(
                f"top_k ({self.top_k}) must not exceed num_experts ({self.num_experts})"
            )
        if self.num_experts % self.num_groups:
            raise InvalidInput(
                f"num_experts ({self.num_experts}) must be divisible by num_groups "
                f"({self.num_groups})"
            )
        if self.groups_per_token > self.num_groups:
            raise InvalidInput(
                f"groups_per_token ({self.groups_per_token}) must not exceed num_groups "
                f"({self.num_groups})"
            )


def is_layer_ids(ids: tuple[object, ...]) -> bool:
    """Return whether these can be the ids of layers: whole, from 0 on, increasing, not none."""
    numbers = [i for i in ids if type(i) is int]
    return (
        0 < len(ids) == len(numbers)
        and numbers[0] >= 0
        and all(a < b for a, b in itertools.pairwise(numbers))
    )


def _check_count(field: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise InvalidInput(f"{field} must be a whole number of at least {least}, got {value!r}")


def _gated_bytes(hidden_size: int, intermediate_size: int, bytes_per_weight: float) -> int:
    """Bytes of one gated feed-forward expert: gate, up and down projections."""
    return round(3 * hidden_size * intermediate_size * bytes_per_weight)


_FP8, _BF16 = 1, 2
# MXFP4 as gpt-oss ships it: 4 bits a weight and one 8-bit scale for each 32 weights.
_MXFP4 = (4 + 8 / 32) / 8

# Each row is the config.json published with the model on Hugging Face: num_hidden_layers, the
# layers with experts (first_k_dense_replace, moe_layer_freq or interleave_moe_layer_step),
# n_routed_experts / num_experts / num_local_experts, num_experts_per_tok, n_group, topk_group,
# hidden_size, n_shared_experts, and moe_intermediate_size in the format the weights ship in.
# gpt-oss experts also carry BF16 biases of 2 x intermediate + hidden values.
MODEL_PRESETS: dict[str, MoEModel] = {
    model.name: model
    for model in (
        # deepseek-ai/DeepSeek-V3 and -R1 (same shapes; FP8 in blocks of 128 x 128)
        MoEModel(name="deepseek-v3", num_layers=61, layer_ids=tuple(range(3, 61)),
                 num_experts=256, top_k=8, num_groups=8, groups_per_token=4, hidden_size=7168,
                 num_shared_experts=1, expert_bytes=_gated_bytes(7168, 2048, _FP8)),
        # deepseek-ai/DeepSeek-V2
        MoEModel(name="deepseek-v2", num_layers=60, layer_ids=tuple(range(1, 60)),
                 num_experts=160, top_k=6, num_groups=8, groups_per_token=3, hidden_size=5120,
                 num_shared_experts=2, expert_bytes=_gated_bytes(5120, 1536, _BF16)),
        # deepseek-ai/DeepSeek-V2-Lite
        MoEModel(name="deepseek-v2-lite", num_layers=27, layer_ids=tuple(range(1, 27)),
                 num_experts=64, top_k=6, hidden_size=2048, num_shared_experts=2,
                 expert_bytes=_gated_bytes(2048, 1408, _BF16)),
        # Qwen/Qwen3-235B-A22B
        MoEModel(name="qwen3-235b-a22b", num_layers=94, layer_ids=tuple(range(94)),
                 num_experts=128, top_k=8, hidden_size=4096,
                 expert_bytes=_gated_bytes(4096, 1536, _BF16)),
        # Qwen/Qwen3-30B-A3B
        MoEModel(name="qwen3-30b-a3b", num_layers=48, layer_ids=tuple(range(48)),
                 num_experts=128, top_k=8, hidden_size=2048,
                 expert_bytes=_gated_bytes(2048, 768, _BF16)),
        # Qwen/Qwen3-Next-80B-A3B-Instruct
        MoEModel(name="qwen3-next-80b-a3b", num_layers=48, layer_ids=tuple(range(48)),
                 num_experts=512, top_k=10, hidden_size=2048, num_shared_experts=1,
                 expert_bytes=_gated_bytes(2048, 512, _BF16)),
        # moonshotai/Kimi-K2-Instruct (FP8 in blocks of 128 x 128)
        MoEModel(name="kimi-k2", num_layers=61, layer_ids=tuple(range(1, 61)),
                 num_experts=384, top_k=8, hidden_size=7168, num_shared_experts=1,
                 expert_bytes=_gated_bytes(7168, 2048, _FP8)),
        # mistralai/Mixtral-8x7B-v0.1
        MoEModel(name="mixtral-8x7b", num_layers=32, layer_ids=tuple(range(32)),
                 num_experts=8, top_k=2, hidden_size=4096,
                 expert_bytes=_gated_bytes(4096, 14336, _BF16)),
        # openai/gpt-oss-120b
        MoEModel(name="gpt-oss-120b", num_layers=36, layer_ids=tuple(range(36)),
                 num_experts=128, top_k=4, hidden_size=2880,
                 expert_bytes=_gated_bytes(2880, 2880, _MXFP4) + 3 * 2880 * _BF16),
        # openai/gpt-oss-20b
        MoEModel(name="gpt-oss-20b", num_layers=24, layer_ids=tuple(range(24)),
                 num_experts=32, top_k=4, hidden_size=2880,
                 expert_bytes=_gated_bytes(2880, 2880, _MXFP4) + 3 * 2880 * _BF16),
        # meta-llama/Llama-4-Maverick-17B-128E: experts in every second layer
        MoEModel(name="llama4-maverick", num_layers=48, layer_ids=tuple(range(1, 48, 2)),
                 num_experts=128, top_k=1, hidden_size=5120, num_shared_experts=1,
                 expert_bytes=_gated_bytes(5120, 8192, _BF16)),
        # meta-llama/Llama-4-Scout-17B-16E
        MoEModel(name="llama4-scout", num_layers=48, layer_ids=tuple(range(48)),
                 num_experts=16, top_k=1, hidden_size=5120, num_shared_experts=1,
                 expert_bytes=_gated_bytes(5120, 8192, _BF16)),
        # zai-org/GLM-4.5
        MoEModel(name="glm-4.5", num_layers=92, layer_ids=tuple(range(3, 92)),
                 num_experts=160, top_k=8, hidden_size=5120, num_shared_experts=1,
                 expert_bytes=_gated_bytes(5120, 1536, _BF16)),
        # MiniMaxAI/MiniMax-M2 (FP8 in blocks of 128 x 128)
        MoEModel(name="minimax-m2", num_layers=62, layer_ids=tuple(range(62)),
                 num_experts=256, top_k=8, hidden_size=3072,
                 expert_bytes=_gated_bytes(3072, 1536, _FP8)),
    )
}  # fmt: skip


def model_preset(name: str) -> MoEModel:
    """Return a preset by name.

    Raises
    ------
    InvalidInput
        The name is unknown.
    """
    if name not in MODEL_PRESETS:
        raise unknown_name("model preset", name, MODEL_PRESETS)
    return MODEL_PRESETS[name]
