"""Tables of docs/runtime.md, from what ``ep_layer.py`` measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["EP_LAYER_TABLES"]

RESULTS = Path(__file__).parent / "results" / "ep-layer.json"


def _results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())["results"]
    return found


def _markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def layer() -> str:
    """Return throughput by plan, both recordings and sizes."""
    body = []
    for name, found in _results().items():
        if "layer" not in found:
            continue
        for plan, figures in found["layer"].items():
            experts = found["experts"].get(plan)
            body.append(
                [
                    f"{name.partition(',')[0]}, {found['tokens_per_rank']:,} tokens a rank",
                    plan,
                    f"{figures['ms']:.2f}",
                    f"{figures['tokens_per_s'] / 1e3:.0f}k",
                    f"{100 * figures['of_even_router']:.1f}%",
                    f"{figures['imbalance_rows']:.3f}",
                    f"{figures['imbalance_tokens']:.3f}",
                    "" if experts is None else f"{experts['slowest_ms']:.2f}",
                ]
            )
    head = [
        "",
        "plan, rule",
        "ms a layer",
        "tokens/s",
        "of the even router",
        "imbalance, rows",
        "imbalance, tokens",
        "experts of the slowest rank alone, ms",
    ]
    return _markdown(head, body) + _measured_on()


def exchange() -> str:
    """Return what dispatch and combine take beside the collective in them."""
    body = []
    for phase in ("prefill", "decode"):
        found = _results()[f"exchange, {phase}"]
        for part in ("dispatch", "combine"):
            alone = found[f"{part}, all_to_all_single"]
            body.append(
                [
                    f"{found['rows_sent']:,} rows of a process",
                    part,
                    f"{found[part]:.3f}",
                    f"{alone:.3f}",
                    f"{100 * (found[part] / alone - 1):+.0f}%",
                ]
            )
        body.append(
            [
                f"{found['rows_sent']:,} rows of a process",
                "counts",
                f"{found['counts']:.3f}",
                "",
                "",
            ]
        )
    return _markdown(["", "", "ms", "all_to_all_single of the same bytes, ms", ""], body)


def overlap() -> str:
    """Return what two micro-batches change."""
    body = []
    for name, found in _results().items():
        for plan, figures in found.get("layer", {}).items():
            if f"{plan}, overlap" in found.get("layer", {}):
                ms = found["layer"][f"{plan}, overlap"]["ms"]
                body.append(
                    [
                        f"{name.partition(',')[0]}, {found['tokens_per_rank']:,} tokens a rank",
                        plan,
                        f"{figures['ms']:.2f}",
                        f"{ms:.2f}",
                        f"{100 * (figures['ms'] / ms - 1):+.0f}%",
                    ]
                )
    return _markdown(["", "", "one batch, ms", "two micro-batches, ms", "tokens/s"], body)


def _measured_on() -> str:
    found = json.loads(RESULTS.read_text())["environment"]
    return (
        f"\n{found['processes']} x {found['device']}, {found['ranks']} ranks, PyTorch "
        f"{found['torch']}, {found['date'][:10]}.\n"
    )


EP_LAYER_TABLES: dict[str, Callable[[], str]] = {
    "ep-layer": layer,
    "ep-exchange": exchange,
    "ep-overlap": overlap,
}
