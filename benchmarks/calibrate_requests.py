"""Measure what the request cost model is built on: ``python benchmarks/calibrate_requests.py``.

Rates of one GPU at the sizes of DeepSeek-V3: linear layers, prefill attention by pairs, expansion
of latent vectors, decode attention by KV tokens, memory. ``runtime/requests/cost.py`` holds these
rates as constants. ``--device cpu --tiny`` only shows that the script runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eplb.attention import attention_preset

SPEC = attention_preset("deepseek-v3")
HIDDEN, DENSE = 7168, 18432
RESULTS = Path(__file__).parent / "results" / "request-cost.json"
RUNS = 12


def main() -> None:
    """Measure everything and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    tiny: bool = arguments.tiny
    torch.manual_seed(0)
    results = {
        "linear": linear(device, tiny=tiny),
        "prefill_attention": prefill_attention(device, tiny=tiny),
        "expansion": expansion(device, tiny=tiny),
        "decode_attention": decode_attention(device, tiny=tiny),
        "memory": memory(device, tiny=tiny),
    }
    on_gpu = device.type == "cuda"
    environment = {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": RUNS,
        "tiny": tiny,
    }
    report = {"environment": environment, "results": results}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def seconds(device: torch.device, run: Callable[..., Any], *inputs: Any) -> float:
    """Return the median time of a call after warming up."""
    for _ in range(3):
        run(*inputs)
    spent: list[float] = []
    for _ in range(RUNS):
        if device.type == "cuda":
            event: Any = torch.cuda.Event
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            run(*inputs)
            end.record()
            end.synchronize()
            spent.append(float(begin.elapsed_time(end)) / 1e3)
        else:
            start = time.perf_counter()
            run(*inputs)
            spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def fitted(work: Sequence[float], spent: Sequence[float]) -> dict[str, float]:
    """Return the line time = fixed + work / rate, by least squares of relative errors."""
    weight = 1 / np.array(spent)
    rows = np.stack([np.ones(len(work)), np.array(work)], axis=1) * weight[:, None]
    (fixed, slope), *_ = np.linalg.lstsq(rows, np.ones(len(work)), rcond=None)
    predicted = fixed + slope * np.array(work)
    return {
        "fixed_s": float(fixed),
        "flops_per_s": float(1 / slope),
        "worst_relative_error": float(np.abs(predicted / np.array(spent) - 1).max()),
    }


def linear(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Time a dense feed-forward matrix product in BF16, and in FP8 where there is one."""
    hidden, wide, rows = (64, 128, (32, 64)) if tiny else (HIDDEN, DENSE, (1024, 2048, 4096, 8192))
    points = []
    for n in rows:
        a = torch.randn(n, hidden, device=device, dtype=torch.bfloat16)
        b = torch.randn(wide, hidden, device=device, dtype=torch.bfloat16)
        flops = 2.0 * n * hidden * wide
        point = {"rows": n, "flops": flops, "bf16_s": seconds(device, torch.matmul, a, b.T)}
        if device.type == "cuda":
            a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
            point["fp8_s"] = seconds(device, _fp8_product, a8, b8.T, torch.ones((), device=device))
        points.append(point)
    kinds = [kind for kind in ("bf16", "fp8") if f"{kind}_s" in points[0]]
    return {
        "points": points,
        **{
            kind: fitted([p["flops"] for p in points], [p[f"{kind}_s"] for p in points])
            for kind in kinds
        },
    }


def _fp8_product(a: Any, b: Any, one: Any) -> Any:
    return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def prefill_attention(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Time expanded MLA attention of chunks (192 wide queries and keys, 128 wide values)."""
    heads = 2 if tiny else SPEC.num_heads
    chunks = (
        [(16, 0), (16, 32)]
        if tiny
        else [(2048, 0), (4096, 0), (8192, 0), (1024, 16384), (2048, 32768), (512, 65536)]
    )
    points: list[dict[str, Any]] = []
    for new, before in chunks:
        shape = (1, heads, new, SPEC.qk_head_dim)
        q = torch.randn(shape, device=device, dtype=torch.bfloat16)
        k = torch.randn(1, heads, before + new, SPEC.qk_head_dim, device=device,
                        dtype=torch.bfloat16)  # fmt: skip
        v = torch.randn(1, heads, before + new, SPEC.v_head_dim, device=device,
                        dtype=torch.bfloat16)  # fmt: skip
        # Behind a long context the last rows are all but full: masking saves nothing there.
        pairs = new * (new + 1) / 2 if before == 0 else float(new * (before + new))
        causal = before == 0
        kind, spent = _attention_s(q, k, v, device, causal=causal)
        points.append({"new_tokens": new, "context": before, "pairs": pairs, "kernel": kind,
                       "time_s": spent})  # fmt: skip
    flops = [p["pairs"] * 2 * heads * (SPEC.qk_head_dim + SPEC.v_head_dim) for p in points]
    return {"points": points, **fitted(flops, [p["time_s"] for p in points])}


def _attention_s(
    q: Any, k: Any, v: Any, device: torch.device, *, causal: bool
) -> tuple[str, float]:
    """Return the fastest kernel of torch that takes these, and its time."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: PLC0415

    attend = torch.nn.functional.scaled_dot_product_attention
    wide_v = torch.nn.functional.pad(v, (0, q.shape[-1] - v.shape[-1]))
    best = ("none", float("inf"))
    for name, backend, values in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION, v),
        ("cudnn, padded values", SDPBackend.CUDNN_ATTENTION, wide_v),
        ("flash, padded values", SDPBackend.FLASH_ATTENTION, wide_v),
        ("math", SDPBackend.MATH, v),
    ):
        if (name == "math") == (device.type == "cuda"):
            continue
        try:
            with sdpa_kernel(backend):
                spent = seconds(device, partial(attend, is_causal=causal), q, k, values)
        except RuntimeError:
            continue
        best = min(best, (name, spent), key=lambda found: found[1])
    return best


def expansion(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Time the product that turns latent vectors into keys and values of all heads."""
    rows = (32, 64) if tiny else (4096, 16384, 65536)
    heads = 2 if tiny else SPEC.num_heads
    wide = heads * (SPEC.qk_head_dim - SPEC.rope_dim + SPEC.v_head_dim)
    weight = torch.randn(SPEC.kv_lora_rank, wide, device=device, dtype=torch.bfloat16)
    points = []
    for n in rows:
        latent = torch.randn(n, SPEC.kv_lora_rank, device=device, dtype=torch.bfloat16)
        spent = seconds(device, torch.matmul, latent, weight)
        points.append({"tokens": n, "flops": 2.0 * n * SPEC.kv_lora_rank * wide, "time_s": spent})
    return {
        "points": points,
        **fitted([p["flops"] for p in points], [p["time_s"] for p in points]),
    }


def decode_attention(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Time absorbed MLA attention of a decode batch."""
    heads, sizes = (2, [(2, 32), (2, 64)]) if tiny else (128, [(32, 2048), (64, 4096), (88, 5120)])
    configs: list[dict[str, int] | None] = [None]
    if device.type == "cuda":
        configs = [
            {"block_h": h, "block_n": n, "warps": w, "stages": s}
            for h, n, w, s in (
                (16, 64, 4, 2), (32, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 1), (64, 32, 8, 1),
                (64, 64, 8, 2),
            )
        ]  # fmt: skip
    best: tuple[dict[str, int] | None, list[dict[str, Any]]] | None = None
    failed = []
    for config in configs:
        try:
            points = [_decode_point(device, heads, batch, context, config)
                      for batch, context in sizes]  # fmt: skip
        except Exception as error:  # noqa: BLE001
            failed.append({"config": config, "error": f"{type(error).__name__}: {error}"[:200]})
            continue
        if best is None or points[-1]["time_s"] < best[1][-1]["time_s"]:
            best = config, points
    if best is None:
        return {"failed": failed}
    config, points = best
    per_token = 2 * heads * (2 * SPEC.kv_lora_rank + SPEC.rope_dim)
    return {
        "kernel": "torch" if config is None else "Triton, benchmarks/mla_decode.py",
        "config": config,
        "points": points,
        "failed": failed,
        **fitted([p["kv_tokens"] * per_token for p in points], [p["time_s"] for p in points]),
    }


def _decode_point(
    device: torch.device, heads: int, batch: int, context: int, config: dict[str, int] | None
) -> dict[str, Any]:
    q = torch.randn(batch, heads, 576, device=device, dtype=torch.bfloat16)
    kv = torch.randn(batch, context, 576, device=device, dtype=torch.bfloat16)
    expected = _reference(q[:1], kv[:1])
    run: Callable[..., Any] = _reference
    if config is not None:
        from mla_decode import mla_decode  # noqa: PLC0415

        splits = max(1, 264 * config["block_h"] // (batch * heads))
        run = partial(mla_decode, splits=splits, **config)
    found = run(q, kv)[:1].float()
    error = float((found - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise RuntimeError(f"wrong result, relative error {error}")
    spent = seconds(device, run, q, kv)
    return {"batch": batch, "context": context, "kv_tokens": batch * context, "time_s": spent,
            "relative_error": error}  # fmt: skip


def _reference(q: Any, kv: Any) -> Any:
    score = torch.einsum("bhd,bld->bhl", q.float(), kv.float()) / 192**0.5
    return torch.einsum("bhl,bld->bhd", score.softmax(dim=-1), kv[..., :512].float())


def memory(device: torch.device, *, tiny: bool) -> dict[str, float]:
    """Time a copy, counting what is read and written."""
    source = torch.empty(1 << (12 if tiny else 31), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    spent = seconds(device, target.copy_, source)
    return {"bytes_per_s": 2 * source.numel() / spent}


if __name__ == "__main__":
    main()
