"""An independent check of a finished plan, asked before anything is written.

Everything is derived again from the slots by plain loops, and shares no code with
:mod:`eplb.split`, :mod:`eplb.metrics` or any solver: a mistake there cannot hide here. One thing is
sampled: under ``batch``, where every window of every layer has an optimum of its own, these are
compared with a linear programme in up to ``BATCH_SAMPLES`` places, spread evenly.
Shape letters: W windows, E logical experts, R ranks.
"""

from __future__ import annotations

from math import fsum

import numpy as np

from eplb.errors import PlacementInvalid
from eplb.load_profile import LoadProfile
from eplb.plan import Plan, Quality
from eplb.topology import Topology

__all__ = ["check_plan", "find_problems", "rank_fractions", "rescore"]

# Figures of a plan are compared to this, relatively; a gap absolutely, as it may be 0.
TOLERANCE = 1e-9
# Solvers of linear programmes are exact to about this.
PROGRAMME_TOLERANCE = 1e-6
BATCH_SAMPLES = 48


def check_plan(
    plan: Plan,
    profile: LoadProfile | None = None,
    *,
    distinct_ranks: bool = False,
    groups_in_nodes: bool = False,
) -> None:
    """Raise unless :func:`find_problems` finds nothing.

    Raises
    ------
    PlacementInvalid
        The first problem, and how many more there are.
    """
    problems = find_problems(
        plan, profile, distinct_ranks=distinct_ranks, groups_in_nodes=groups_in_nodes
    )
    if problems:
        rest = len(problems) - 1
        more = f" (and {rest} more problem{'s' * (rest > 1)})" if rest else ""
        raise PlacementInvalid(problems[0] + more)


def find_problems(
    plan: Plan,
    profile: LoadProfile | None = None,
    *,
    distinct_ranks: bool = False,
    groups_in_nodes: bool = False,
) -> tuple[str, ...]:
    """Return what is wrong with a plan, one line each; empty if nothing is.

    Parameters
    ----------
    plan : Plan
    profile : LoadProfile, optional
        What the plan was fitted to. The plan's quality, if it has one, must be what its slots
        make of these loads under the plan's split rule.
    distinct_ranks : bool
        Whether two replicas of an expert on one rank are a problem.
    groups_in_nodes : bool
        Whether a routing group with experts on more than one node is a problem.
    """
    problems = _slot_problems(plan)
    # Slots that name no expert have no loads to score.
    sound = not problems
    if sound and distinct_ranks:
        problems += _shared_ranks(plan)
    if sound and groups_in_nodes:
        problems += _divided_groups(plan)
    if plan.quality is not None:
        problems += _contradictions(plan.quality)
    if profile is not None:
        misfits = _misfits(plan, profile)
        problems += misfits
        if sound and not misfits and plan.quality is not None:
            problems += _wrong_figures(plan, plan.quality, profile)
    return tuple(problems)


def rescore(plan: Plan, profile: LoadProfile) -> tuple[float, float]:
    """Return ``imbalance_mean`` and ``imbalance_worst`` of a sound plan, derived from its slots.

    A layer without load in a window is not scored, nor is a window without load. Not for ``batch``.
    """
    num_ranks = plan.topology.num_nodes * plan.topology.ranks_per_node
    speeds = dict(enumerate(plan.topology.rank_speed or ()))
    capacity = fsum(
        speeds.get(rank, 1.0)
        for rank in range(num_ranks)
        if rank not in plan.topology.ranks_out_of_service
    )
    placement = plan.placement
    row_of = dict(zip(placement.layer_ids, placement.phys_to_log_LS.tolist(), strict=True))
    weights_of: dict[int, list[float]] = {}
    if placement.split_weights_LS is not None:
        weights_of = dict(
            zip(placement.layer_ids, placement.split_weights_LS.tolist(), strict=True)
        )
    ratios_of_window: list[list[float]] = [[] for _ in range(profile.num_windows)]
    for layer, layer_id in enumerate(profile.layer_ids):
        fraction = rank_fractions(
            row_of[layer_id], plan.topology, plan.split, weights_of.get(layer_id)
        )
        table_ER = np.zeros((profile.num_experts, num_ranks + 1))
        for (expert, rank), part in fraction.items():
            table_ER[expert, rank] = part / speeds.get(rank, 1.0)
        # One more rank, that receives everything, adds up what was routed.
        table_ER[:, num_ranks] = 1.0
        load_WR = profile.counts_WLE[:, layer] @ table_ER
        for ratios, loads in zip(ratios_of_window, load_WR.tolist(), strict=True):
            routed = loads.pop()
            if routed > 0:
                ratios.append(max(loads) / routed * capacity)
    return _mean_and_worst(ratios_of_window)


def _mean_and_worst(ratios_of_window: list[list[float]]) -> tuple[float, float]:
    scored = [ratios for ratios in ratios_of_window if ratios]
    num_scored = sum(len(ratios) for ratios in scored)
    mean = fsum(fsum(ratios) for ratios in scored) / num_scored
    return mean, max(fsum(ratios) / len(ratios) for ratios in scored)


def rank_fractions(
    row: list[int], topology: Topology, split: str, weights: list[float] | None = None
) -> dict[tuple[int, int], float]:
    """Return by (expert, rank) the fraction of the expert's tokens that the rank receives.

    Parameters
    ----------
    row : list of int
        Logical expert in each slot of one layer, -1 for an empty one.
    topology : Topology
    split : str
        ``even``: replicas of an expert receive the same. ``nearest``: each rank in service is the
        source of an equal part of the tokens and sends it to the replicas it holds, or else to
        those of its node, or else to all of them; evenly in each case. ``weighted``: as the
        weights say.
    weights : list of float, optional
        The fraction of each slot, under ``weighted``.
    """
    per_node = topology.ranks_per_node
    serving = [
        rank
        for rank in range(topology.num_nodes * per_node)
        if rank not in topology.ranks_out_of_service
    ]
    holders_of: dict[int, list[int]] = {}
    for slot, expert in enumerate(row):
        if expert >= 0:
            holders_of.setdefault(expert, []).append(slot // topology.slots_per_rank)
    fraction: dict[tuple[int, int], float] = {}
    if split == "weighted":
        assert weights is not None
        for slot, expert in enumerate(row):
            if expert >= 0:
                place = expert, slot // topology.slots_per_rank
                fraction[place] = fraction.get(place, 0.0) + weights[slot]
        return fraction

    def send(expert: int, sources: int, of_sources: int, receivers: list[int]) -> None:
        for rank in receivers:
            part = sources / of_sources / len(receivers)
            fraction[expert, rank] = fraction.get((expert, rank), 0.0) + part

    for expert, holders in holders_of.items():
        if split == "even" or len(holders) == 1:
            send(expert, 1, 1, holders)
            continue
        distant = 0
        for source in serving:
            neighbours = [rank for rank in holders if rank // per_node == source // per_node]
            if not neighbours:
                distant += 1
                continue
            send(expert, 1, len(serving), [source] if source in neighbours else neighbours)
        if distant:
            send(expert, distant, len(serving), holders)
    return fraction


def _slot_problems(plan: Plan) -> list[str]:
    """Lengths of rows, ids in slots, experts in no slot."""
    num_experts = plan.model.num_experts
    topology = plan.topology
    num_ranks = topology.num_nodes * topology.ranks_per_node
    num_slots = num_ranks * topology.slots_per_rank
    rows = plan.placement.phys_to_log_LS.tolist()
    layer_ids = plan.placement.layer_ids
    problems: list[str] = []
    if len(rows) != len(layer_ids):
        problems.append(f"the plan has {len(rows)} layers of slots and {len(layer_ids)} layer ids")
    if tuple(layer_ids) != tuple(plan.model.layer_ids):
        problems.append("the placement and the model of the plan name different layers")
    problems += [
        f"layer {layer_id} is in the plan {layer_ids.count(layer_id)} times"
        for layer_id in dict.fromkeys(layer_ids)
        if layer_ids.count(layer_id) > 1
    ]
    for layer_id, row in zip(layer_ids, rows, strict=False):
        if len(row) != num_slots:
            problems.append(
                f"layer {layer_id} has {len(row)} slots instead of {num_slots} ({num_ranks} ranks "
                f"of {topology.slots_per_rank})"
            )
        missing = set(range(num_experts)).difference(row)
        problems += [f"layer {layer_id}: expert {e} is in no slot" for e in sorted(missing)]
        problems += [
            f"layer {layer_id}, slot {slot} (rank {slot // topology.slots_per_rank}): {expert!r} "
            f"is no expert; experts are 0 to {num_experts - 1}, and -1 is an empty slot"
            for slot, expert in enumerate(row)
            if type(expert) is not int or not -1 <= expert < num_experts
        ]
        problems += [
            f"layer {layer_id}, slot {slot}: expert {expert} is on rank "
            f"{slot // topology.slots_per_rank}, which has no such slot or is out of service"
            for slot, expert in enumerate(row[:num_slots])
            if expert != -1 and not _exists(slot, topology)
        ]
    return problems


def _exists(slot: int, topology: Topology) -> bool:
    """Tell whether a rank in service has this slot; ranks of fewer slots are padded."""
    rank, place = divmod(slot, topology.slots_per_rank)
    slots = topology.slots_per_rank if topology.rank_slots is None else topology.rank_slots[rank]
    return place < slots and rank not in topology.ranks_out_of_service


def _shared_ranks(plan: Plan) -> list[str]:
    """Two replicas of an expert on one rank."""
    problems: list[str] = []
    rows = plan.placement.phys_to_log_LS.tolist()
    for layer_id, row in zip(plan.placement.layer_ids, rows, strict=True):
        first: dict[tuple[int, int], int] = {}
        for slot, expert in enumerate(row):
            rank = slot // plan.topology.slots_per_rank
            earlier = first.setdefault((expert, rank), slot)
            if expert >= 0 and earlier != slot:
                problems.append(
                    f"layer {layer_id}, rank {rank}: expert {expert} is in slot {earlier} and "
                    f"again in slot {slot}; replicas have to be on distinct ranks"
                )
    return problems


def _divided_groups(plan: Plan) -> list[str]:
    """Routing groups with experts on more than one node."""
    group_size = plan.model.num_experts // plan.model.num_groups
    per_node = plan.topology.ranks_per_node * plan.topology.slots_per_rank
    problems: list[str] = []
    rows = plan.placement.phys_to_log_LS.tolist()
    for layer_id, row in zip(plan.placement.layer_ids, rows, strict=True):
        nodes_of: dict[int, set[int]] = {}
        for slot, expert in enumerate(row):
            if expert >= 0:
                nodes_of.setdefault(expert // group_size, set()).add(slot // per_node)
        problems += [
            f"layer {layer_id}: group {group} is on the nodes {sorted(nodes)}; groups have to stay "
            "within a node"
            for group, nodes in sorted(nodes_of.items())
            if len(nodes) > 1
        ]
    return problems


def _contradictions(quality: Quality) -> list[str]:
    """Figures of a plan that cannot hold together. A NaN fails every comparison."""
    mean, worst, bound = quality.imbalance_mean, quality.imbalance_worst, quality.bound_mean
    problems = []
    if not bound >= 1 - TOLERANCE:
        problems.append(f"quality: bound_mean {bound!r} is below 1, which no imbalance is")
    if not bound <= mean * (1 + TOLERANCE):
        problems.append(
            f"quality: bound_mean {bound!r} is above the imbalance_mean {mean!r} that was reached"
        )
    if not mean <= worst * (1 + TOLERANCE):
        problems.append(f"quality: imbalance_mean {mean!r} is above imbalance_worst {worst!r}")
    if not abs(quality.gap_mean - (mean - bound) / (bound or 1)) <= TOLERANCE:
        problems.append(
            f"quality: gap_mean {quality.gap_mean!r} is not (imbalance_mean - bound_mean) / "
            f"bound_mean of {mean!r} and {bound!r}"
        )
    return problems


def _misfits(plan: Plan, profile: LoadProfile) -> list[str]:
    """Find loads that the plan has no place for."""
    problems = [
        f"layer {layer_id} has load in {profile.source} and is not in the plan"
        for layer_id in profile.layer_ids
        if layer_id not in plan.placement.layer_ids
    ]
    if profile.num_experts != plan.model.num_experts:
        problems.append(
            f"{profile.source} has {profile.num_experts} experts and the plan "
            f"{plan.model.num_experts}"
        )
    if plan.split not in ("even", "nearest", "weighted", "batch"):
        problems.append(f"split rule {plan.split!r} cannot be checked")
    return problems


def _wrong_figures(plan: Plan, quality: Quality, profile: LoadProfile) -> list[str]:
    """Figures of a plan that are not what its slots make of the loads."""
    problems: list[str] = []
    if plan.split == "batch":
        problems, (mean, worst) = _wrong_optima(plan, profile)
    else:
        mean, worst = rescore(plan, profile)
    return problems + [
        f"quality: {name} is {stated!r} in the plan and {derived!r} derived from its slots on "
        f"{profile.source}"
        for name, stated, derived in (
            ("imbalance_mean", quality.imbalance_mean, mean),
            ("imbalance_worst", quality.imbalance_worst, worst),
        )
        if not abs(stated - derived) <= TOLERANCE * derived
    ]


def _wrong_optima(plan: Plan, profile: LoadProfile) -> tuple[list[str], tuple[float, float]]:
    """Largest rank loads under ``batch`` that a linear programme does not find, and their figures.

    The figures are ``imbalance_mean`` and ``imbalance_worst``.
    """
    from eplb.metrics import rank_load  # noqa: PLC0415  (what is under check)

    largest_WL = rank_load(profile, plan.placement, plan.topology, "batch").max(axis=2)
    num_ranks = len(plan.topology.ranks_in_service)
    routed_WL = profile.counts_WLE.sum(axis=2)
    figures = _mean_and_worst(
        [
            [most / total * num_ranks for most, total in zip(row, totals, strict=True) if total > 0]
            for row, totals in zip(largest_WL.tolist(), routed_WL.tolist(), strict=True)
        ]
    )
    row_of = dict(
        zip(plan.placement.layer_ids, plan.placement.phys_to_log_LS.tolist(), strict=True)
    )
    num_cells = largest_WL.size
    cells = sorted({i * num_cells // BATCH_SAMPLES for i in range(BATCH_SAMPLES)})
    problems = []
    for window, layer in (divmod(cell, profile.num_layers) for cell in cells):
        layer_id = profile.layer_ids[layer]
        load = profile.counts_WLE[window, layer].tolist()
        derived = _programme(load, row_of[layer_id], plan.topology)
        stated = float(largest_WL[window, layer])
        if not abs(stated - derived) <= PROGRAMME_TOLERANCE * max(derived, 1.0):
            problems.append(
                f"layer {layer_id}, window {window}: the largest rank load at the best split is "
                f"stated as {stated!r}, and a linear programme finds {derived!r}"
            )
    return problems, figures


def _programme(load: list[float], row: list[int], topology: Topology) -> float:
    """Return the smallest largest rank load: variables are each slot's tokens and the maximum."""
    from scipy.optimize import linprog  # noqa: PLC0415
    from scipy.sparse import lil_array  # noqa: PLC0415

    num_ranks = topology.num_nodes * topology.ranks_per_node
    slots = [slot for slot, expert in enumerate(row) if expert >= 0]
    of_expert = lil_array((len(load), len(slots) + 1))
    of_rank = lil_array((num_ranks, len(slots) + 1))
    for i, slot in enumerate(slots):
        of_expert[row[slot], i] = 1.0
        of_rank[slot // topology.slots_per_rank, i] = 1.0
    of_rank[:, [len(slots)]] = -1.0
    found = linprog(
        [0.0] * len(slots) + [1.0],
        A_ub=of_rank.tocsr(),
        b_ub=[0.0] * num_ranks,
        A_eq=of_expert.tocsr(),
        b_eq=load,
        method="highs",
    )
    return float(found.fun)
