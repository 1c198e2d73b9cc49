"""``eplb requests``: the request balancers and other schedulers' rules on a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from eplb.attention import ATTENTION_PRESETS
from eplb.cli.options import Name, as_json
from eplb.errors import InvalidInput

if TYPE_CHECKING:
    from eplb.profiles.request_trace import RequestTrace
    from eplb.runtime.requests.compare import Settings

__all__ = ["command"]

F = TypeVar("F", bound=Callable[..., Any])
DEPLOYMENT = (
    click.argument("trace_path", metavar="TRACE", type=click.Path()),
    click.option(
        "--phase", type=Name("phase", ("prefill", "decode")), required=True, help="Which ranks."
    ),
    click.option("--ranks", type=click.IntRange(min=1), required=True, help="Data-parallel ranks."),
    click.option(
        "--model",
        type=Name("model preset", ATTENTION_PRESETS),
        default="deepseek-v3",
        show_default=True,
        help="Prices attention and KV cache: " + ", ".join(ATTENTION_PRESETS) + ".",
    ),
    click.option(
        "--utilisation",
        type=click.FloatRange(min=0, max=2, min_open=True),
        default=0.8,
        show_default=True,
        help="Part of the KV cache (or of the requests) that is kept filled.",
    ),
    click.option(
        "--kv-tokens",
        type=click.IntRange(min=1),
        default=455_000,
        show_default=True,
        help="KV cache of a rank.",
    ),
    click.option(
        "--max-requests",
        type=click.IntRange(min=1),
        help="Requests of a rank.  [default: 128 in decode, 32 in prefill]",
    ),
    click.option(
        "--budget-tokens",
        type=click.IntRange(min=1),
        default=8192,
        show_default=True,
        help="Prefill: new tokens of a rank and step.",
    ),
    click.option(
        "--token-skew",
        type=click.FloatRange(min=1),
        default=1.5,
        show_default=True,
        help="Prefill: tokens of a rank over the mean, at most.",
    ),
    click.option(
        "--cache",
        type=Name("cache", ("rank", "shared", "none")),
        default="rank",
        show_default=True,
        help="Prefill: prefix caches, for traces that have prefix blocks.",
    ),
    click.option(
        "--max-bad-lines", type=click.IntRange(min=0), help="Unreadable lines that are left out."
    ),
)


def deployment(function: F) -> F:
    """Add the options of a deployment."""
    for add in reversed(DEPLOYMENT):
        function = add(function)
    return function


@click.group("requests")
def command() -> None:
    """Balance requests over data-parallel ranks: replay traces, compare policies.

    TRACE is a csv with the columns arrival_s, prompt_tokens and output_tokens, Azure's csv,
    Mooncake's jsonl (each also as .gz), or a folder with ServeGen's statistics.
    """


@command.command("compare")
@deployment
@click.option(
    "--policies", metavar="NAMES", help="Comma-separated names instead of all; see the docs."
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Runs of each policy, whose means are reported.",
)
@as_json
def compare_command(
    trace_path: str, policies: str | None, seeds: int, json_: bool, **options: Any
) -> None:
    """Run the balancers and clones of other schedulers on the same requests.

    \b
    eplb requests compare trace.csv --phase decode --ranks 144
    """
    from eplb.cli import show
    from eplb.runtime.requests.compare import compare, policy_names

    settings = settings_of(options)
    trace = _read(trace_path, options["max_bad_lines"])
    names = policies.split(",") if policies is not None else policy_names(settings.phase)
    with show.progress("replaying"):
        report = compare(trace, settings, [name.strip() for name in names], range(seeds))
    if json_:
        click.echo(json.dumps(report))
        return
    out = show.console()
    out.print(_headline(trace, settings))
    out.print()
    pair = _objectives(settings.phase)
    latency = "time_per_output_token_s_p99" if settings.phase == "decode" else "wait_s_p99"
    last_column = "p99 ms a token" if settings.phase == "decode" else "p99 wait, s"
    columns = [name.replace("_mean", "").replace("_", " ") for name in pair]
    grid = show.table("policy", *columns, "step balance", "tokens/s", last_column)
    for name, figures in report["policies"].items():
        last = figures[latency]
        grid.add_row(
            name,
            *(show.ratio(figures[key]) for key in (*pair, "step_balance")),
            f"{figures['tokens_per_s']:,.0f}",
            f"{1e3 * last:.1f}" if settings.phase == "decode" else f"{last:.1f}",
        )
    out.print(grid)


@command.command("replay")
@deployment
@click.option("--policy", default="eplb", show_default=True, metavar="NAME",
              help="One of those that eplb requests compare shows.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--abort", type=click.FloatRange(min=0, max=1), default=0.0, show_default=True,
              help="Decode: part of the requests that is aborted.")  # fmt: skip
@click.option("--lose-rank", type=click.IntRange(min=0), help="A rank that dies.")
@click.option("--lose-step", type=click.IntRange(min=0), default=100, show_default=True,
              help="When it dies.")  # fmt: skip
@click.option("--slow-rank", type=click.IntRange(min=0), help="A rank that is slower than others.")
@click.option("--slow-speed", type=click.FloatRange(min=0, min_open=True), default=0.8,
              show_default=True, help="Its speed.")  # fmt: skip
@click.option("--feedback-steps", type=click.IntRange(min=0), default=0, show_default=True,
              help="Decode: how late the balancer hears of finished requests.")  # fmt: skip
@click.option("--plot", type=click.Path(), metavar="FILE", help="Draw it: .png, .svg or .pdf.")
@as_json
def replay_command(
    trace_path: str, policy: str, seed: int, plot: str | None, json_: bool, **options: Any
) -> None:
    """Run one policy, with aborts, a lost or slow rank and late feedback where wanted.

    \b
    eplb requests replay trace.csv --phase prefill --ranks 32 --policy eplb --plot prefill.svg
    """
    from eplb.cli import show
    from eplb.files import check_writable, write_atomic
    from eplb.runtime.requests.compare import replay
    from eplb.runtime.requests.plots import FORMATS, draw

    kind = "" if plot is None else Path(plot).suffix.lower().removeprefix(".")
    if plot is not None:
        if kind not in FORMATS:
            raise InvalidInput(f"--plot {plot}: pictures are {', '.join(FORMATS)}; name one")
        check_writable(plot)
    settings = settings_of(options)
    trace = _read(trace_path, options["max_bad_lines"])
    with show.progress("replaying"):
        result = replay(trace, settings, policy, seed)
    if plot is not None:
        write_atomic(plot, draw(result, settings, kind))
    if json_:
        report = {"phase": settings.phase, "policy": policy, "seed": seed, "trace": trace.source,
                  "notes": list(trace.notes), **result.figures}  # fmt: skip
        click.echo(json.dumps(report if plot is None else {**report, "plot": plot}))
        return
    out = show.console()
    out.print(_headline(trace, settings))
    grid = show.table(policy, "")
    for name, value in result.figures.items():
        grid.add_row(name.replace("_", " "), f"{value:,.4g}")
    out.print(grid)
    if plot is not None:
        out.print(f"Drawn: {show.name(plot)}")


def settings_of(options: dict[str, Any]) -> Settings:
    """Return the deployment that the options describe."""
    from eplb.runtime.requests.compare import Settings
    from eplb.runtime.requests.disturbances import Disturbances

    upset = Disturbances(
        abort_part=options.get("abort", 0.0),
        lost_rank=options.get("lose_rank"),
        lost_step=options.get("lose_step", 0),
        slow_rank=options.get("slow_rank"),
        slow_speed=options.get("slow_speed", 0.8),
        feedback_steps=options.get("feedback_steps", 0),
    )
    same = ("phase", "model", "utilisation", "kv_tokens", "max_requests", "budget_tokens",
            "token_skew", "cache")  # fmt: skip
    return Settings(
        num_ranks=options["ranks"], disturbances=upset, **{name: options[name] for name in same}
    )


def _objectives(phase: str) -> tuple[str, str]:
    """Return the names of the two balance figures."""
    if phase == "decode":
        return "kv_imbalance_mean", "requests_imbalance_mean"
    return "attention_imbalance_mean", "tokens_imbalance_mean"


def _read(path: str, max_bad_lines: int | None) -> RequestTrace:
    """Read a trace and say what its reader left out."""
    from eplb.profiles.servegen import sample_servegen
    from eplb.profiles.trace_files import read_trace

    if Path(path).is_dir():
        trace = sample_servegen(path)
    else:
        trace = read_trace(path, max_bad_lines=max_bad_lines)
    for note in trace.notes:
        click.echo(f"eplb: warning: {trace.source}: {note}", err=True)
    return trace


def _headline(trace: RequestTrace, settings: Settings) -> str:
    from rich.markup import escape

    from eplb.cli import show

    return (
        f"{escape(trace.source)}: {show.plural(trace.num_requests, 'request')}, prompts "
        f"{trace.prompt_tokens_Q.mean():,.0f} and outputs {trace.output_tokens_Q.mean():,.0f} "
        f"tokens on average; {settings.phase} on {show.plural(settings.num_ranks, 'rank')}, "
        f"{settings.model}, {show.percent(settings.utilisation)} full"
    )
