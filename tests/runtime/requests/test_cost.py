"""The cost model: published figures, and what chunks add up to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb.attention import ATTENTION_PRESETS, AttentionSpec, attention_preset
from eplb.errors import InvalidInput
from eplb.model import MODEL_PRESETS
from eplb.runtime.requests import DecodeCost, decode_cost, prefill_cost
from eplb.runtime.requests.cost import chunk_pairs


def test_deepseek_v3_has_its_published_figures():
    spec = attention_preset("deepseek-v3")
    # FlashMLA: head dimensions 192/128 expanded and 576/512 absorbed, 128 heads.
    assert spec.prefill_flops_per_pair == 2 * 128 * (192 + 128)
    assert spec.decode_flops_per_pair == 2 * 128 * (576 + 512)
    # DeepSeek-V3: 70 KB of KV cache a token, 37B parameters a token (with the output head).
    assert spec.kv_bytes_per_token() == 70_272
    head = 2 * 7168 * 129_280
    assert (spec.own_params + spec.routed_params + head) / 1e9 == pytest.approx(37.5, abs=0.3)


@pytest.mark.parametrize(
    ("name", "kilobytes"), [("qwen3-30b-a3b", 98.304), ("qwen3-235b-a22b", 192.512),
                            ("mixtral-8x7b", 131.072), ("kimi-k2", 70.272)]
)  # fmt: skip
def test_kv_bytes_of_other_models(name, kilobytes):
    assert attention_preset(name).kv_bytes_per_token() == 1e3 * kilobytes


@pytest.mark.parametrize("name", ATTENTION_PRESETS)
def test_every_preset_has_a_price(name):
    assert name in MODEL_PRESETS
    prefill, decode = prefill_cost(name), decode_cost(name)
    assert prefill.chunk_s(1000, 0) > 0
    assert decode.step_s(1e5, 50) > decode.fixed_s
    assert (prefill.context_s > 0) == attention_preset(name).is_mla
    # Routed and own weights make up the experts' size times those chosen.
    moe = MODEL_PRESETS[name]
    assert attention_preset(name).routed_params % (len(moe.layer_ids) * moe.top_k) == 0


def test_a_decode_step_of_deepseeks_published_load_takes_what_they_publish():
    # 84-92 requests a rank, 4,989 tokens each, 20-22 tokens/s a user.
    assert decode_cost().step_s(88 * 4989, 88) == pytest.approx(1 / 21, rel=0.05)


@given(before=st.integers(0, 10**5), sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=5))
def test_pairs_do_not_depend_on_how_a_prompt_is_cut(before, sizes):
    at, parts = before, 0.0
    for size in sizes:
        parts += chunk_pairs(size, at)
        at += size
    assert parts == pytest.approx(chunk_pairs(sum(sizes), before))
    assert parts == sum(range(before + 1, at + 1))


def test_scaled_costs():
    cost = prefill_cost().scaled(attention=2, send=0.5)
    assert cost.pair_s == 2 * prefill_cost().pair_s
    assert cost.send_s == 0.5 * prefill_cost().send_s
    assert decode_cost().scaled(attention=2).kv_token_s == 2 * decode_cost().kv_token_s
    assert np.isclose(decode_cost(kv_bytes_per_value=1.0).kv_bytes, 35_136)


def test_bad_figures_are_named():
    with pytest.raises(InvalidInput, match="did you mean 'deepseek-v3'"):
        attention_preset("deepseek-v33")
    with pytest.raises(InvalidInput, match="kv_token_s"):
        DecodeCost(kv_token_s=0, request_s=1, fixed_s=1, kv_bytes=1)
    with pytest.raises(InvalidInput, match="num_heads"):
        AttentionSpec(name="x", num_layers=1, num_heads=0, qk_head_dim=1, v_head_dim=1,
                      kv_values=1, own_params=1, routed_params=1)  # fmt: skip
