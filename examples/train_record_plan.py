"""Train a small mixture-of-experts language model, record it, plan for it, and see the gain.

``python examples/train_record_plan.py --size small`` takes seconds on a CPU, ``--size full`` some
minutes on a GPU. Two models of transformers are trained from scratch on bytes of four kinds of
text that every Python installation has:

- DeepSeek-V3's router: sigmoid gates, balanced by a bias for each expert that is moved against its
  load after each step (arXiv:2412.19437, section 2.1.2);
- Mixtral's router: softmax gates, balanced by an auxiliary loss (arXiv:2101.03961, section 2.2).

Both are recorded on text they were not trained on, one scenario for each kind. The plan is made
from the first half of the recording and scored on the second half, which is other text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from texts import KINDS, split_texts
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import eplb
from eplb.load_profile import LoadProfile
from eplb.model import MoEModel
from eplb.profiles import read_profile
from eplb.profiles.recorder import record
from eplb.profiles.recorder_layers import find_layers
from eplb.slots import initial_placement
from eplb.topology import Topology


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    hidden: int
    layers: int
    experts: int
    top_k: int
    expert_width: int
    sequence: int
    batch: int
    steps: int
    text_bytes: int
    recorded_steps: int
    ranks: int
    slots_per_rank: int


SIZES = {
    "small": Size(64, 3, 16, 2, 32, 64, 8, 30, 60_000, 6, 4, 5),
    "full": Size(512, 9, 64, 6, 256, 512, 32, 600, 4_000_000, 24, 16, 5),
}
BIAS_RATE = 1e-3


def deepseek(size: Size) -> nn.Module:
    """Return a model with DeepSeek-V3's router; its first layer is dense."""
    head = size.hidden // 8
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=256, hidden_size=size.hidden, num_hidden_layers=size.layers,
            intermediate_size=2 * size.hidden, moe_intermediate_size=size.expert_width,
            n_routed_experts=size.experts, num_experts_per_tok=size.top_k,
            first_k_dense_replace=1, n_group=1, topk_group=1, n_shared_experts=1,
            num_attention_heads=8, num_key_value_heads=8, q_lora_rank=None,
            kv_lora_rank=size.hidden // 4, qk_nope_head_dim=head, qk_rope_head_dim=head,
            v_head_dim=head, max_position_embeddings=size.sequence, pad_token_id=None,
        )
    )  # fmt: skip


def mixtral(size: Size) -> nn.Module:
    """Return a model with Mixtral's router and its auxiliary loss."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=256, hidden_size=size.hidden, num_hidden_layers=size.layers,
            intermediate_size=size.expert_width, num_local_experts=size.experts,
            num_experts_per_tok=size.top_k, num_attention_heads=8, num_key_value_heads=4,
            max_position_embeddings=size.sequence, output_router_logits=True,
            router_aux_loss_coef=0.02, pad_token_id=None,
        )
    )  # fmt: skip


class BiasBalance:
    """Moves each expert's bias against its load: DeepSeek-V3's balancing without a loss."""

    def __init__(self, model: nn.Module) -> None:
        self._loads: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, gate in model.named_modules():
            bias = getattr(gate, "e_score_correction_bias", None)
            if bias is None:
                continue
            load = torch.zeros_like(bias)
            self._loads.append((bias, load))
            experts = model.get_submodule(name.rpartition(".")[0] + ".experts")

            def count(_module: nn.Module, args: Any, load: torch.Tensor = load) -> None:
                ids = args[1].reshape(-1)
                load.index_add_(0, ids, torch.ones_like(ids, dtype=load.dtype))

            experts.register_forward_pre_hook(count)

    def step(self) -> None:
        """Move the biases, and start to count anew."""
        for bias, load in self._loads:
            bias.add_(BIAS_RATE * torch.sign(load.mean() - load))
            load.zero_()


def batches(
    texts: dict[str, NDArray[np.uint8]], kind: str | None, size: Size, device: str, seed: int
) -> Iterator[torch.Tensor]:
    """Yield random sequences of one kind of text, or of all of them."""
    random = np.random.default_rng(seed)
    while True:
        rows = []
        for i in range(size.batch):
            data = texts[kind or KINDS[i % len(KINDS)]]
            start = random.integers(len(data) - size.sequence)
            rows.append(data[start : start + size.sequence].astype(np.int64))
        yield torch.from_numpy(np.stack(rows)).to(device)


def train(
    model: nn.Module, texts: dict[str, NDArray[np.uint8]], size: Size, device: str
) -> list[float]:
    """Train, and return the loss (nats a byte) of each step."""
    model.train()
    balance = BiasBalance(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    losses = []
    for step, tokens in zip(range(size.steps), batches(texts, None, size, device, 0), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / size.steps)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            balance.step()
        losses.append(loss.detach())
    return torch.stack(losses).float().tolist()


def record_kinds(
    model: nn.Module,
    texts: dict[str, NDArray[np.uint8]],
    size: Size,
    device: str,
    path: Path,
) -> None:
    """Record the model on each kind of text: a scenario each, a window a step."""
    model.eval()
    with torch.no_grad(), record(model, path, every_steps=1) as recorder:
        for kind in KINDS:
            recorder.scenario = kind
            stream = batches(texts, kind, size, device, 1)
            for _, tokens in zip(range(size.recorded_steps), stream, strict=False):
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    model(input_ids=tokens, use_cache=False)


def halves(profile: LoadProfile) -> tuple[LoadProfile, LoadProfile]:
    """Return the first and the second half of the windows of each scenario."""
    place = dict.fromkeys(profile.scenarios, 0)
    first, second = [], []
    for window, name in enumerate(profile.scenario_W):
        half = first if place[name] < profile.scenario_W.count(name) // 2 else second
        half.append(window)
        place[name] += 1

    def part(windows: list[int]) -> LoadProfile:
        return replace(
            profile,
            counts_WLE=profile.counts_WLE[windows],
            scenario_W=tuple(profile.scenario_W[w] for w in windows),
            phase_W=tuple(profile.phase_W[w] for w in windows),
            tokens_W=None,
            time_s_W=None,
        )

    return part(first), part(second)


def plan_and_score(path: Path, name: str, size: Size) -> dict[str, Any]:
    """Plan from the first half of a recording, and score the plan on the second."""
    fitted, unseen = halves(read_profile(path))
    topology = Topology(num_nodes=1, ranks_per_node=size.ranks, slots_per_rank=size.slots_per_rank)
    model = MoEModel(
        name=name, num_experts=fitted.num_experts, layer_ids=fitted.layer_ids, top_k=size.top_k
    )
    solution = eplb.solve(eplb.Problem(profile=fitted, model=model, topology=topology))
    start = initial_placement(fitted.layer_ids, fitted.num_experts, topology.num_slots)
    figures: dict[str, Any] = {}
    for kind in (None, *KINDS):
        part = unseen if kind is None else unseen.of_scenario(kind)
        before, after = (
            eplb.evaluate(part, placement, topology, "even")
            for placement in (start, solution.placement)
        )
        figures[kind or "all"] = {
            "before": before.imbalance_mean, "after": after.imbalance_mean
        }  # fmt: skip
    return figures


MODELS: dict[str, Callable[[Size], nn.Module]] = {"deepseek": deepseek, "mixtral": mixtral}


def main() -> None:
    """Run it all, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--folder", type=Path, default=Path(), help="where recordings go")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained, unseen = split_texts(size.text_bytes)
    report: dict[str, Any] = {"device": device, "size": arguments.size}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build(size).to(device)
        start = time.perf_counter()
        losses = train(model, trained, size, device)
        seconds = time.perf_counter() - start
        path = arguments.folder / f"{name}.npz"
        record_kinds(model, unseen, size, device, path)
        figures = plan_and_score(path, name, size)
        layers = len(find_layers(model))
        print(
            f"{name}: {layers} layers of {size.experts} experts, top-{size.top_k}; loss "
            f"{losses[0]:.2f} -> {np.mean(losses[-10:]):.2f} nats a byte in {len(losses)} steps, "
            f"{seconds:.0f} s on {device}; recorded to {path}"
        )
        print(f"  imbalance on other text, EP{size.ranks}x{size.slots_per_rank}:")
        for kind, pair in figures.items():
            print(f"  {kind:8} before {pair['before']:.3f}   after {pair['after']:.3f}")
        report[name] = {
            "loss_first": losses[0], "loss_last": float(np.mean(losses[-10:])),
            "train_s": seconds, "imbalance": figures,
        }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
