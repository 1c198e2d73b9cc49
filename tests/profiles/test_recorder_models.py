"""The recorder on models of transformers: every family, compiled, generating, and misused."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5")

import torch
from check_family import check_family
from families import NOT_EXPERTS, VOCABULARY, families, tiny_model
from torch import nn

from eplb.errors import InvalidInput
from eplb.profiles import read_profile
from eplb.profiles.recorder import record
from eplb.profiles.recorder_layers import find_layers

FAMILIES = families()
# Those that users of such a tool come with first.
EXPECTED = {
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text",
    "mixtral", "olmoe", "gpt_oss", "glm4_moe", "llama4_text", "minimax", "minimax_m2",
    "kimi_linear",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "loads.npz"


def tokens(*shape, seed=0):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def test_over_sixty_families_are_there():
    assert set(FAMILIES) >= EXPECTED
    assert len(set(FAMILIES) - set(NOT_EXPERTS)) > 60


@pytest.mark.filterwarnings("ignore")  # of the models' own code
@pytest.mark.parametrize("name", FAMILIES)
def test_counts_of_every_family_are_exact(name, tmp_path):
    if name in NOT_EXPERTS:
        with pytest.raises(InvalidInput):
            find_layers(tiny_model(name))
        pytest.skip(NOT_EXPERTS[name])
    check_family(name, tmp_path)


def plain_counts(path, model, batches, mask):
    with torch.no_grad(), record(model, path, every_steps=2):
        for ids in batches:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    return read_profile(path)


def test_compiled_models_are_recorded(tmp_path):
    torch.manual_seed(0)
    model = tiny_model("qwen3_moe")
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    batches = [tokens(2, 7, seed=i) for i in range(4)]
    plain = plain_counts(tmp_path / "plain.npz", model, batches, mask)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    seen = plain_counts(tmp_path / "compiled.npz", compiled, batches, mask)
    assert np.array_equal(seen.counts_WLE, plain.counts_WLE)
    assert seen.tokens_W.tolist() == plain.tokens_W.tolist() == [22, 22]


def test_a_model_compiled_before_says_what_to_do(path, caplog):
    torch.compiler.reset()
    model = torch.compile(tiny_model("qwen3_moe"), backend="aot_eager")
    with torch.no_grad():
        model(input_ids=tokens(2, 7), use_cache=False)
        with record(model, path):
            model(input_ids=tokens(2, 7), use_cache=False)
    if not path.exists():
        assert "torch.compiler.reset() lets it" in caplog.text
    else:  # this version of torch looks for hooks itself
        assert read_profile(path).tokens_W.tolist() == [14]


def test_generation_counts_what_a_server_would_run(path):
    torch.manual_seed(0)
    model = tiny_model("mixtral")
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    inputs = {"input_ids": tokens(2, 4), "attention_mask": mask, "do_sample": False}
    script = [[5, 5], [2, 5], [0, 5], [0, 2]]

    class Script:
        step = 0

        def __call__(self, _ids, scores):
            forced = torch.full_like(scores, -torch.inf)
            for row, token in enumerate(script[self.step]):
                forced[row, token] = 0
            self.step += 1
            return forced

    with record(model, path, every_steps=1000):
        out = model.generate(**inputs, max_new_tokens=6, logits_processor=[Script()])
    assert out.shape[1] == 8
    profile = read_profile(path)
    assert profile.phase_W == ("prefill", "decode")
    # Prefill: 2 + 4 tokens. Decode steps get (5, 5), then (2, 5) and (0, 5): the first sequence
    # has ended by then.
    assert profile.tokens_W.tolist() == [6, 4]
    with record(model, path.with_name("all.npz"), every_steps=1000, count_finished=True):
        model.generate(**inputs, max_new_tokens=6, logits_processor=[Script()])
    assert read_profile(path.with_name("all.npz")).tokens_W.tolist() == [6, 6]


def test_two_recorders_on_one_model(path):
    model = tiny_model("mixtral")
    with record(model, path):
        with pytest.raises(InvalidInput, match=r"is being recorded to .*loads\.npz; close that"):
            record(model, path.with_name("other.npz"))
        assert not path.with_name("other.npz.journal").exists()
    record(model, path.with_name("other.npz")).close()


def test_closing_detaches(path):
    model = tiny_model("mixtral")
    record(model, path).close()
    hooks = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert hooks == []


def test_a_dense_model_is_refused(path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, vocab_size=16)  # fmt: skip
    with pytest.raises(InvalidInput, match="LlamaForCausalLM has no mixture-of-experts layer"):
        record(LlamaForCausalLM(config), path)


@pytest.mark.filterwarnings("ignore")  # of transformers, about its own names
def test_gradient_checkpointing_counts_once(path):
    torch.manual_seed(0)
    model = tiny_model("mixtral").train()
    model.gradient_checkpointing_enable()
    with record(model, path):
        ids = tokens(2, 7)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert read_profile(path).counts_WLE.sum() == 3 * 2 * 14


def test_parts_called_alone_say_where_to_attach(path, caplog):
    model = tiny_model("mixtral")
    with record(model, path), torch.no_grad():
        model.model(input_ids=tokens(2, 7), use_cache=False)
    assert "attach it to the part that is called" in caplog.text
    with record(model.model, path), torch.no_grad():
        model(input_ids=tokens(2, 7), use_cache=False)
    assert read_profile(path).tokens_W.tolist() == [14]


def test_a_mask_that_arguments_lack(path):
    model = tiny_model("mixtral")
    with record(model, path) as recorder, torch.no_grad():
        recorder.mask_next(torch.tensor([[1, 1, 0]]))
        model(input_ids=tokens(1, 3), use_cache=False)
        model(input_ids=tokens(1, 3), use_cache=False)
    assert read_profile(path).tokens_W.tolist() == [5]


class Experts(nn.Module):
    """Experts as transformers calls them, in a model whose layers the tests choose."""

    num_experts = 4

    def __init__(self, change=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.change = change

    def forward(self, hidden_states, top_k_index, top_k_weights):
        if self.change:
            top_k_index.add_(1)
        return hidden_states


class Layers(nn.Module):
    """A decoder of such layers, each under its id."""

    def __init__(self, names, **more):
        super().__init__()
        for name in names:
            parent = self
            *folders, last = name.split(".")
            for folder in folders:
                if not hasattr(parent, folder):
                    parent.add_module(folder, nn.Module())
                parent = getattr(parent, folder)
            parent.add_module(last, Experts(**more))

    def forward(self, input_ids):
        for module in list(self.modules()):
            if isinstance(module, Experts):
                ids = torch.zeros(input_ids.numel(), 2, dtype=torch.long)
                module(input_ids, ids, ids)


def test_one_id_for_two_layers_is_refused(path):
    model = Layers(["encoder.layers.3.experts", "decoder.layers.3.experts"])
    with pytest.raises(InvalidInput, match=r"layer id 3 stands for .* and for"):
        record(model, path)


def test_layers_of_multi_token_prediction_are_known_by_name(path):
    model = Layers(["layers.0.experts", "layers.1.experts", "mtp.layers.0.experts"])
    model.config = type("Config", (), {"num_hidden_layers": 2})()
    with record(model, path):
        model(torch.zeros(1, 3))
    assert read_profile(path).layer_ids == (0, 1)
    assert read_profile(f"{path}:mtp_counts").layer_ids == (2,)


def test_choices_that_are_changed_in_place_are_never_counted_wrong(path, caplog):
    model = Layers(["layers.0.experts", "layers.1.experts"], change=True)
    with record(model, path, every_steps=1):
        for _ in range(3):
            model(torch.zeros(1, 3))
    counts = read_profile(path).counts_WLE
    assert counts.tolist() == [[[6, 0, 0, 0]] * 2] * 2
    assert caplog.text.count("changed in place") == 1
