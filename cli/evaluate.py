"""``eplb evaluate``: what a plan makes of loads, fitted to or not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from eplb.cli.options import (
    Name,
    as_json,
    phase_option,
    profile_arguments,
    read_windows,
    windows_option,
)
from eplb.errors import InvalidInput
from eplb.split import SPLIT_RULES

if TYPE_CHECKING:
    from eplb.load_profile import LoadProfile
    from eplb.metrics import Balance
    from eplb.noise import StepNoise
    from eplb.plan import Plan

__all__ = ["command"]


@click.command("evaluate")
@click.argument("plan_path", metavar="PLAN", type=click.Path())
@profile_arguments
@click.option(
    "--split",
    type=Name("split rule", SPLIT_RULES),
    help="Score under this rule instead of the plan's own.",
)
@click.option(
    "--routings",
    metavar="FILE",
    help="Token routings [tokens, layers, top_k] (.npy, or FILE.npz:ARRAY): adds the tokens that "
    "ranks receive, each counted once a rank.",
)
@click.option(
    "--tokens-per-step",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Adds what steps of so many tokens would show: sampling noise, and the part of it that no "
    "placement can remove.",
)
@windows_option
@phase_option
@as_json
def command(
    plan_path: str,
    profiles: tuple[str, ...],
    split: str | None,
    routings: str | None,
    tokens_per_step: int | None,
    windows: Any,
    phase: str | None,
    json_: bool,
) -> None:
    """Score a plan on every window of some loads, without fitting anything.

    \b
    eplb evaluate plan.yaml tomorrow.npz
    """
    from eplb.cli.show import progress
    from eplb.metrics import evaluate
    from eplb.noise import step_noise
    from eplb.plan_file import read_plan

    plan = read_plan(plan_path)
    split = split or plan.split
    with progress("reading profiles"):
        profile = read_windows(profiles, windows, phase)
    with progress("evaluating"):
        balance = evaluate(profile, plan.placement, plan.topology, split)
        tokens = None if routings is None else _tokens(routings, plan, split)
        noise = (
            None
            if tokens_per_step is None
            else step_noise(
                profile,
                plan.placement,
                plan.topology,
                split,
                tokens_per_step=tokens_per_step,
                top_k=_top_k(plan, profile),
            )
        )
    if json_:
        report: dict[str, object] = {"plan": plan_path, "split": split, **balance.to_dict()}
        if tokens is not None:
            report["receive_tokens"] = tokens
        if noise is not None:
            report["step_noise"] = noise.to_dict()
        click.echo(json.dumps(report))
        return
    _show(plan, profile, balance, split, tokens)
    if noise is not None:
        _show_noise(noise, balance)


def _top_k(plan: Plan, profile: LoadProfile) -> int:
    """Return how many experts a token chooses, as far as plan or profile tell."""
    if plan.model.top_k is not None:
        return plan.model.top_k
    if profile.tokens_W is not None and profile.tokens_W.sum() > 0:
        choices = float(profile.counts_WLE.sum(axis=2).max(axis=1).sum())
        return max(1, round(choices / float(profile.tokens_W.sum())))
    raise InvalidInput(
        "--tokens-per-step needs to know how many experts a token chooses, and neither the plan "
        "nor the profile says; plan with --model, or record tokens"
    )


def _show_noise(noise: StepNoise, balance: Balance) -> None:
    from eplb.cli import show

    grid = show.table(f"steps of {show.rows(noise.tokens_per_step)} tokens", "imbalance")
    grid.add_row("as recorded", show.ratio(balance.imbalance_mean))
    grid.add_row("expected of a step, mean", show.ratio(noise.imbalance_mean))
    grid.add_row("expected of a step, p95", show.ratio(noise.imbalance_p95))
    if noise.floor is not None:
        grid.add_row("noise that no placement removes", show.ratio(noise.floor))
    out = show.console()
    out.print()
    out.print(grid)
    enough = "long enough to plan from" if noise.long_enough else "too short: record more"
    out.print(
        f"The recording has {show.rows(noise.recorded_choices)} token-expert pairs a layer, whose "
        f"own noise is worth {noise.recording_noise:.4f}: {enough}."
    )
    if noise.dispersion > 1:
        out.print(f"Loads vary {noise.dispersion:.1f} times as much as independent choices would.")


def _tokens(routings: str, plan: Plan, split: str) -> dict[str, float]:
    """Return the figures of tokens received, for the routings as sampled."""
    from eplb.metrics import imbalance
    from eplb.profiles import read_routings
    from eplb.receive import receive_tokens

    topk_TLK = read_routings(routings)
    received_LR = receive_tokens(topk_TLK, plan.placement, plan.topology, split)
    return {
        "tokens": len(topk_TLK),
        "max_receive_tokens_mean": float(received_LR.max(axis=1).mean()),
        "max_receive_tokens_worst": float(received_LR.max()),
        "imbalance_mean": float(imbalance(received_LR, plan.topology).mean()),
        "ranks_per_token_mean": float(received_LR.sum(axis=1).mean() / len(topk_TLK)),
    }


def _show(
    plan: Plan, profile: LoadProfile, balance: Balance, split: str, tokens: dict[str, float] | None
) -> None:
    from eplb.cli import show
    from eplb.metrics import imbalance, rank_load, step_costs
    from eplb.model import UNKNOWN_MODEL

    out = show.console()
    out.print(show.profile_line(profile))
    known = plan.model.name != UNKNOWN_MODEL
    of_model = f" for {show.name(plan.model.name)}" if known else ""
    out.print(f"[bold]{plan.topology.label}[/] plan{of_model}, split {split}")
    out.print()
    load_WLR = rank_load(profile, plan.placement, plan.topology, split)
    out.print(show.layer_table(profile, [("imbalance", balance, load_WLR)]))
    out.print()
    fitted = plan.quality if plan.split == split else None
    figures = show.table("", "here", *(["when planned"] if fitted else []))
    was = {"imbalance, mean": fitted.imbalance_mean, "imbalance, worst window":
           fitted.imbalance_worst} if fitted else {}  # fmt: skip
    for name, value in (
        ("imbalance, mean", balance.imbalance_mean),
        ("imbalance, p95 of windows", balance.imbalance_p95),
        ("imbalance, worst window", balance.imbalance_worst),
        ("imbalance, worst layer", balance.imbalance_worst_layer),
        ("balancedness", balance.balancedness),
    ):
        figures.add_row(name, show.ratio(value), show.ratio(was[name]) if name in was else None)
    figures.add_row("max dispatch receive, rows", show.rows(balance.max_receive_rows_mean))
    if tokens is not None:
        figures.add_row(
            f"max dispatch receive, tokens (of {show.rows(tokens['tokens'])})",
            show.rows(tokens["max_receive_tokens_mean"]),
        )
        figures.add_row("imbalance of tokens, mean", show.ratio(tokens["imbalance_mean"]))
        figures.add_row("ranks a token is sent to", f"{tokens['ranks_per_token_mean']:.2f}")
    out.print(figures)
    if profile.num_windows > 1:
        out.print()
        out.print(
            show.window_table([("this plan", step_costs(imbalance(load_WLR, plan.topology)))])
        )
    if len(balance.by_scenario) > 1:
        out.print()
        grid = show.table("scenario", "mean", "p95", "worst", "balancedness")
        for name, part in balance.by_scenario.items():
            grid.add_row(
                show.plain(name),
                *map(show.ratio, (part.imbalance_mean, part.imbalance_p95, part.imbalance_worst,
                                  part.balancedness)),
            )  # fmt: skip
        out.print(grid)
    if fitted:
        out.print()
        excess, planned = balance.imbalance_mean - 1, fitted.imbalance_mean - 1
        out.print(
            f"A step costs {show.percent(excess)} more than balanced ranks would here, "
            f"{show.percent(planned)} on the loads it was planned for."
        )
