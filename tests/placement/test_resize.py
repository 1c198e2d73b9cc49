"""Other numbers of ranks and slots: what moves, what has to, and that nothing is ever missing."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from cluster_model import lived_through
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import placements, plan_of, profiles, topologies

from eplb.check import check_plan
from eplb.errors import InfeasibleProblem, InvalidInput
from eplb.load_profile import LoadProfile
from eplb.metrics import evaluate
from eplb.placement.repair import repair
from eplb.placement.resize import resize
from eplb.placement.schedule import schedule_moves
from eplb.slots import Placement
from eplb.topology import Topology


@st.composite
def resized(draw):
    """(plan, profile, topology to go to)."""
    profile = draw(profiles(idle=False, max_windows=2))
    sides = [draw(topologies(min_slots=profile.num_experts, max_nodes=3)) for _ in range(2)]
    sides = [
        replace(side, slots_per_rank=min(side.slots_per_rank, profile.num_experts))
        for side in sides
    ]
    placement = draw(placements(profile.num_experts, profile.layer_ids, sides[0], distinct=True))
    split = draw(st.sampled_from(["even", "nearest", "batch"]))
    return plan_of(placement, sides[0], split), profile, sides[1]


@given(resized(), st.none() | st.integers(0, 12), st.integers(1, 2))
@settings(deadline=None, max_examples=25)
def test_limits_hold_and_no_expert_is_missing_on_the_way(case, max_moves, spare):
    plan, profile, topology = case
    try:
        found = resize(plan, profile, topology, max_moves=max_moves, solver="greedy")
    except InfeasibleProblem as error:
        assert "have to be fetched" in str(error)  # noqa: PT017
        return
    check_plan(found.plan, distinct_ranks=True)
    assert found.plan.topology == topology
    moves = found.migration.num_moves
    assert found.forced_moves <= moves
    assert max_moves is None or moves <= max_moves
    counts, values = zip(*found.curve, strict=True)
    assert list(counts) == sorted(set(counts))
    assert list(values) == sorted(values, reverse=True)
    reached = evaluate(profile, found.plan.placement, topology, plan.split).imbalance_mean
    assert (moves, pytest.approx(reached)) in [(c, v) for c, v in found.curve]
    if max_moves is None:
        assert reached <= min(values) * 1.01 + 1e-9
    schedule = schedule_moves(found.migration, plan.topology.ranks_per_node, spare_slots=spare,
                              in_parts=True)  # fmt: skip
    end = lived_through(found.migration, schedule, spare)
    assert np.array_equal(end, found.migration.new_LRK)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_no_plan_gets_by_with_less_than_what_is_forced(data):
    """Brute force over every placement of the new topology."""
    experts = data.draw(st.integers(2, 4))
    old = Topology(num_nodes=1, ranks_per_node=data.draw(st.integers(1, 3)), slots_per_rank=4)
    old = replace(old, slots_per_rank=min(experts, 4))
    new = Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=2)
    placement = data.draw(placements(experts, (0,), old, distinct=True))
    profile = LoadProfile.from_counts(np.ones((1, 1, experts)))
    found = resize(plan_of(placement, old), profile, new, solver="greedy", within=0.9)
    rows = [*placement.phys_to_log_LS.reshape(old.num_ranks, -1).tolist(), [], []]
    held = [set(row) for row in rows[:2]]

    def fetched(slots):
        sides = slots[:2], slots[2:]
        return sum(len(set(side) - have - {-1}) for side, have in zip(sides, held, strict=True))

    least = min(
        fetched(slots)
        for slots in itertools.product(range(-1, experts), repeat=4)
        if set(slots) >= set(range(experts))
    )
    assert found.forced_moves == least


def example():
    random = np.random.default_rng(1)
    profile = LoadProfile.from_counts(random.lognormal(3, 0.7, (1, 3, 24)).round() + 1)
    topology = Topology(num_nodes=6, ranks_per_node=2, slots_per_rank=3)
    slots = np.stack(
        [np.concatenate([random.permutation(24), random.permutation(24)[:12]]) for _ in range(3)]
    )
    placement = Placement(phys_to_log_LS=slots, layer_ids=profile.layer_ids, num_experts=24)
    return plan_of(placement, topology), profile


def test_night_and_day():
    plan, profile = example()
    night = resize(plan, profile, replace(plan.topology, num_nodes=4, slots_per_rank=4))
    assert night.plan.topology.label == "EP8x4"
    day = resize(night.plan, profile, plan.topology)
    assert day.plan.topology == plan.topology
    for found in (night, day):
        assert found.forced_moves < found.migration.num_moves <= found.free_moves
        assert found.curve[0][1] > found.curve[-1][1]


def test_the_same_topology_and_no_moves_is_the_same_plan():
    plan, profile = example()
    found = resize(plan, profile, plan.topology, max_moves=0, solver="greedy")
    assert found.migration.num_moves == found.forced_moves == 0
    assert found.plan.placement == plan.placement


def test_a_dead_rank_comes_back():
    plan, profile = example()
    dead = repair(plan, [4], profile).plan
    still = resize(dead, profile, replace(dead.topology, slots_per_rank=4), solver="greedy")
    assert still.plan.topology.ranks_out_of_service == (4,)
    check_plan(still.plan, distinct_ranks=True)
    back = resize(dead, profile, plan.topology)
    assert (back.plan.placement.phys_to_log_LS.reshape(3, 12, 3)[:, 4] >= 0).any(axis=1).all()


def test_an_expert_twice_on_a_rank_is_no_obstacle():
    """DeepSeek's plans have that; ours have it once at most."""
    plan, profile = example()
    slots = plan.placement.phys_to_log_LS.copy()
    slots[:, 35] = slots[:, 34]
    plan = replace(plan, placement=replace(plan.placement, phys_to_log_LS=slots))
    found = resize(plan, profile, replace(plan.topology, num_nodes=5), solver="greedy")
    check_plan(found.plan, distinct_ranks=True)


def test_what_cannot_be_resized():
    plan, profile = example()
    with pytest.raises(InfeasibleProblem, match="--slots-per-rank 12"):
        resize(plan, profile, replace(plan.topology, num_nodes=1))
    small = replace(plan.topology, slots_per_rank=2)
    with pytest.raises(InfeasibleProblem, match="use --max-moves"):
        resize(plan, profile, small, max_moves=0, solver="greedy")
    with pytest.raises(InvalidInput, match="at least 0"):
        resize(plan, profile, small, max_moves=-1)
    with pytest.raises(InvalidInput, match="equal slots and speed"):
        resize(plan, profile, replace(plan.topology, rank_speed=(0.5,) * 12))
    with pytest.raises(InvalidInput, match="in all layers"):
        resize(plan, LoadProfile.from_counts(np.ones((1, 2, 24))), small)
