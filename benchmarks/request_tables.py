"""Tables of docs/requests.md, made from what requests_peers.py and calibrate_requests.py wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from table_format import markdown_table

__all__ = ["REQUEST_TABLES"]

RESULTS = Path(__file__).parent / "results"
OURS = {"prefill": ("eplb", "eplb-level-tokens", "eplb-token-budget"),
        "decode": ("eplb", "eplb-static")}  # fmt: skip


def _results(part: str) -> Any:
    return json.loads((RESULTS / "requests.json").read_text())["results"][part]


def _environment() -> str:
    measured = json.loads((RESULTS / "requests.json").read_text())["environment"]
    return (
        f"\n{measured['processor']}, one thread, Python {measured['python']}, numpy "
        f"{measured['numpy']}, numba {measured['numba']}, {measured['date'][:10]}.\n"
    )


def _interval(figures: dict[str, float], name: str, digits: int = 3) -> str:
    return f"{figures[name]:.{digits}f} ({figures[f'{name}_ci95']:.{digits}f})"


def _comparison(phase: str, columns: dict[str, Callable[[dict[str, float]], str]]) -> str:
    body = []
    for report in _results("comparisons"):
        if report["phase"] != phase:
            continue
        for name, figures in report["policies"].items():
            shown = f"**{name}**" if name in OURS[phase] else name
            body.append([report["name"], shown, *(show(figures) for show in columns.values())])
    return markdown_table(["trace", "policy", *columns], body)


def decode() -> str:
    """Return every policy on every trace, decode."""
    return _comparison(
        "decode",
        {
            "KV max/mean (95%)": lambda f: _interval(f, "kv_imbalance_mean"),
            "requests max/mean (95%)": lambda f: _interval(f, "requests_imbalance_mean"),
            "step balance": lambda f: f"{f['step_balance']:.3f}",
            "tokens/s": lambda f: f"{f['tokens_per_s']:,.0f}",
            "p99 ms a token": lambda f: f"{1e3 * f['time_per_output_token_s_p99']:.1f}",
            "put back": lambda f: f"{f['retractions']:.0f}",
        },
    )


def prefill() -> str:
    """Return every policy on every trace, prefill."""
    return _comparison(
        "prefill",
        {
            "attention max/mean (95%)": lambda f: _interval(f, "attention_imbalance_mean"),
            "tokens max/mean (95%)": lambda f: _interval(f, "tokens_imbalance_mean"),
            "step balance": lambda f: f"{f['step_balance']:.3f}",
            "own part": lambda f: f"{f['own_balance']:.3f}",
            "tokens/s": lambda f: f"{f['tokens_per_s']:,.0f}",
            "p99 wait, s": lambda f: f"{f['wait_s_p99']:.1f}",
            "cached": lambda f: f"{100 * f['cached_part']:.0f}%",
        },
    )


def assign() -> str:
    """Return how near assignments of waiting requests come to their bounds, and how fast."""
    body = [
        [
            row["name"], row["what"].split()[1], str(row["windows"]), str(row["decided_by_giant"]),
            f"{row['tokens_over_bound']:.4f}", f"{row['work_over_bound']:.4f}",
            f"{100 * row['gap_mean']:.2f}% ({100 * row['gap_worst']:.2f}%)",
            f"{row['median_ms']:.2f} ({row['min_ms']:.2f})",
        ]
        for row in _results("timings") if row["what"].startswith("assign")
    ]  # fmt: skip
    head = [
        "trace",
        "requests",
        "windows",
        "of these decided by giants",
        "tokens / bound",
        "attention / bound",
        "gap, both together (worst)",
        "ms, median (least)",
    ]
    return markdown_table(head, body) + _environment()


def place() -> str:
    """Return what the decode balancer costs, and how long replays take."""
    body = []
    for row in _results("timings"):
        if row["what"].startswith("place"):
            arrivals = f"{row['arrivals_per_step']:.0f} arrivals a step"
            what = f"place on 144 ranks, {row['name']}, {arrivals}, a request"
            body.append([what, f"{row['static_us']:.1f} us"])
            body.append([f"{what}, with exchanges", f"{row['with_swaps_us']:.1f} us"])
        elif row["what"].startswith("replay"):
            what = f"replay of {row['requests']:,} requests on 144 ranks, {row['name']}"
            body.append([what, f"{row['seconds']:.1f} s"])
    return markdown_table(["", "time"], body) + _environment()


def sensitivity() -> str:
    """Return throughput of other rules over ours as constants are halved and doubled."""
    body = []
    for row in _results("sensitivity"):
        policies = row["policies"]
        ours = policies["eplb"]
        peers = {n: f for n, f in policies.items() if n not in OURS[row["phase"]]}
        best = max(peers, key=lambda n: peers[n]["tokens_per_s"])
        worst = min(peers, key=lambda n: peers[n]["tokens_per_s"])
        static = policies.get("eplb-static")
        body.append([
            row["phase"], row["name"],
            f"x{row['attention_scale']:g}", f"x{row['send_scale']:g}",
            f"{ours['step_balance']:.3f}",
            "" if static is None else f"{static['tokens_per_s'] / ours['tokens_per_s']:.3f}",
            f"{peers[best]['tokens_per_s'] / ours['tokens_per_s']:.3f} ({best})",
            f"{peers[worst]['tokens_per_s'] / ours['tokens_per_s']:.3f} ({worst})",
        ])  # fmt: skip
    head = ["phase", "trace", "attention", "sending", "eplb: step balance", "eplb-static / eplb",
            "best other / eplb", "worst other / eplb"]  # fmt: skip
    return markdown_table(head, body)


def disturbances() -> str:
    """Return decode under disturbances: KV / requests max/mean, step balance."""
    reports = _results("disturbances")
    names = list(reports[0]["policies"])
    body = [
        [
            row["name"],
            row["what"],
            *(
                f"{f['kv_imbalance_mean']:.3f} / {f['requests_imbalance_mean']:.3f}, "
                f"{f['step_balance']:.3f}"
                for f in row["policies"].values()
            ),
        ]
        for row in reports
    ]
    return markdown_table(["trace", "", *names], body)


def cost() -> str:
    """Return what was measured on a GPU for the cost model."""
    report = json.loads((RESULTS / "request-cost.json").read_text())
    results, measured = report["results"], report["environment"]
    rates = (
        ("linear layers, FP8 (7168 x 18432)", results["linear"]["fp8"]),
        ("linear layers, BF16", results["linear"]["bf16"]),
        ("prefill attention, BF16, 192/128 wide", results["prefill_attention"]),
        ("expansion of latent vectors, BF16", results["expansion"]),
        ("decode attention, BF16, 576/512 wide, plain Triton", results["decode_attention"]),
    )
    body = [
        [name, f"{line['flops_per_s'] / 1e12:,.0f} TFLOP/s", f"{1e6 * line['fixed_s']:.0f} us",
         f"{100 * line['worst_relative_error']:.0f}%"]
        for name, line in rates
    ]  # fmt: skip
    body.append(["memory copy", f"{results['memory']['bytes_per_s'] / 1e12:.2f} TB/s", "", ""])
    head = ["", "rate", "fixed time", "worst error of the line"]
    note = f"\n{measured['device']}, torch {measured['torch']}, {measured['date'][:10]}.\n"
    return markdown_table(head, body) + note


REQUEST_TABLES: dict[str, Callable[[], str]] = {
    "requests-assign": assign,
    "requests-cost": cost,
    "requests-decode": decode,
    "requests-disturbances": disturbances,
    "requests-place": place,
    "requests-prefill": prefill,
    "requests-sensitivity": sensitivity,
}
