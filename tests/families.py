"""A tiny random model of every language model of transformers that has experts.

Those that stand inside of multimodal models are taken out of them.

Sizes are given by name to whichever configuration knows the name; ``SPECIAL`` has what single
families insist on.
"""

from __future__ import annotations

import importlib
import inspect
import re

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

VOCABULARY = 128
SIZES = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32,
    "intermediate_size": 48, "moe_intermediate_size": 16, "ffn_hidden_size": 32,
    "expert_ffn_hidden_size": 16, "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 3, "num_layers": 3, "n_layer": 3, "n_layers": 3,
    "num_attention_heads": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_heads": 2, "linear_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_num_heads": 4, "mamba_head_dim": 16,
    "max_position_embeddings": 64, "sliding_window": 8, "vocab_size": VOCABULARY,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYER_LISTS = ("layer_types", "mlp_layer_types", "attn_layer_types")

SPECIAL: dict[str, dict[str, object]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 8,
                       "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "gemma4_text": {"enable_moe_block": True, "vocab_size_per_layer_input": VOCABULARY,
                    "hidden_size_per_layer_input": 8},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                           "mrope_section": [1, 1, 0]}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "hy_v4_vl_text": {"qk_rope_head_dim": 64, "index_head_dim": 64},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [16, 16], "head_dim": 16, "hidden_size": 64,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                            "mrope_section": [3, 3, 2]}},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "jamba": {"layer_types": None, "attn_layer_offset": 1, "attn_layer_period": 2,
              "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 2, "head_dim": 8, "zero_expert_num": 4},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "full_attention"], "layer_types": None,
                   "n_groups": 2},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                       "indexer_budget": 8, "indexer_compress_ratio": 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

_TWO_STACKS = "an encoder and a decoder whose layers have the same ids; no causal language model"
# What is called experts and cannot be recorded, with the reason.
NOT_EXPERTS: dict[str, str] = {
    "doge": "retrieves rows of an embedding by product keys inside of one module; no experts",
    "granite_docling_text": "routes densities of its vision tower",
    "nllb-moe": _TWO_STACKS,
    "switch_transformers": _TWO_STACKS,
}


def families() -> list[str]:
    """Names of the language models whose code has experts or routers of them, one a file."""
    found: dict[str, str] = {}
    for name in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_MAPPING_NAMES):
        if name not in CONFIG_MAPPING:
            continue
        try:
            source = inspect.getsource(module := _modeling(name))
        except ModuleNotFoundError:
            continue  # code that lives on the hub
        if module.__name__ in found or not re.search(
            r"class \w*(Experts|TopKGating|Router|CDMoE)\w*\(", source
        ):
            continue
        kind = CONFIG_MAPPING[name]().get_text_config().model_type
        found[module.__name__] = kind if _architecture(kind) else name
    return sorted(found.values())


def tiny_model(name: str, **more):
    """Return the tiny model of a family, in evaluation mode."""
    whole = CONFIG_MAPPING[name]()
    text = whole.get_text_config()
    sizes = {key: value for key, value in SIZES.items() if _knows(text, key)}
    for key in LAYER_LISTS:
        kinds = getattr(text, key, None)
        if isinstance(kinds, (list, tuple)) and len(kinds) > 3:
            every = list(dict.fromkeys(kinds))[:3]
            sizes[key] = every + every[-1:] * (3 - len(every))
    if "qk_rope_head_dim" in sizes:
        # Multi-head latent attention has as many key heads as heads.
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes.update(SPECIAL.get(name, {}))
    sizes.update(more)
    sizes = {key: value for key, value in sizes.items() if value is not None}
    module, architecture = _modeling(name), _architecture(name) or ""
    if text.model_type != name:
        architecture = next(a for a in vars(module) if a.endswith("TextModel"))
    return getattr(module, architecture)(type(text)(**sizes)).eval()


def _architecture(name: str) -> str | None:
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES):
        if name in mapping:
            return mapping[name] if isinstance(mapping[name], str) else mapping[name][0]
    return None


def _knows(config, key: str) -> bool:
    try:
        return hasattr(config, key)
    except Exception:  # noqa: BLE001
        # Families whose layers differ refuse to tell one value for all of them.
        return key in inspect.signature(type(config).__init__).parameters


def _modeling(name: str):
    return importlib.import_module(
        CONFIG_MAPPING[name].__module__.replace("configuration_", "modeling_")
    )
