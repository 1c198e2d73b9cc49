"""Measure what recording costs a model on a GPU: ``python benchmarks/recorder_cost.py -o FILE``.

The model is transformers' DeepSeek-V3 with random weights, narrow enough for one GPU: 58 layers of
256 experts, top-8, which is the routing of the whole model on layers that take less time. Steps
with and without the recorder alternate in one process; of each kind the median of all steps is
taken, and the cost is the ratio of the two. ``--tiny`` is for machines without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from run import environment
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from eplb.profiles.recorder import Recorder, record

WINDOW_STEPS = 20


def build(device: str, *, tiny: bool) -> nn.Module:
    """Return the model, in evaluation mode."""
    sizes: dict[str, Any] = {
        "hidden_size": 2048, "intermediate_size": 4096, "moe_intermediate_size": 128,
        "num_hidden_layers": 61, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "num_attention_heads": 16, "num_key_value_heads": 16,
        "q_lora_rank": 512, "kv_lora_rank": 256, "vocab_size": 32000,
    }  # fmt: skip
    if tiny:
        sizes |= {
            "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 16,
            "num_hidden_layers": 5, "n_routed_experts": 16, "num_experts_per_tok": 2,
            "n_group": 1, "topk_group": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
            "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
            "v_head_dim": 8, "vocab_size": 256,
        }  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model: nn.Module = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def steps_of(
    model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor | None
) -> Callable[[], Any]:
    """Return what runs one step."""
    return lambda: model(input_ids=tokens, attention_mask=mask, use_cache=False)


def captured(model: nn.Module, tokens: torch.Tensor) -> Callable[[], Any]:
    """Return what replays one step from a CUDA graph."""
    step = steps_of(model, tokens, None)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def recording(model: nn.Module, folder: Path) -> Iterator[Recorder]:
    """Record to a file of its own."""
    with record(model, folder / f"{time.time_ns()}.npz", every_steps=WINDOW_STEPS) as recorder:
        yield recorder


def spent(step: Callable[[], Any], number: int, device: str) -> list[float]:
    """Return milliseconds of each of some steps, waiting for the device between them only."""
    times = []
    for _ in range(number):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def compare(
    off: Callable[[], Any],
    on: Callable[[], Any],
    attached: Callable[[], AbstractContextManager[Any]],
    device: str,
    *,
    blocks: int,
    number: int,
) -> dict[str, Any]:
    """Alternate blocks of steps without and with the recorder."""
    times: dict[str, list[float]] = {"off": [], "on": []}
    spent(off, 3, device)
    for _ in range(blocks):
        times["off"] += spent(off, number, device)
        with attached():
            spent(on, 1, device)
            times["on"] += spent(on, number, device)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    return {"off_ms": medians["off"], "on_ms": medians["on"],
            "cost_percent": 100 * (medians["on"] / medians["off"] - 1),
            "steps": len(times["on"])}  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decode, prefill = (4, 16) if arguments.tiny else (128, 8192)
    blocks, number = (2, 3) if arguments.tiny else (4, 15)
    model = build(device, tiny=arguments.tiny)
    results: dict[str, Any] = {}
    device_bytes = None
    with torch.no_grad(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = torch.randint(3, 256, (decode, 1), device=device)
        large = torch.randint(3, 256, (max(1, prefill // 2048), min(prefill, 2048)), device=device)
        mask = torch.ones_like(large)
        mask[0, : large.shape[1] // 4] = 0

        def attached() -> AbstractContextManager[Any]:
            return recording(model, folder)

        plain = steps_of(model, small, None)
        results["decode, eager"] = compare(
            plain, plain, attached, device, blocks=blocks, number=number
        )
        print(results["decode, eager"], flush=True)
        filled = steps_of(model, large, mask)
        results["prefill, eager, with padding"] = compare(
            filled, filled, attached, device, blocks=blocks, number=max(3, number // 3)
        )
        print(results["prefill, eager, with padding"], flush=True)
        if device == "cuda":
            without = captured(model, small)
            with recording(model, folder) as recorder:
                inside = captured(model, small)
                device_bytes = recorder.device_bytes

                def replay() -> None:
                    inside()
                    recorder.step()

                results["decode, CUDA graph"] = compare(
                    without, replay, nullcontext, device, blocks=blocks, number=number
                )
    for label, figures in results.items():
        print(label, figures)
    if arguments.output:
        hardware = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__,
                    "device": hardware, "decode_tokens": decode,
                    "prefill_tokens": prefill, "device_bytes": device_bytes}  # fmt: skip
        report = {
            "environment": {**environment("random weights and tokens"), **versions},
            "results": results,
        }
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
