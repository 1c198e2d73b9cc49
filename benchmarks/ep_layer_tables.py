"""Tables of docs/runtime.md, from what ``ep_layer.py`` measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from table_format import markdown_table

__all__ = ["EP_LAYER_TABLES"]

RESULTS = Path(__file__).parent / "results" / "ep-layer.json"


def _results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())["results"]
    return found


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
    return markdown_table(head, body) + _measured_on()


def exchange() -> str:
    """Return what dispatch and combine take beside the collective that moves the same bytes."""
    body = []
    for phase in ("prefill", "decode"):
        found = _results()[f"exchange, {phase}"]
        for part in ("dispatch", "return", "combine"):
            alone = found[f"{'dispatch' if part == 'dispatch' else 'return'}, all_to_all_single"]
            for way, name in (("peer memory", part), ("collectives", f"{part}, collectives")):
                body.append(
                    [f"{found['rows_sent']:,} rows of a process", part, way, f"{found[name]:.3f}",
                     f"{alone:.3f}", f"{100 * (found[name] / alone - 1):+.0f}%"]
                )  # fmt: skip
        rows = f"{found['rows_sent']:,} rows of a process"
        body.append([rows, "counts", "collectives", f"{found['counts']:.3f}", "", ""])
    return markdown_table(["", "", "by", "ms", "all_to_all_single of the same bytes, ms", ""], body)


def overlap() -> str:
    """Return what two micro-batches change."""
    body = []
    for name, found in _results().items():
        plans = found.get("layer", {})
        for plan, figures in plans.items():
            if f"{plan}, overlap" not in plans:
                continue
            phase = "prefill" if found["tokens_per_rank"] > 1000 else "decode"
            moved = _results()[f"exchange, {phase}"]
            whole, overlapped, in_turn = (
                one["ms"]
                for one in (figures, plans[f"{plan}, overlap"], plans[f"{plan}, halves in turn"])
            )
            hidden = (in_turn - overlapped) / (moved["dispatch"] + moved["combine"])
            body.append(
                [f"{name.partition(',')[0]}, {found['tokens_per_rank']:,} tokens a rank", plan,
                 f"{whole:.2f}", f"{in_turn:.2f}", f"{overlapped:.2f}",
                 f"{100 * (whole / overlapped - 1):+.0f}%", f"{100 * hidden:.0f}%"]
            )  # fmt: skip
    head = ["", "", "one batch, ms", "two halves in turn, ms", "two micro-batches, ms",
            "tokens/s of two micro-batches", "of the communication hidden"]  # fmt: skip
    return markdown_table(head, body)


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
