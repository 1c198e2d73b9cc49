"""Reports put together: of a plan, of a recording, of a replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb.cli.report.inputs import fitted_windows
from eplb.cli.report.load_sections import layers_section, ranks_section
from eplb.cli.report.loads import compare
from eplb.cli.report.move_section import moves_fact, moves_section
from eplb.cli.report.plan_sections import (
    figures_section,
    headline,
    plan_section,
    subtitle,
    title,
)
from eplb.cli.report.profile_sections import (
    experts_section,
    profile_facts,
    scenarios_section,
    skew_section,
)
from eplb.cli.report.replay_section import ReplayLog, replay_section
from eplb.cli.report.replica_section import replicas_section
from eplb.cli.report.traffic_section import traffic_section
from eplb.cli.report.values import Fact, Page, Section
from eplb.cli.report.window_sections import drift_section, windows_section
from eplb.cli.show import plural, ratio
from eplb.load_profile import LoadProfile
from eplb.plan import Plan
from eplb.profiles import summarise

__all__ = ["plan_page", "profile_page", "replay_page"]


def plan_page(
    plan: Plan,
    path: str,
    parts: Sequence[LoadProfile],
    *,
    previous: Plan | None = None,
    curve: Sequence[tuple[float, float]] = (),
    replays: Sequence[ReplayLog] = (),
    topk_TLK: NDArray[Any] | None = None,
) -> Page:
    """Return the report of a plan on some recordings.

    Parameters
    ----------
    plan : Plan
    path : str
        Where it lies, for the page.
    parts : sequence of LoadProfile
        Recordings, each a scenario.
    previous : Plan, optional
        What was in force before; without it the plan is compared with what engines
        start with.
    curve : sequence of (moves, imbalance)
        Of ``eplb replan``, from the previous plan.
    replays : sequence of ReplayLog
    topk_TLK : array of int, optional
        Sampled token routings.

    Raises
    ------
    InvalidInput, PlacementInvalid
        Plans, recordings and routings do not fit each other.
    """
    profile, fitted_W = fitted_windows(plan, parts)
    comparison = compare(plan, profile, fitted_W, previous)
    facts = headline(comparison)
    sections = [
        ranks_section(comparison),
        layers_section(comparison),
        windows_section(comparison),
        figures_section(comparison),
        replicas_section(comparison),
        traffic_section(comparison, topk_TLK),
    ]
    if previous is not None:
        facts = (*facts, moves_fact(previous, plan))
        sections.append(moves_section(comparison, previous, curve))
    sections.append(drift_section(profile, fitted_W))
    if replays:
        sections.append(replay_section(replays))
    sections.append(plan_section(plan, path))
    return Page(
        title=title(plan),
        subtitle=subtitle(plan),
        facts=facts,
        sections=_there(sections),
        origin={"plan": plan.digest()},
    )


def profile_page(profile: LoadProfile) -> Page:
    """Return the report of a recording."""
    summary = summarise(profile)
    ids = profile.layer_ids
    sections = [
        experts_section(profile),
        drift_section(profile),
        scenarios_section(summary),
        skew_section(summary),
    ]
    return Page(
        title=f"Expert loads of {profile.source}",
        subtitle=(
            f"{plural(profile.num_windows, 'window')}, {plural(profile.num_layers, 'layer')} "
            f"({ids[0]}-{ids[-1]}), {plural(profile.num_experts, 'expert')}"
        ),
        facts=profile_facts(summary),
        sections=_there(sections),
        origin={"profile SHA-256": profile.sha256()},
    )


def replay_page(logs: Sequence[ReplayLog], profile: LoadProfile | None = None) -> Page:
    """Return the report of a replay, with the drift of its stream where that is given."""
    first = logs[0]
    facts = (
        Fact(
            name="Imbalance",
            value=ratio(float(first.imbalance_W.mean())),
            note=f"Mean over {plural(len(first.imbalance_W), 'step')} that had not been seen.",
        ),
        Fact(
            name="95th percentile",
            value=ratio(float(np.percentile(first.imbalance_W, 95))),
            note="One step in twenty is worse.",
        ),
        Fact(
            name="Experts moved",
            value=f"{sum(moved for _, moved in first.replans):,}",
            note=f"At {plural(len(first.replans), 'decision')}.",
        ),
    )
    sections = [replay_section(logs), None if profile is None else drift_section(profile)]
    return Page(
        title=f"Replay under {first.policy}",
        subtitle=""
        if profile is None
        else f"{profile.source}: "
        f"{plural(profile.num_windows, 'step')}, {plural(profile.num_layers, 'layer')}",
        facts=facts,
        sections=_there(sections),
    )


def _there(sections: Sequence[Section | None]) -> tuple[Section, ...]:
    return tuple(section for section in sections if section is not None)
