"""Compare the request balancers with other schedulers' rules on recorded traces.

``python benchmarks/requests_peers.py FOLDER -o benchmarks/results/requests.json``, where FOLDER has
the traces named below and ``servegen`` statistics; those that are absent are left out. Steps are
simulated, their times modelled (docs/requests.md); what is timed is the balancers themselves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
from run import environment

from eplb.profiles.request_trace import RequestTrace
from eplb.profiles.servegen import sample_servegen
from eplb.profiles.trace_files import read_trace
from eplb.runtime.requests import PrefillBalancer, PrefillRequest, RankState
from eplb.runtime.requests.compare import Settings, compare, policy_names, replay
from eplb.runtime.requests.cost import decode_cost
from eplb.runtime.requests.decode import DecodeOptions
from eplb.runtime.requests.decode_replay import EplbDecode, replay_decode
from eplb.runtime.requests.disturbances import Disturbances
from eplb.runtime.requests.workload import Capacity, decode_workload

TRACES = {
    "chat (Azure conv)": "requests/azure2023_conv.csv",
    "code (Azure code)": "requests/azure2023_code.csv",
    "long context (Mooncake)": "requests/mooncake_fast25_synthetic.csv",
    "long context, prefixes (Mooncake)": "requests/mooncake_synthetic_trace.jsonl.gz",
    "ShareGPT": "requests/sharegpt300_qwen3-30b-a3b.csv",
    "R1-like (ServeGen sample)": "servegen_deepseek_r1",
}
RANKS = {"prefill": 32, "decode": 144}
SEEDS = range(5)
# Sensitivity and disturbances: fewer policies, traces and seeds.
SHORT = ("eplb", "eplb-static", "join-shortest-queue", "sglang-total-requests",
         "sglang-total-tokens", "vllm", "tensorrt-llm")  # fmt: skip
SHORT_TRACES = ("chat (Azure conv)", "long context (Mooncake)", "R1-like (ServeGen sample)")
SHORT_SEEDS = range(2)


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", help="one part: comparisons, sensitivity, disturbances, timings")
    parser.add_argument("--phase", help="run one phase again and keep the other's results")
    arguments = parser.parse_args()
    traces = {name: read(arguments.folder / path) for name, path in TRACES.items()
              if (arguments.folder / path).exists()}  # fmt: skip
    parts: dict[str, Callable[[dict[str, RequestTrace], list[str]], Iterator[dict[str, Any]]]] = {
        "timings": timings,
        "comparisons": comparisons,
        "sensitivity": sensitivity,
        "disturbances": disturbances,
    }
    kept: dict[str, list[dict[str, Any]]] = {}
    if (arguments.only or arguments.phase) and arguments.output.exists():
        kept = json.loads(arguments.output.read_text())["results"]
    phases = [phase for phase in RANKS if arguments.phase in {None, phase}]
    results = dict(kept)
    for name, part in parts.items():
        if arguments.only not in {None, name} or (name == "timings" and arguments.phase):
            continue
        others = [row for row in kept.get(name, ()) if row.get("phase", phases[0]) not in phases]
        results[name] = others + list(part(traces, phases))
    report = {
        "environment": {
            **environment("request traces that are not part of this project; simulated steps"),
            "numba": numba.__version__,
            "seeds": len(SEEDS),
        },
        "results": results,
    }
    arguments.output.write_text(json.dumps(_rounded(report), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Return the same with numbers of six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


def read(path: Path) -> RequestTrace:
    """Read a trace, or sample one from statistics."""
    return sample_servegen(path) if path.is_dir() else read_trace(path)


def comparisons(traces: dict[str, RequestTrace], phases: list[str]) -> Iterator[dict[str, Any]]:
    """Every policy on every trace."""
    for name, trace in traces.items():
        for phase in phases:
            if phase == "decode" and trace.has_blocks:
                continue
            settings = Settings(phase=phase, num_ranks=RANKS[phase])
            start = time.perf_counter()
            yield {"name": name, **compare(trace, settings, policy_names(phase), list(SEEDS))}
            print(f"{phase} {name}: {time.perf_counter() - start:.0f} s", flush=True)


def sensitivity(traces: dict[str, RequestTrace], phases: list[str]) -> Iterator[dict[str, Any]]:
    """Cost constants halved and doubled."""
    for name in SHORT_TRACES:
        if name not in traces:
            continue
        for phase in phases:
            names = [p for p in SHORT if p in policy_names(phase)]
            for attention, send in ((0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0)):
                settings = Settings(phase=phase, num_ranks=RANKS[phase], attention_scale=attention,
                                    send_scale=send)  # fmt: skip
                yield {
                    "name": name, "attention_scale": attention, "send_scale": send,
                    **compare(traces[name], settings, names, list(SHORT_SEEDS)),
                }  # fmt: skip
                print(f"sensitivity {phase} {name} {attention} {send}", flush=True)


def disturbances(traces: dict[str, RequestTrace], phases: list[str]) -> Iterator[dict[str, Any]]:
    """Aborts, late feedback, a lost and a slow rank, fuller ranks, in decode."""
    for name in SHORT_TRACES:
        if name not in traces or "decode" not in phases:
            continue
        for what, upset, utilisation in (
            ("50% full", Disturbances(), 0.5),
            ("95% full", Disturbances(), 0.95),
            ("5% aborted", Disturbances(abort_part=0.05), 0.8),
            ("feedback a step late", Disturbances(feedback_steps=1), 0.8),
            ("feedback 20 steps late", Disturbances(feedback_steps=20), 0.8),
            ("a rank lost", Disturbances(lost_rank=7, lost_step=300), 0.8),
            ("a rank at 80% speed", Disturbances(slow_rank=7), 0.8),
        ):
            settings = Settings(phase="decode", num_ranks=RANKS["decode"], disturbances=upset,
                                utilisation=utilisation)  # fmt: skip
            names = ("eplb", "eplb-static", "vllm", "tensorrt-llm")
            yield {"name": name, "what": what,
                   **compare(traces[name], settings, names, list(SHORT_SEEDS))}  # fmt: skip
        print(f"disturbances {name}", flush=True)


def timings(traces: dict[str, RequestTrace], _: list[str]) -> Iterator[dict[str, Any]]:
    """Time of an assignment and how good it is, of a placement, and of a long replay."""
    for name, trace in traces.items():
        for count in (256, 1024):
            yield {"what": f"assign {count} requests to 32 ranks", "name": name,
                   **_assign(trace, count)}  # fmt: skip
    for name in SHORT_TRACES:
        if name in traces:
            yield {"what": "place on 144 ranks", "name": name, **_place(traces[name])}
    chat = traces.get(SHORT_TRACES[0])
    if chat is not None:
        for policy in ("eplb", "vllm"):
            yield {"what": "replay a million requests on 144 ranks", "name": policy,
                   **_long_replay(chat, policy)}  # fmt: skip


def _assign(trace: RequestTrace, count: int) -> dict[str, float]:
    """Return ratios to the bounds and milliseconds over consecutive windows of a trace."""
    balancer, ranks = PrefillBalancer(), [RankState() for _ in range(32)]
    prompts = np.resize(trace.prompt_tokens_Q, max(count, len(trace.prompt_tokens_Q)))
    tokens, work, gaps, spent, decided = [], [], [], [], 0
    for k in range(min(20, len(prompts) // count)):
        requests = [PrefillRequest(request_id=q, prompt_tokens=int(n))
                    for q, n in enumerate(prompts[k * count : (k + 1) * count])]  # fmt: skip
        balancer.assign(requests, ranks)
        start = time.perf_counter()
        result = balancer.assign(requests, ranks)
        spent.append(time.perf_counter() - start)
        gaps.append(result.gap)
        # Bounds on both at once are above the single ones where a giant request fills a rank.
        decided += result.bound > 1.002
        tokens.append(result.tokens_max / result.tokens_bound)
        work.append(result.work_max_s / result.work_bound_s)
    return {
        "windows": len(gaps), "decided_by_giant": decided,
        "tokens_over_bound": statistics.mean(tokens), "work_over_bound": statistics.mean(work),
        "gap_mean": statistics.mean(gaps), "gap_worst": max(gaps),
        "median_ms": 1e3 * statistics.median(spent), "min_ms": 1e3 * min(spent),
    }  # fmt: skip


class _Timed(EplbDecode):
    """Counts the time spent in the balancer."""

    spent_s, placed = 0.0, 0

    def settle(self, ranks: Any, step: int, ended: Any, retracted: Any) -> tuple[float, int]:
        """Act between two steps, on the clock."""
        count = len(self.arrived)
        start = time.perf_counter()
        result = super().settle(ranks, step, ended, retracted)
        if step >= 0:
            self.spent_s += time.perf_counter() - start
            self.placed += count
        return result


def _place(trace: RequestTrace) -> dict[str, float]:
    """Return microseconds a request of everything the balancer does, with and without swaps."""
    capacity, cost = Capacity(num_ranks=144), decode_cost()
    steps = 400
    workload = decode_workload(trace, capacity, num_steps=steps, seed=0)
    figures = {}
    # The first run compiles.
    for label, swaps in (("with_swaps_us", 8), ("static_us", 0), ("with_swaps_us", 8)):
        policy = _Timed(capacity, cost, DecodeOptions(max_swaps=swaps), Disturbances())
        replay_decode(workload, capacity, cost, policy, num_steps=steps, seed=0)
        figures[label] = 1e6 * policy.spent_s / policy.placed
        figures[f"{label.removesuffix('_us')}_us_per_step"] = 1e6 * policy.spent_s / steps
    return {"arrivals_per_step": policy.placed / steps, **figures}


def _long_replay(trace: RequestTrace, policy: str) -> dict[str, float]:
    """Return seconds for so many steps that a million requests arrive."""
    settings = Settings(phase="decode", num_ranks=144)
    replay(trace, settings, policy)
    capacity = settings.capacity
    steps = 14_500
    workload = decode_workload(trace, capacity, num_steps=steps, seed=0)
    runner: Any = EplbDecode(capacity, settings.decode_cost, DecodeOptions(), Disturbances())
    if policy != "eplb":
        from eplb.runtime.requests.decode_replay import RuleDecode  # noqa: PLC0415
        from eplb.runtime.requests.rules import RULES  # noqa: PLC0415

        runner = RuleDecode(RULES[policy], capacity, 0)
    start = time.perf_counter()
    replay_decode(workload, capacity, settings.decode_cost, runner, num_steps=steps, seed=0)
    return {"requests": len(workload.arrival_Q), "steps": steps,
            "seconds": time.perf_counter() - start}  # fmt: skip


if __name__ == "__main__":
    main()
