"""What every solver promises, under every split rule and objective."""

import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import profiles

from eplb.check import check_plan
from eplb.errors import InfeasibleProblem, InvalidInput, PlacementInvalid
from eplb.load_profile import LoadProfile
from eplb.metrics import evaluate
from eplb.model import MoEModel
from eplb.placement.solve import SOLVERS, Effort, solve
from eplb.plan import Plan, Quality
from eplb.problem import OBJECTIVES, Problem
from eplb.slots import initial_placement
from eplb.split import SPLIT_RULES
from eplb.topology import Topology

QUICK = Effort(sweeps=5, seed=3)
# Two nodes of two ranks; 12 experts in 4 groups.
TOPOLOGY = Topology(num_nodes=2, ranks_per_node=2, slots_per_rank=4)


def recording(num_windows=5, num_layers=2, num_experts=12, seed=0):
    random = np.random.default_rng(seed)
    return LoadProfile.from_counts(
        random.lognormal(3, 1, (num_windows, num_layers, num_experts)).round() + 1,
        source="loads.npz",
    )


def problem_of(profile, topology=TOPOLOGY, groups=1, **options):
    model = MoEModel(
        name="toy",
        num_experts=profile.num_experts,
        layer_ids=profile.layer_ids,
        num_groups=groups,
    )
    return Problem(profile=profile, model=model, topology=topology, **options)


def objective_of(problem, placement):
    balance = evaluate(problem.profile, placement, problem.topology, problem.split)
    return getattr(balance, f"imbalance_{problem.statistic}")


def check(problem, solution):
    """Whatever was asked, the answer is a sound plan with a bound that holds."""
    quality = Quality(
        imbalance_mean=solution.balance.imbalance_mean,
        imbalance_worst=solution.balance.imbalance_worst,
        bound_mean=solution.bound_mean,
        gap_mean=solution.balance.imbalance_mean / solution.bound_mean - 1,
    )
    plan = Plan(
        model=problem.model,
        topology=problem.topology,
        placement=solution.placement,
        split=problem.split,
        statistic=problem.statistic,
        quality=quality,
    )
    check_plan(plan, problem.profile, distinct_ranks=True, groups_in_nodes=problem.groups_in_nodes)
    assert (solution.placement.split_weights_LS is not None) == (problem.split == "weighted")
    assert solution.objective == objective_of(problem, solution.placement)
    assert 1 - 1e-12 <= solution.bound <= solution.objective
    assert solution.gap == pytest.approx(solution.objective / solution.bound - 1)
    assert (solution.status == "optimal") == (solution.gap <= 1e-9)


def same(first, second):
    return first.placement == second.placement


@pytest.mark.parametrize("hierarchical", [False, True], ids=["global", "hierarchical"])
@pytest.mark.parametrize("statistic", OBJECTIVES)
@pytest.mark.parametrize("split", SPLIT_RULES)
def test_search_and_greedy(split, statistic, hierarchical):
    problem = problem_of(
        recording(), groups=4, split=split, statistic=statistic, groups_in_nodes=hierarchical
    )
    greedy, search = (solve(problem, solver, QUICK) for solver in ("greedy", "search"))
    for solution in (greedy, search):
        check(problem, solution)
    assert search.objective <= greedy.objective
    assert search.notes["sweeps"] == QUICK.sweeps
    assert same(search, solve(problem, "search", QUICK))


@pytest.mark.parametrize("split", SPLIT_RULES)
def test_exact_is_proven_and_below_the_others(split):
    topology = Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=3)
    problem = problem_of(recording(2, 2, 4), topology, split=split)
    exact = solve(problem, "exact", Effort(time_limit_s=20))
    check(problem, exact)
    assert exact.stop_reason == "proven"
    assert exact.notes == {"layers_proven": 2}
    for solver in ("greedy", "search"):
        other = solve(problem, solver, QUICK)
        assert exact.bound <= other.objective * (1 + 1e-9)
        assert exact.objective <= other.objective * (1 + 1e-5)
        # A bound of one solver holds for the placements of all.
        assert other.bound <= exact.objective * (1 + 1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "worst"}, "couples layers; use --solver search"),
        ({"statistic": "cvar"}, "couples layers; use --solver search"),
        ({"groups_in_nodes": True}, "knows no groups; use --solver search or greedy"),
    ],
)
def test_exact_refuses_what_it_cannot_minimise(options, message):
    with pytest.raises(InvalidInput, match=message):
        solve(problem_of(recording(), groups=4, **options), "exact", QUICK)


def test_an_unknown_solver_is_named():
    assert set(SOLVERS) == {"greedy", "search", "exact"}
    with pytest.raises(InvalidInput, match="did you mean 'search'"):
        solve(problem_of(recording()), "serch")


@pytest.mark.parametrize("split", SPLIT_RULES)
@pytest.mark.parametrize("statistic", OBJECTIVES)
def test_search_is_never_worse_than_the_plan_it_starts_from(split, statistic):
    profile = recording(seed=1)
    problem = problem_of(profile, split=split, statistic=statistic)
    good = solve(problem, "search", Effort(sweeps=40, seed=9))
    again = solve(problem, "search", Effort(sweeps=1, seed=4, start=good.placement))
    assert again.objective <= good.objective * (1 + 1e-12)
    check(problem, again)


@pytest.mark.parametrize("split", ["even", "batch"])
def test_threads_do_not_change_the_answer(split, monkeypatch):
    problem = problem_of(recording(6, 3, 14), split=split)
    found = []
    for cores in ({0}, {0, 1}, set(range(8))):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        found.append(solve(problem, "search", QUICK))
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert not same(found[0], solve(problem, "search", replace(QUICK, seed=4)))


@pytest.mark.parametrize("limit_s", [0.0, 0.05])
@pytest.mark.parametrize("split", SPLIT_RULES)
def test_out_of_time_there_is_a_placement(split, limit_s):
    problem = problem_of(recording(), split=split)
    solution = solve(problem, "search", Effort(time_limit_s=limit_s))
    check(problem, solution)
    assert solution.stop_reason == "time_limit"
    assert solution.objective <= solve(problem, "greedy").objective


ODD = {
    "one rank": (1, 1, 12, 12),
    "one node": (1, 3, 5, 12),
    "one expert": (1, 3, 1, 1),
    "one slot a rank": (2, 3, 1, 5),
    "as many slots as experts": (2, 2, 3, 12),
    "every expert everywhere": (2, 2, 3, 3),
    "odd numbers": (3, 1, 5, 11),
}


@pytest.mark.parametrize("split", SPLIT_RULES)
@pytest.mark.parametrize("name", ODD)
def test_odd_sizes(name, split):
    nodes, ranks, slots, experts = ODD[name]
    topology = Topology(num_nodes=nodes, ranks_per_node=ranks, slots_per_rank=slots)
    problem = problem_of(recording(3, 2, experts), topology, split=split)
    greedy, search = (solve(problem, solver, QUICK) for solver in ("greedy", "search"))
    check(problem, search)
    assert search.objective <= greedy.objective


@pytest.mark.parametrize("statistic", OBJECTIVES)
@pytest.mark.parametrize("split", SPLIT_RULES)
def test_layers_and_windows_without_load(split, statistic):
    counts_WLE = recording(6, 2).counts_WLE.copy()
    counts_WLE[1, 0] = counts_WLE[2] = 0
    profile = LoadProfile(
        counts_WLE=counts_WLE,
        layer_ids=(3, 7),
        scenario_W=("a", "a", "a", "b", "b", "b"),
        phase_W=("mixed",) * 6,
    )
    problem = problem_of(profile, split=split, statistic=statistic)
    solution = solve(problem, "search", QUICK)
    check(problem, solution)
    assert solution.objective <= solve(problem, "greedy").objective


@pytest.mark.parametrize("statistic", OBJECTIVES)
def test_hundreds_of_windows_are_represented(statistic):
    profile = recording(400, 2)
    problem = problem_of(profile, statistic=statistic)
    solution = solve(problem, "search", QUICK)
    check(problem, solution)
    assert solution.objective <= solve(problem, "greedy").objective
    assert solution.notes["windows_recorded"] == 400
    assert solution.notes["windows_kept"] == 192
    assert (solution.notes["windows_added"] > 0) == (statistic == "mean")


def test_the_bound_of_a_tail_of_represented_windows_holds():
    """A window kept for many has weighed more than CVaR allows, and the bound was too high."""
    counts_WLE = np.ones((400, 1, 8))
    random = np.random.default_rng(0)
    # Ten windows with one expert for all: a quarter of the tail of 40.
    counts_WLE[random.choice(400, 10, replace=False), 0, random.integers(8, size=10)] = 1000
    counts_WLE[:, 0] += random.random((400, 8)) * 0.01
    problem = problem_of(
        LoadProfile.from_counts(counts_WLE),
        Topology(num_nodes=1, ranks_per_node=4, slots_per_rank=2),
        statistic="cvar",
    )
    solution = solve(problem, "search", Effort(sweeps=20))
    # All weight on the ten would say 4; the other thirty of the tail are balanced.
    assert solution.bound < 1 + 0.25 * 3.1
    check(problem, solution)


@pytest.mark.parametrize("num_windows", [30, 250])
def test_windows_that_are_all_alike(num_windows):
    profile = LoadProfile.from_counts(np.repeat(recording(1).counts_WLE, num_windows, axis=0))
    solution = solve(problem_of(profile), "search", QUICK)
    check(problem_of(profile), solution)


def test_shared_ranks_are_allowed_and_not_used():
    counts = recording().counts_WLE * np.r_[200, np.ones(11)]
    problem = problem_of(LoadProfile.from_counts(counts), distinct_ranks=False)
    check(problem, solve(problem, "search", QUICK))
    small = problem_of(recording(2, 1, 3), distinct_ranks=False)
    with pytest.raises(InfeasibleProblem, match="use --slots-per-rank 3 or less"):
        solve(small, "search", QUICK)


def test_a_start_that_does_not_fit_is_named():
    problem = problem_of(recording())
    layers = problem.profile.layer_ids
    start = replace(QUICK, start=initial_placement(layers, 12, 20))
    with pytest.raises(PlacementInvalid, match="has 20 slots for 12 experts, and this one 16"):
        solve(problem, "search", start)
    doubled = initial_placement(layers, 12, 16).phys_to_log_LS.copy()
    doubled[:, [3, 12]] = doubled[:, [12, 3]]
    start = replace(QUICK, start=replace(start.start, phys_to_log_LS=doubled))
    with pytest.raises(PlacementInvalid, match="replicas of an expert on one rank"):
        solve(problem, "search", start)
    start = replace(QUICK, start=initial_placement((5, 6), 12, 16))
    with pytest.raises(PlacementInvalid, match="layer 0 has load and is not in the plan"):
        solve(problem, "search", start)
    grouped = problem_of(recording(), groups=4, groups_in_nodes=True)
    start = replace(QUICK, start=initial_placement(layers, 12, 16))
    with pytest.raises(PlacementInvalid, match=r"has group \d on several nodes"):
        solve(grouped, "search", start)


@settings(max_examples=40)
@given(profiles(), st.sampled_from(SPLIT_RULES), st.sampled_from(OBJECTIVES), st.data())
def test_whatever_was_recorded(profile, split, statistic, data):
    num_ranks = data.draw(st.integers(1, 4))
    least = -(-profile.num_experts // num_ranks)
    topology = Topology(
        num_nodes=1,
        ranks_per_node=num_ranks,
        slots_per_rank=data.draw(st.integers(least, profile.num_experts)),
    )
    problem = problem_of(profile, topology, split=split, statistic=statistic)
    solution = solve(problem, "search", Effort(sweeps=2, seed=data.draw(st.integers(0, 2**63))))
    check(problem, solution)
    assert solution.objective <= solve(problem, "greedy").objective * (1 + 1e-12)
