"""Ranks out of service, and ranks of different slots and speed: planning, scoring, checking."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import profiles

from eplb.check import check_plan, find_problems
from eplb.engines.convert import export_plan
from eplb.errors import InfeasibleProblem, InvalidInput, PlacementInvalid
from eplb.load_profile import LoadProfile
from eplb.metrics import evaluate, imbalance
from eplb.model import MoEModel
from eplb.placement.solve import Effort, solve
from eplb.placement.uneven import place_uneven
from eplb.plan import Plan, Quality
from eplb.plan_file import read_plan, write_plan
from eplb.problem import Problem
from eplb.topology import Topology

QUICK = Effort(sweeps=3)


def model_of(profile):
    return MoEModel(name="toy", num_experts=profile.num_experts, layer_ids=profile.layer_ids)


def plan_of(problem, solution):
    balance = solution.balance
    quality = Quality(
        imbalance_mean=balance.imbalance_mean,
        imbalance_worst=balance.imbalance_worst,
        bound_mean=solution.bound_mean,
        gap_mean=balance.imbalance_mean / solution.bound_mean - 1,
    )
    return Plan(
        model=problem.model,
        topology=problem.topology,
        placement=solution.placement,
        split=problem.split,
        quality=quality,
    )


@st.composite
def uneven(draw, min_slots, *, kinds=("dead", "slots", "speed")):
    """A topology with at least ``min_slots`` slots in which ranks differ."""
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_ranks = nodes * per_node
    dead = set()
    if "dead" in kinds:
        dead = draw(st.sets(st.integers(0, num_ranks - 1), max_size=num_ranks - 1))
    least = -(-min_slots // (num_ranks - len(dead)))
    slots = speed = None
    if "slots" in kinds:
        slots = tuple(draw(st.integers(least, least + 2)) for _ in range(num_ranks))
    if "speed" in kinds:
        speed = tuple(draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in range(num_ranks))
    return Topology(
        num_nodes=nodes,
        ranks_per_node=per_node,
        slots_per_rank=least + 2 if slots is None else max(slots),
        rank_slots=slots,
        rank_speed=speed,
        ranks_out_of_service=tuple(dead),
    )


@given(st.data(), profiles(), st.sampled_from(["even", "nearest"]), st.booleans())
@settings(max_examples=50)
def test_greedy_plans_any_ranks_and_the_independent_check_agrees(data, profile, split, distinct):
    topology = data.draw(uneven(profile.num_experts))
    left = np.bincount(topology.ranks_in_service // topology.ranks_per_node)
    if distinct and topology.slots_per_rank > profile.num_experts:
        return
    problem = Problem(
        profile=profile,
        model=model_of(profile),
        topology=topology,
        split=split,
        distinct_ranks=distinct,
    )
    if split == "nearest" and len(set(left[left > 0])) > 1:
        with pytest.raises(InvalidInput, match="equal numbers of ranks"):
            solve(problem)
        return
    solution = solve(problem)
    check_plan(plan_of(problem, solution), profile, distinct_ranks=distinct)
    assert 1 - 1e-12 <= solution.bound <= solution.objective
    found = evaluate(profile, solution.placement, topology, split)
    assert found.imbalance_mean == pytest.approx(solution.objective, rel=1e-12)


@given(st.data(), profiles(max_windows=2), st.sampled_from(["even", "weighted", "batch"]))
@settings(max_examples=15, deadline=None)
def test_search_leaves_ranks_out_of_service_empty_and_beats_greedy(data, profile, split):
    topology = data.draw(uneven(profile.num_experts, kinds=("dead",)))
    topology = replace(topology, slots_per_rank=min(topology.slots_per_rank, profile.num_experts))
    if topology.num_usable_slots < profile.num_experts:
        return
    problem = Problem(profile=profile, model=model_of(profile), topology=topology, split=split)
    greedy, search = (solve(problem, solver, QUICK) for solver in ("greedy", "search"))
    for solution in (greedy, search):
        check_plan(plan_of(problem, solution), profile, distinct_ranks=True)
    assert search.objective <= greedy.objective * (1 + 1e-12)
    again = solve(problem, "search", replace(QUICK, start=search.placement))
    assert again.objective <= search.objective * (1 + 1e-12)


def test_a_rank_of_half_the_speed_gets_half_the_load():
    profile = LoadProfile.from_counts(np.full((1, 1, 60), 10.0))
    topology = Topology(
        num_nodes=1,
        ranks_per_node=3,
        slots_per_rank=24,
        rank_slots=(24, 24, 12),
        rank_speed=(1, 1, 0.5),
    )
    rows = place_uneven(profile.mean_load_LE().astype(np.float32), topology)
    solution = solve(Problem(profile=profile, model=model_of(profile), topology=topology))
    assert solution.placement.phys_to_log_LS.tolist() == rows.tolist()
    assert solution.objective == pytest.approx(1.0)
    equal = Topology(num_nodes=1, ranks_per_node=3, slots_per_rank=20)
    placement = solve(Problem(profile=profile, model=model_of(profile), topology=equal)).placement
    slower = replace(equal, rank_speed=(1, 1, 0.5))
    assert evaluate(profile, placement, slower, "even").imbalance_mean == pytest.approx(400 / 240)


def test_imbalance_is_least_when_load_follows_speed():
    topology = Topology(
        num_nodes=1,
        ranks_per_node=4,
        slots_per_rank=1,
        rank_speed=(1.0, 1.0, 2.0, 1.0),
        ranks_out_of_service=(3,),
    )
    assert imbalance(np.array([10.0, 10, 20, 0]), topology) == pytest.approx(1.0)
    for a, b in itertools.product(range(1, 39), repeat=2):
        if a + b < 40:
            assert imbalance(np.array([a, b, 40.0 - a - b, 0]), topology) >= 1 - 1e-12


def test_solvers_that_know_equal_ranks_only_say_so():
    profile = LoadProfile.from_counts(np.ones((1, 1, 4)))
    topology = Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=3, rank_slots=(3, 2))
    problem = Problem(profile=profile, model=model_of(profile), topology=topology)
    for solver in ("search", "exact"):
        with pytest.raises(InvalidInput, match="--solver greedy"):
            solve(problem, solver, QUICK)
    slower = replace(topology, rank_slots=None, rank_speed=(1.0, 0.5))
    with pytest.raises(InvalidInput, match="one speed"):
        replace(problem, topology=slower, split="batch")


def test_too_few_slots_in_service_are_refused_with_the_remedy():
    profile = LoadProfile.from_counts(np.ones((1, 1, 8)))
    topology = Topology(num_nodes=1, ranks_per_node=4, slots_per_rank=2, ranks_out_of_service=(1,))
    with pytest.raises(InfeasibleProblem, match="3 ranks in service x 2"):
        Problem(profile=profile, model=model_of(profile), topology=topology)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rank_slots": (3,)}, "one a rank"),
        ({"rank_slots": (3, 4)}, "from 1 to"),
        ({"rank_slots": 3}, "one a rank"),
        ({"rank_speed": (1.0, 0.0)}, "positive"),
        ({"rank_speed": (1.0, float("nan"))}, "positive"),
        ({"ranks_out_of_service": (2,)}, "from 0 to 1"),
        ({"ranks_out_of_service": "0"}, "from 0 to 1"),
        ({"ranks_out_of_service": (0, 1)}, "all ranks"),
    ],
)
def test_ranks_that_cannot_be(more, message):
    with pytest.raises(InvalidInput, match=message):
        Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=3, **more)


def test_what_says_nothing_is_left_out():
    plain = Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=3)
    same = replace(plain, rank_slots=(3, 3), rank_speed=(1, 1.0), ranks_out_of_service=())
    assert same == plain
    assert same.is_uniform


def test_a_plan_file_carries_the_ranks(tmp_path):
    profile = LoadProfile.from_counts(np.ones((1, 1, 4)))
    topology = Topology(
        num_nodes=2,
        ranks_per_node=2,
        slots_per_rank=3,
        rank_slots=(3, 2, 3, 3),
        rank_speed=(1.0, 0.5, 1.0, 1.0),
        ranks_out_of_service=(3,),
    )
    problem = Problem(profile=profile, model=model_of(profile), topology=topology)
    plan = plan_of(problem, solve(problem))
    write_plan(plan, tmp_path / "plan.yaml")
    again = read_plan(tmp_path / "plan.yaml")
    assert again == plan
    assert again.digest() == plan.digest()
    assert plan.placement.phys_to_log_LS[0, [5, 9, 10, 11]].tolist() == [-1] * 4
    with pytest.raises(InvalidInput, match="cannot express"):
        export_plan(plan, "vllm", tmp_path / "plan.json")
    slots = plan.placement.phys_to_log_LS.copy()
    slots[0, 9] = 0
    with pytest.raises(PlacementInvalid, match="rank 3 is out of service"):
        replace(plan, placement=replace(plan.placement, phys_to_log_LS=slots))
    plain = replace(plan, topology=replace(topology, rank_slots=None, ranks_out_of_service=()))
    astray = replace(plain, placement=replace(plan.placement, phys_to_log_LS=slots))
    # Past the plan's own check, to see that the independent one finds it too.
    object.__setattr__(astray, "topology", topology)
    assert any("out of service" in problem for problem in find_problems(astray))
