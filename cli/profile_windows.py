"""``eplb profile merge|drift|scenarios``: join recordings, compare them, take them apart."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from eplb.cli.options import Name, as_json, profile_arguments, read_windows, windows_option

if TYPE_CHECKING:
    from eplb.load_profile import LoadProfile
    from eplb.profiles.scenarios import Representatives

__all__ = ["drift_command", "merge_command", "scenarios_command"]

output_option = click.option(
    "-o", "--output", type=click.Path(), required=True, metavar="FILE", help="Profile to write."
)


@click.command("merge")
@profile_arguments
@output_option
@click.option(
    "--add", is_flag=True, help="Add up window by window: recordings of ranks that ran together."
)
@windows_option
@as_json
def merge_command(
    profiles: tuple[str, ...], output: str, add: bool, windows: Any, json_: bool
) -> None:
    """Join recordings of one model into one file, each a scenario.

    \b
    eplb profile merge monday.npz sunday.npz -o week.npz
    eplb profile merge rank0.npz rank1.npz --add -o all-ranks.npz
    """
    from eplb.cli.show import progress
    from eplb.files import check_writable
    from eplb.profiles import add_profiles, read_profile

    check_writable(output)
    with progress("merging"):
        if add:
            parts = [read_profile(spec) for spec in profiles]
            if windows is not None:
                parts = [part.windows(*windows) for part in parts]
            merged = add_profiles(parts)
        else:
            merged = read_windows(profiles, windows)
    _write(merged, output, json_)


@click.command("drift")
@click.argument("old", metavar="OLD", type=click.Path())
@click.argument("new", metavar="NEW", type=click.Path())
@as_json
def drift_command(old: str, new: str, json_: bool) -> None:
    """Compare two recordings: the part of each layer's load that falls on other experts.

    \b
    eplb profile drift monday.npz sunday.npz
    """
    import numpy as np

    from eplb.cli import show
    from eplb.profiles import compare_profiles, read_profile

    before, after = read_profile(old), read_profile(new)
    layers = compare_profiles(before, after)
    mean = float(np.mean([layer.drift for layer in layers]))
    worst = max(layers, key=lambda layer: layer.drift)
    if json_:
        click.echo(
            json.dumps(
                {
                    "drift": mean,
                    "drift_worst_layer": worst.drift,
                    "layers": {str(layer.layer_id): layer.to_dict() for layer in layers},
                }
            )
        )
        return
    out = show.console()
    out.print(f"Old  {show.profile_line(before)}")
    out.print(f"New  {show.profile_line(after)}")
    out.print()
    grid = show.table("layer", "drift", "gained most", "lost most")
    for group in show.layer_groups(len(layers), most=24):
        part = layers[group]
        layer = max(part, key=lambda layer: layer.drift)
        name = str(layer.layer_id)
        if len(part) > 1:
            name += f" (worst of {part[0].layer_id}-{part[-1].layer_id})"
        grid.add_row(name, show.percent(layer.drift), _changes(layer.gained), _changes(layer.lost))
    out.print(grid)
    out.print()
    out.print(
        f"Drift: {show.percent(mean)} of the load falls on other experts, mean over layers; "
        f"{show.percent(worst.drift)} in layer {worst.layer_id}"
    )


@click.command("scenarios")
@profile_arguments
@click.option(
    "--by",
    type=Name("way to split", ("phase", "time", "cluster")),
    required=True,
    help="What makes a scenario: phase, time (of day), or cluster (of similar windows).",
)
@click.option("--hours", type=int, default=6, show_default=True, help="Of a part of the day.")
@click.option("--utc-offset", type=float, default=0.0, help="Hours, of the clock of the day.")
@click.option("--clusters", type=click.IntRange(min=1), default=4, show_default=True)
@click.option(
    "--representatives",
    type=click.IntRange(min=1),
    help="Keep only so many windows of each scenario, and say how much each stands for.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@output_option
@windows_option
@as_json
def scenarios_command(
    profiles: tuple[str, ...],
    by: str,
    hours: int,
    utc_offset: float,
    clusters: int,
    representatives: int | None,
    seed: int,
    output: str,
    windows: Any,
    json_: bool,
) -> None:
    """Split a long recording into scenarios, and pick windows that stand for all.

    \b
    eplb profile scenarios day.npz --by cluster --clusters 4 -o kinds.npz
    eplb profile scenarios day.npz --by time --hours 6 --representatives 8 -o small.npz
    """
    from eplb.cli.show import progress
    from eplb.files import check_writable
    from eplb.profiles import scenarios

    check_writable(output)
    with progress("splitting"):
        profile = read_windows(profiles, windows)
        if by == "phase":
            profile = scenarios.split_by_phase(profile)
        elif by == "time":
            profile = scenarios.split_by_time(profile, hours, utc_offset)
        else:
            profile = scenarios.split_by_cluster(profile, clusters, seed)
        chosen: dict[str, Representatives] = {}
        if representatives is not None:
            profile, chosen = scenarios.keep_representatives(profile, representatives, seed)
    _write(profile, output, json_, chosen)


def _changes(changes: tuple[tuple[int, float], ...]) -> str:
    from eplb.cli import show

    return "  ".join(f"{expert}: {show.percent(abs(part))}" for expert, part in changes)


def _write(
    profile: LoadProfile,
    output: str,
    json_: bool,
    chosen: dict[str, Representatives] | None = None,
) -> None:
    from rich.markup import escape

    from eplb.cli import show
    from eplb.profiles import write_profile

    lost = write_profile(profile, output)
    if lost:
        click.echo(f"eplb: warning: {output} cannot hold {', '.join(lost)}; use .npz", err=True)
    windows = {name: profile.scenario_W.count(name) for name in profile.scenarios}
    if json_:
        report: dict[str, Any] = {
            "path": output,
            "shape": [profile.num_windows, profile.num_layers, profile.num_experts],
            "scenarios": windows,
            "lost": list(lost),
        }
        if chosen:
            report["representatives"] = {
                name: {
                    "windows": list(some.windows),
                    "share": list(some.share),
                    "drift_mean": some.drift_mean,
                    "drift_worst": some.drift_worst,
                }
                for name, some in chosen.items()
            }
        click.echo(json.dumps(report))
        return
    out = show.console()
    out.print(f"{show.profile_line(profile)}; written: {show.name(output)}")
    if len(windows) < 2 and not chosen:
        return
    grid = show.table("scenario", "windows", *(["stand for", "drift to them"] if chosen else []))
    for name, count in windows.items():
        cells = [escape(name), str(count)]
        if chosen:
            some = chosen[name]
            shares = " ".join(show.percent(share) for share in some.share[:6])
            more = " ..." if len(some.share) > 6 else ""
            cells += [f"{shares}{more}", show.percent(some.drift_mean)]
        grid.add_row(*cells)
    out.print(grid)
