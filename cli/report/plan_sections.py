"""What was planned and for what: the head of the page, headline figures, origin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eplb.cli.report.loads import Comparison
from eplb.cli.report.values import Fact, Section, Table
from eplb.cli.show import percent, plural, ratio, rows
from eplb.metrics import Balance
from eplb.model import UNKNOWN_MODEL
from eplb.plan import Plan
from eplb.slots import replica_count

__all__ = ["figures_section", "headline", "plan_section", "subtitle", "title"]


def title(plan: Plan) -> str:
    """Return what the page is about."""
    name = "" if plan.model.name == UNKNOWN_MODEL else f" for {plan.model.name}"
    return f"{plan.topology.label} plan{name}"


def subtitle(plan: Plan) -> str:
    """Return one line on machine, slots and rule."""
    topology = plan.topology
    extra = topology.num_usable_slots - plan.model.num_experts
    return (
        f"{plural(topology.num_nodes, 'node')} of {plural(topology.ranks_per_node, 'rank')}, "
        f"{plural(topology.slots_per_rank, 'slot')} a rank and layer: {extra} of "
        f"{topology.num_usable_slots} redundant; split {plan.split}"
    )


def headline(comparison: Comparison) -> tuple[Fact, ...]:
    """Return the figures at the top of the page."""
    before = comparison.before.balance(comparison.profile, comparison.shown_W)
    after = comparison.after.balance(comparison.profile, comparison.shown_W)
    what = comparison.before.name
    facts = [
        Fact(
            name="Imbalance",
            value=ratio(after.imbalance_mean),
            was=ratio(before.imbalance_mean),
            note=f"Largest over mean rank load, on {comparison.shown}; before: {what}.",
        ),
        Fact(
            name="Waiting",
            value=f"{after.imbalance_mean - 1:.1%}",
            was=f"{before.imbalance_mean - 1:.1%}",
            note="What a step of expert work costs beyond balanced ranks.",
        ),
        Fact(
            name="95th percentile",
            value=ratio(after.imbalance_p95),
            was=ratio(before.imbalance_p95),
            note="One window in twenty is worse; each scored by its mean over layers.",
        ),
    ]
    quality = comparison.plan.quality
    if quality is not None:
        gap = quality.gap_mean if quality.gap is None else quality.gap
        bound = quality.bound_mean if quality.bound is None else quality.bound
        facts.append(
            Fact(
                name="Gap to the bound",
                value=percent(gap),
                note=f"On the loads it was fitted to, no placement is below {bound:.4f}.",
            )
        )
    return tuple(facts)


def plan_section(plan: Plan, path: str) -> Section:
    """Return what was planned, and where the plan comes from."""
    model, topology, origin = plan.model, plan.topology, plan.provenance
    layer_ids = plan.placement.layer_ids
    counts_LE = replica_count(plan.placement.phys_to_log_LS, model.num_experts)
    extra = topology.num_usable_slots - model.num_experts
    entries: list[tuple[str, Any]] = [
        ("Plan", path),
        ("Model", model.name),
        ("Revision", model.revision),
        ("Layers", f"{len(layer_ids)} with experts ({layer_ids[0]}-{layer_ids[-1]})"),
        ("Experts of a layer", model.num_experts),
        ("Experts a token chooses", model.top_k),
        ("Routing groups", model.num_groups if model.num_groups > 1 else None),
        ("Machine", topology.name),
        ("Nodes x ranks", f"{topology.num_nodes} x {topology.ranks_per_node}"),
        ("Slots a rank and layer", topology.slots_per_rank),
        ("Redundant experts of a layer", extra),
        ("Most replicas of an expert", int(counts_LE.max())),
        ("Memory for redundancy", _redundancy(plan)),
        ("Split rule", plan.split),
        ("Minimised", f"{plan.statistic} over windows"),
    ]
    made: list[tuple[str, Any]] = [
        ("Solver", origin.get("solver")),
        ("Policy", origin.get("policy")),
        ("Status", origin.get("status")),
        ("Stopped", origin.get("stop_reason")),
        ("Seed", origin.get("seed")),
        ("Profile", origin.get("profile")),
        ("Windows fitted", origin.get("profile_windows")),
        ("Profile SHA-256", origin.get("profile_sha256")),
        ("Versions", _versions(origin.get("versions"))),
        ("Digest", plan.digest()),
    ]
    return Section(
        key="plan",
        title="What was planned",
        lead=(
            "A placement says which logical expert each slot of each rank holds. Its digest covers "
            "all that it decides; where it comes from is recorded beside it."
        ),
        tables=(_entries("For what", entries), _entries("Where it comes from", made)),
        side_by_side=True,
    )


def figures_section(comparison: Comparison) -> Section:
    """Return the figures of both sides, on fitted and on other windows."""
    whole = comparison.profile
    parts = (
        [("fitted", comparison.fitted_W), ("not fitted", ~comparison.fitted_W)]
        if comparison.has_both
        else [("", comparison.shown_W)]
    )
    before, after = comparison.before, comparison.after
    head = ["Figure"]
    columns: list[Balance] = []
    for label, chosen_W in parts:
        for side in (before, after):
            head.append(f"{side.name}, {label}" if label else side.name)
            columns.append(side.balance(whole, chosen_W))
    names = {
        "imbalance_mean": "imbalance, mean",
        "imbalance_p95": "imbalance, p95 of windows",
        "imbalance_cvar": "imbalance, worst tenth of windows",
        "imbalance_worst": "imbalance, worst window",
        "imbalance_worst_layer": "imbalance, worst layer and window",
        "balancedness": "balancedness",
        "max_receive_rows_mean": "max dispatch receive, rows, mean",
        "max_receive_rows_worst": "max dispatch receive, rows, worst",
    }
    body = [
        (name, *((rows if "rows" in key else ratio)(getattr(b, key)) for b in columns))
        for key, name in names.items()
    ]
    quality = comparison.plan.quality
    if quality is not None:
        head.append("this plan, when made")
        known = {"imbalance, mean": quality.imbalance_mean,
                 "imbalance, worst window": quality.imbalance_worst}  # fmt: skip
        body = [(*row, ratio(known[row[0]]) if row[0] in known else "") for row in body]
    return Section(
        key="figures",
        title="Figures",
        lead=(
            "Imbalance is the largest over the mean rank load of a layer in a window: at 1.2 a "
            "step waits for a rank with a fifth more than its part. Balancedness is the sum of "
            "mean loads over the sum of largest ones, at most 1."
        ),
        tables=(_table("All figures", head, body), *_scenarios(comparison)),
        notes=_fit_notes(comparison),
    )


def _fit_notes(comparison: Comparison) -> tuple[str, ...]:
    if comparison.has_both:
        fitted = int(comparison.fitted_W.sum())
        note = (
            f"The plan was fitted to {plural(fitted, 'window')} of these; pictures of loads show "
            f"the other {int((~comparison.fitted_W).sum())}, which is what serving will meet."
        )
        return (note,)
    if comparison.fitted_W.all():
        note = (
            "These are the loads that the plan was fitted to: expect other traffic to be less "
            "balanced. Plan with --holdout, or report on another recording."
        )
        return (note,)
    return ("By its digest of the loads, the plan was fitted to none of these windows.",)


def _scenarios(comparison: Comparison) -> tuple[Table, ...]:
    profile, chosen_W = comparison.profile, comparison.shown_W
    before, after = (
        side.balance(profile, chosen_W).by_scenario
        for side in (comparison.before, comparison.after)
    )
    if len(after) < 2:
        return ()
    body = [
        (
            name,
            *(
                ratio(value)
                for value in (
                    before[name].imbalance_mean, part.imbalance_mean, part.imbalance_p95,
                    part.imbalance_worst, part.balancedness,
                )
            ),
        )
        for name, part in after.items()
    ]  # fmt: skip
    head = ["Scenario", f"mean, {comparison.before.name}", "mean", "p95", "worst", "balancedness"]
    return (_table("By scenario", head, body),)


def _table(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
    return Table(title=title, head=tuple(head), rows=tuple(tuple(row) for row in body))


def _entries(title: str, entries: list[tuple[str, Any]]) -> Table:
    return _table(
        title, ("", ""), [(name, str(value)) for name, value in entries if value is not None]
    )


def _versions(versions: Any) -> str | None:
    if not isinstance(versions, dict):
        return None
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _redundancy(plan: Plan) -> str | None:
    size, topology = plan.model.expert_bytes, plan.topology
    if size is None:
        return None
    extra = topology.num_usable_slots - plan.model.num_experts
    total = extra * size * plan.placement.num_layers / topology.num_ranks
    return f"{total / 1e9:.2f} GB a rank"
