"""Hypothesis strategies for the core types: loads of every severity, valid placements, plans.

Shape letters: W windows, L layers, E logical experts, S slots.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from eplb.load_profile import PHASES, LoadProfile
from eplb.model import MoEModel
from eplb.plan import Plan
from eplb.slots import Placement
from eplb.topology import Topology

# Rules that follow from the slots alone; `weighted` needs fractions and `batch` has them a window.
SPLITS = ("even", "nearest")
ALL_SPLITS = (*SPLITS, "weighted", "batch")

SEVERITIES = ("uniform", "noisy", "zipf", "hot", "zeros", "ties", "huge", "tiny")


@st.composite
def topologies(draw, *, min_slots: int = 1, max_nodes: int = 4, max_ranks_per_node: int = 4):
    """Nodes x ranks with at least ``min_slots`` slots, and up to 3 a rank more than that."""
    num_nodes = draw(st.integers(1, max_nodes))
    ranks_per_node = draw(st.integers(1, max_ranks_per_node))
    least = -(-min_slots // (num_nodes * ranks_per_node))
    return Topology(
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node,
        slots_per_rank=draw(st.integers(max(1, least), max(1, least) + 3)),
    )


@st.composite
def loads(draw, *shape: int, severity: str | None = None):
    """Loads of this shape (last axis: experts), every row of experts with some load.

    Numbers come from a seed: Hypothesis chooses it and the severity, and shrinks both.
    """
    kind = draw(st.sampled_from(SEVERITIES)) if severity is None else severity
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_experts = shape[-1]
    if kind == "uniform":
        return np.full(shape, float(rng.integers(1, 1000)))
    if kind == "noisy":
        return rng.integers(1, 1000, shape).astype(float)
    if kind == "hot":
        load = np.ones(shape)
        load[..., rng.integers(num_experts)] = 1e4
        return load
    if kind == "zeros":
        load = rng.integers(0, 1000, shape) * (rng.random(shape) < 0.5)
        load[..., rng.integers(num_experts)] += 1
        return load.astype(float)
    if kind == "ties":
        return rng.integers(1, 4, shape).astype(float)
    ranks = rng.permuted(np.broadcast_to(np.arange(1, num_experts + 1), shape), axis=-1)
    skewed = 1.0 / ranks ** rng.uniform(0.3, 1.5)
    return skewed * {"zipf": 1e5, "huge": 1e12, "tiny": 1e-9}[kind]


@st.composite
def profiles(
    draw,
    *,
    num_experts: int | None = None,
    max_windows: int = 4,
    max_layers: int = 3,
    idle: bool = True,
):
    """Several windows, scenarios and phases; layer ids with holes in them.

    ``idle`` allows layers without load in some of the windows, and windows without any load.
    """
    num_windows = draw(st.integers(1, max_windows))
    num_layers = draw(st.integers(1, max_layers))
    if num_experts is None:
        num_experts = draw(st.integers(1, 10))
    counts_WLE = draw(loads(num_windows, num_layers, num_experts))
    if idle:
        off = draw(
            st.sets(st.tuples(st.integers(0, num_windows - 1), st.integers(0, num_layers - 1)))
        )
        for window, layer in off:
            if counts_WLE[:, layer].any(axis=1).sum() > 1:
                counts_WLE[window, layer] = 0
    per_window = {"min_size": num_windows, "max_size": num_windows}
    times = st.lists(st.floats(0, 1e6), **per_window)
    return LoadProfile(
        counts_WLE=counts_WLE,
        layer_ids=tuple(
            sorted(draw(st.sets(st.integers(0, 90), min_size=num_layers, max_size=num_layers)))
        ),
        scenario_W=tuple(draw(st.lists(st.sampled_from(["day", "night", "code"]), **per_window))),
        phase_W=tuple(draw(st.lists(st.sampled_from(PHASES), **per_window))),
        tokens_W=draw(st.none() | times),
        time_s_W=draw(st.none() | times),
        source="generated",
    )


@st.composite
def rows(
    draw, num_experts: int, topology: Topology, *, empties: bool = True, distinct: bool = False
):
    """The slots of one layer: a valid placement.

    ``empties`` allows empty slots (without it every slot is filled, where ``distinct`` allows it);
    ``distinct`` forbids two replicas of an expert on one rank.
    """
    per_rank, num_ranks = topology.slots_per_rank, topology.num_ranks
    assert topology.num_slots >= num_experts
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    order = rng.permutation(topology.num_slots)
    row = np.full(topology.num_slots, -1)
    row[order[:num_experts]] = rng.permutation(num_experts)
    spare = order[num_experts:]
    kept = draw(st.integers(0, len(spare))) if empties else len(spare)
    for slot in spare[:kept]:
        rank = slot // per_rank
        held = set(row[rank * per_rank : (rank + 1) * per_rank].tolist()) if distinct else set()
        choices = [e for e in range(num_experts) if e not in held]
        if choices:
            row[slot] = rng.choice(choices)
    assert num_ranks * per_rank == len(row)
    return row


@st.composite
def placements(
    draw,
    num_experts: int,
    layer_ids: tuple[int, ...],
    topology: Topology,
    *,
    empties: bool = True,
    distinct: bool = False,
):
    """A valid placement of these layers."""
    row = rows(num_experts, topology, empties=empties, distinct=distinct)
    return Placement(
        phys_to_log_LS=np.stack([draw(row) for _ in layer_ids]),
        layer_ids=layer_ids,
        num_experts=num_experts,
    )


@st.composite
def weighted(draw, placement: Placement):
    """The placement with fractions: some of them 0, some experts' all on one slot."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = placement.phys_to_log_LS
    raw_LS = np.where(rows >= 0, rng.exponential(size=rows.shape), 0.0)
    raw_LS[rng.random(rows.shape) < draw(st.sampled_from([0.0, 0.5]))] *= 1e-9
    weights_LS = np.zeros(rows.shape)
    for row, raw_S, weights_S in zip(rows, raw_LS, weights_LS, strict=True):
        for expert in set(row.tolist()) - {-1}:
            held = row == expert
            weights_S[held] = raw_S[held] / raw_S[held].sum()
    return replace(placement, split_weights_LS=weights_LS)


@st.composite
def cases(
    draw,
    *,
    distinct: bool = False,
    empties: bool = True,
    idle: bool = True,
    splits: tuple[str, ...] = SPLITS,
):
    """(profile, placement, topology, split) that fit each other."""
    profile = draw(profiles(idle=idle))
    topology = draw(topologies(min_slots=profile.num_experts))
    placement = draw(
        placements(
            profile.num_experts, profile.layer_ids, topology, empties=empties, distinct=distinct
        )
    )
    split = draw(st.sampled_from(splits))
    if split == "weighted":
        placement = draw(weighted(placement))
    return profile, placement, topology, split


@st.composite
def plans(draw, *, distinct: bool = False, splits: tuple[str, ...] = SPLITS):
    """Plans without quality; see :func:`plan_of` for one of a given case."""
    _, placement, topology, split = draw(cases(distinct=distinct, splits=splits))
    return plan_of(placement, topology, split)


def plan_of(placement: Placement, topology: Topology, split: str = "even", **more) -> Plan:
    """Wrap a placement in a plan of a model made for it."""
    model = MoEModel(name="toy", num_experts=placement.num_experts, layer_ids=placement.layer_ids)
    return Plan(model=model, topology=topology, placement=placement, split=split, **more)
