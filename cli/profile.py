"""``eplb profile``: look at recorded loads, convert, compare, split and follow them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from eplb.cli.engine_options import moe_layers_option
from eplb.cli.options import Name, as_json, profile_arguments, read_windows, windows_option
from eplb.cli.profile_windows import drift_command, merge_command, scenarios_command
from eplb.cli.watch import watch_command
from eplb.model import MODEL_PRESETS

if TYPE_CHECKING:
    from eplb.arrays import FloatArray
    from eplb.profiles import ProfileSummary

__all__ = ["command"]


@click.group("profile")
def command() -> None:
    """Look at recorded expert loads, convert, compare, split and follow them."""


for _command in (merge_command, drift_command, scenarios_command, watch_command):
    command.add_command(_command)


@command.command("show")
@profile_arguments
@windows_option
@click.option(
    "--html",
    "html_path",
    type=click.Path(),
    metavar="FILE.html",
    help="Write pictures too: loads of experts, drift, scenarios.",
)
@as_json
def show_command(
    profiles: tuple[str, ...], windows: Any, html_path: str | None, json_: bool
) -> None:
    """Print what profiles hold: shape, skew of each layer, hottest experts, drift.

    \b
    eplb profile show loads.npz
    eplb profile show monday.npz sunday.npz
    """
    from eplb.cli.show import progress
    from eplb.files import check_writable
    from eplb.profiles import summarise

    if html_path is not None:
        check_writable(html_path)
    with progress("reading profiles"):
        profile = read_windows(profiles, windows)
        summary = summarise(profile)
    if html_path is not None:
        from eplb.cli.report.command import write_page
        from eplb.cli.report.make import profile_page

        write_page(profile_page(profile), html_path)
    if json_:
        click.echo(json.dumps(summary.to_dict()))
    else:
        _show(summary, profile.mean_load_LE())
        if html_path is not None:
            from eplb.cli.plan import show_report

            show_report(html_path)


@command.command("convert")
@profile_arguments
@click.option("-o", "--output", type=click.Path(), required=True, metavar="FILE")
@windows_option
@click.option("--scenario", help="Name the scenario of all windows.")
@click.option("--phase", help="Name the phase of all windows: prefill, decode or mixed.")
@click.option(
    "--model",
    type=Name("model preset", MODEL_PRESETS),
    help="Number the layers by this model's decoder ids, where a recording counts those with "
    "experts (vLLM, vLLM-Ascend, Omni).",
)
@moe_layers_option
@click.option(
    "--placement",
    type=click.Path(),
    metavar="PLAN",
    help="What the slots held while Omni-placement dumped their counts, as eplb import read it.",
)
@as_json
def convert_command(
    profiles: tuple[str, ...],
    output: str,
    windows: Any,
    scenario: str | None,
    phase: str | None,
    model: str | None,
    moe_layers: tuple[int, ...] | None,
    placement: str | None,
    json_: bool,
) -> None:
    """Write profiles as one file of another format: .npz, .npy, .csv, .json or .pt (SGLang).

    \b
    eplb profile convert expert_distribution_recorder_1.pt -o loads.npz
    eplb profile convert vllm_loads.jsonl --model deepseek-v3 -o loads.npz
    """
    from dataclasses import replace

    from eplb.cli.show import progress
    from eplb.engines.layers import with_decoder_ids
    from eplb.engines.omni import omni_reader
    from eplb.files import check_writable
    from eplb.plan_file import read_plan
    from eplb.profiles import write_profile

    check_writable(output)
    with progress("converting"):
        read = None if placement is None else omni_reader(read_plan(placement).placement)
        profile = read_windows(profiles, windows, read=read)
        if moe_layers is not None or model is not None:
            known = moe_layers or MODEL_PRESETS[model or ""].layer_ids
            profile = with_decoder_ids(profile, known)
        if model is not None:
            profile = replace(profile, metadata={**profile.metadata, "model": model})
        if scenario is not None:
            profile = replace(profile, scenario_W=(scenario,) * profile.num_windows)
        if phase is not None:
            profile = replace(profile, phase_W=(phase,) * profile.num_windows)
        lost = write_profile(profile, output)
    if lost:
        click.echo(f"eplb: warning: {output} cannot hold {', '.join(lost)}; use .npz", err=True)
    if json_:
        shape = [profile.num_windows, profile.num_layers, profile.num_experts]
        click.echo(json.dumps({"path": output, "shape": shape, "lost": list(lost)}))
    else:
        from eplb.cli import show

        show.console().print(f"{show.profile_line(profile)}; written: {show.name(output)}")


def _show(summary: ProfileSummary, load_LE: FloatArray) -> None:
    import numpy as np

    from eplb.cli import show

    out = show.console()
    ids = summary.layer_ids
    out.print(
        f"{show.name(summary.source)}: {show.plural(summary.num_windows, 'window')}, "
        f"{show.plural(summary.num_layers, 'layer')} ({ids[0]}-{ids[-1]}), "
        f"{show.plural(summary.num_experts, 'expert')}; "
        f"{show.rows(summary.rows_mean)} rows a layer and window"
    )
    phases = ", ".join(f"{count} {phase}" for phase, count in summary.phases.items())
    out.print(f"Windows: {phases}")
    out.print()
    grid = show.table("layer (worst of)", "max/mean", "hottest 10%", "idle")
    narrow = out.width < show.NARROW
    if not narrow:
        grid.add_column("hottest experts")
        grid.add_column("loads, expert by expert")
    for group in show.layer_groups(summary.num_layers, most=24):
        layers = summary.layers[group]
        skews = np.array([layer.max_over_mean for layer in layers])
        worst = layers[int(skews.argmax())]
        cells: list[Any] = [
            str(worst.layer_id)
            if len(layers) == 1
            else f"{worst.layer_id} ({layers[0].layer_id}-{layers[-1].layer_id})",
            f"{worst.max_over_mean:.2f}",
            show.percent(worst.top_10_percent),
            str(worst.idle_experts),
        ]
        if not narrow:
            cells += [
                "  ".join(f"{expert}:{show.percent(part)}" for expert, part in worst.hottest),
                show.expert_strip(load_LE[group][skews.argmax()]),
            ]
        grid.add_row(*cells)
    out.print(grid)
    if summary.num_windows > 1:
        out.print()
        out.print(
            "Drift (part of the load that falls on other experts): "
            f"{show.percent(summary.window_drift)} from a window to the next, "
            f"{show.percent(summary.half_drift)} from the first half to the second"
        )
    if summary.scenario_drift:
        out.print()
        names = list(summary.windows_of_scenario)
        drift = show.table("drift between scenarios", *(str(i + 1) for i in range(len(names))))
        for i, a in enumerate(names):
            cells = [
                "" if i == j else show.percent(summary.scenario_drift[(a, b) if i < j else (b, a)])
                for j, b in enumerate(names)
            ]
            drift.add_row(show.plain(f"{i + 1} {a}"), *cells)
        out.print(drift)
