"""Each kind of fault is planted in a sound plan and has to be named."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strategies as own
from hypothesis import assume, given
from hypothesis import strategies as st

import eplb.check
import eplb.metrics
from eplb.check import check_plan, find_problems
from eplb.errors import PlacementInvalid
from eplb.load_profile import LoadProfile
from eplb.metrics import evaluate, rank_load
from eplb.plan import Plan, Quality
from eplb.slots import Placement
from eplb.topology import Topology

TOPOLOGY = Topology(num_nodes=2, ranks_per_node=2, slots_per_rank=2)
PROFILE = LoadProfile.from_counts(
    [[[4, 2, 1, 1, 3], [1, 2, 3, 4, 5]], [[2, 2, 2, 2, 9], [0, 0, 0, 0, 0]]],
    layer_ids=[3, 8],
    source="loads.npz",
)


def scored(plan: Plan, profile: LoadProfile) -> Plan:
    """The plan with its quality on a profile, and no better bound than 1."""
    found = evaluate(profile, plan.placement, plan.topology, plan.split)
    mean = max(found.imbalance_mean, 1.0)
    quality = Quality(
        imbalance_mean=mean,
        imbalance_worst=max(found.imbalance_worst, mean),
        bound_mean=1.0,
        gap_mean=mean - 1,
    )
    return replace(plan, quality=quality)


def sound(split: str = "even") -> Plan:
    rows = np.array([[0, 1, 2, 0, 3, 4, 4, -1], [4, 3, 4, 1, 0, 2, 3, 4]])
    placement = Placement(phys_to_log_LS=rows, layer_ids=(3, 8), num_experts=5)
    return scored(own.plan_of(placement, TOPOLOGY, split), PROFILE)


def with_rows(plan: Plan, rows: Any) -> Plan:
    """Plant rows behind the back of the validation that placements do."""
    placement = replace(plan.placement)
    object.__setattr__(placement, "phys_to_log_LS", np.array(rows))
    other = replace(plan)
    object.__setattr__(other, "placement", placement)
    return other


def with_slot(layer: int, slot: int, expert: int) -> Plan:
    plan = sound()
    rows = plan.placement.phys_to_log_LS.copy()
    rows[layer, slot] = expert
    return with_rows(plan, rows)


@pytest.mark.parametrize("split", own.SPLITS)
def test_a_sound_plan_has_no_problems(split: str) -> None:
    plan = sound(split)
    assert find_problems(plan) == ()
    assert find_problems(plan, PROFILE) == ()
    check_plan(plan, PROFILE)


@given(own.cases(splits=own.ALL_SPLITS))
def test_no_sound_plan_has_problems(case: Any) -> None:
    profile, placement, topology, split = case
    plan = own.plan_of(placement, topology, split)
    assert find_problems(plan, profile) == ()
    assert find_problems(scored(plan, profile), profile) == ()


@given(own.cases(distinct=True))
def test_distinct_ranks_are_no_problem(case: Any) -> None:
    profile, placement, topology, split = case
    plan = own.plan_of(placement, topology, split)
    assert find_problems(plan, profile, distinct_ranks=True) == ()


@given(own.plans())
def test_shared_ranks_are_counted(plan: Plan) -> None:
    per_rank = plan.topology.slots_per_rank
    again = 0
    for row in plan.placement.phys_to_log_LS.tolist():
        for start in range(0, len(row), per_rank):
            held = [expert for expert in row[start : start + per_rank] if expert >= 0]
            again += len(held) - len(set(held))
    assert len(find_problems(plan, distinct_ranks=True)) == again


@pytest.mark.parametrize(
    ("plan", "problems"),
    [
        (
            with_slot(1, 7, 5),
            ["layer 8, slot 7 (rank 3): 5 is no expert; experts are 0 to 4, and -1 is an empty"],
        ),
        (with_slot(0, 7, -2), ["layer 3, slot 7 (rank 3): -2 is no expert"]),
        (with_slot(0, 1, 0), ["layer 3: expert 1 is in no slot"]),
        (
            with_slot(0, 1, 99),
            ["layer 3: expert 1 is in no slot", "layer 3, slot 1 (rank 0): 99 is no expert"],
        ),
        (
            with_rows(sound(), [[0, 1, 2, 3, 4, 0, 1]] * 2),
            [f"layer {i} has 7 slots instead of 8 (4 ranks of 2)" for i in (3, 8)],
        ),
        (
            with_rows(sound(), [[0, 1, 2, 3, 4, 0, 1, 2]]),
            ["the plan has 1 layers of slots and 2 layer ids"],
        ),
        (
            with_rows(sound(), [[0.0, 1, 2, 3, 4, 0, 1, 2]] * 2),
            [f"layer {i}, slot {s} (rank {s // 2}): {e}.0 is" for i in (3, 8)
             for s, e in enumerate((0, 1, 2, 3, 4, 0, 1, 2))],
        ),
    ],
)  # fmt: skip
def test_a_fault_of_slots_is_named(plan: Plan, problems: list[str]) -> None:
    found = find_problems(plan, PROFILE, distinct_ranks=True)
    assert len(found) == len(problems)
    for line, start in zip(found, problems, strict=True):
        assert line.startswith(start)
        assert "\n" not in line


@given(own.plans(), st.data())
def test_a_lost_expert_is_named_wherever_it_was(plan: Plan, data: Any) -> None:
    rows = plan.placement.phys_to_log_LS.copy()
    layer = data.draw(st.integers(0, len(rows) - 1))
    expert = data.draw(st.integers(0, plan.model.num_experts - 1))
    rows[layer, rows[layer] == expert] = -1
    layer_id = plan.placement.layer_ids[layer]
    expected = f"layer {layer_id}: expert {expert} is in no slot"
    assert find_problems(with_rows(plan, rows)) == (expected,)


def test_a_second_replica_on_a_rank_is_a_problem_only_when_asked() -> None:
    rows = [[0, 1, 2, 3, 4, 4, 0, 1], [0, 1, 2, 3, 4, 0, 1, 1]]
    plan = replace(with_rows(sound(), rows), quality=None)
    rule = "replicas have to be on distinct ranks"
    assert find_problems(plan, PROFILE) == ()
    assert find_problems(plan, PROFILE, distinct_ranks=True) == (
        f"layer 3, rank 2: expert 4 is in slot 4 and again in slot 5; {rule}",
        f"layer 8, rank 3: expert 1 is in slot 6 and again in slot 7; {rule}",
    )


def test_a_group_on_two_nodes_is_a_problem_only_when_asked() -> None:
    placement = Placement(
        phys_to_log_LS=np.array([[0, 1, 0, 1, 2, 3, 2, -1], [2, 3, 2, 3, 0, 1, 1, 2]]),
        layer_ids=(3, 8),
        num_experts=4,
    )
    plan = own.plan_of(placement, TOPOLOGY)
    plan = replace(plan, model=replace(plan.model, num_groups=2))
    assert find_problems(plan) == ()
    assert find_problems(plan, groups_in_nodes=True) == (
        "layer 8: group 1 is on the nodes [0, 1]; groups have to stay within a node",
    )


def test_a_layer_twice_is_named() -> None:
    plan = sound()
    for part in (plan.placement, plan.model):
        object.__setattr__(part, "layer_ids", (3, 3))
    assert find_problems(plan) == ("layer 3 is in the plan 2 times",)


def test_layers_that_placement_and_model_disagree_on_are_named() -> None:
    plan = sound()
    object.__setattr__(plan.model, "layer_ids", (3, 9))
    assert "name different layers" in find_problems(plan)[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"imbalance_mean": 1.0001}, "quality: imbalance_mean is 1.0001 in the plan and 1."),
        ({"imbalance_worst": 4.0}, "quality: imbalance_worst is 4.0 in the plan and 1."),
        ({"imbalance_worst": 1.01}, "is above imbalance_worst 1.01"),
        ({"bound_mean": 3.9}, "quality: bound_mean 3.9 is above the imbalance_mean 1."),
        ({"bound_mean": 0.999}, "quality: bound_mean 0.999 is below 1"),
        ({"gap_mean": 0.0}, "quality: gap_mean 0.0 is not (imbalance_mean - bound_mean) / bound"),
        ({"gap_mean": float("nan")}, "quality: gap_mean nan is not"),
        ({"bound_mean": float("nan")}, "quality: bound_mean nan is"),
        ({"imbalance_mean": float("nan")}, "quality: imbalance_mean is nan in the plan and 1."),
        ({"imbalance_worst": float("inf")}, "quality: imbalance_worst is inf in the plan"),
    ],
)
def test_a_false_figure_is_named(change: dict[str, float], problem: str) -> None:
    plan = sound()
    plan = replace(plan, quality=replace(plan.quality, **change))
    found = find_problems(plan, PROFILE)
    assert any(problem in line for line in found), found


@given(own.cases(splits=own.ALL_SPLITS), st.sampled_from(["imbalance_mean", "imbalance_worst"]))
def test_figures_have_to_agree_to_nine_digits(case: Any, name: str) -> None:
    profile, placement, topology, split = case
    plan = scored(own.plan_of(placement, topology, split), profile)
    stated = getattr(plan.quality, name)
    off = replace(plan, quality=replace(plan.quality, **{name: stated * (1 + 1e-8)}))
    assert any(f"quality: {name} is " in line for line in find_problems(off, profile))


@given(own.cases(idle=False), st.data())
def test_figures_of_another_placement_are_false(case: Any, data: Any) -> None:
    profile, placement, topology, split = case
    other = data.draw(own.placements(profile.num_experts, profile.layer_ids, topology))
    plan = scored(own.plan_of(placement, topology, split), profile)
    others = scored(own.plan_of(other, topology, split), profile)
    assume(plan.quality.imbalance_mean != pytest.approx(others.quality.imbalance_mean, rel=1e-8))
    assert find_problems(replace(plan, quality=others.quality), profile)


def test_figures_of_another_split_rule_are_false() -> None:
    even = sound("even")
    found = find_problems(replace(even, split="nearest"), PROFILE)
    assert any("imbalance_mean" in line for line in found)


def test_a_split_of_a_window_that_is_not_the_best_is_named(monkeypatch: Any) -> None:
    """What the evaluator takes for the optimum is compared with a linear programme."""
    plan = sound("batch")
    assert find_problems(plan, PROFILE) == ()
    even = lambda profile, placement, topology, split: rank_load(  # noqa: E731
        profile, placement, topology, "even"
    )
    monkeypatch.setattr(eplb.metrics, "rank_load", even)
    found = find_problems(scored(plan, PROFILE), PROFILE)
    assert any("a linear programme finds" in line for line in found)


def test_loads_without_a_place_are_named() -> None:
    other = LoadProfile.from_counts(np.ones((2, 6)), layer_ids=[3, 9], source="other.npz")
    assert find_problems(sound(), other) == (
        "layer 9 has load in other.npz and is not in the plan",
        "other.npz has 6 experts and the plan 5",
    )


def test_a_rule_the_checker_does_not_know_is_a_problem() -> None:
    plan = sound()
    object.__setattr__(plan, "split", "lottery")
    assert find_problems(plan, PROFILE) == ("split rule 'lottery' cannot be checked",)


def test_check_plan_raises_the_first_and_counts_the_rest() -> None:
    rows = [[0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 0, 1, 2]]
    plan = replace(with_rows(sound(), rows), quality=None)
    with pytest.raises(PlacementInvalid) as caught:
        check_plan(plan)
    assert str(caught.value) == "layer 3: expert 1 is in no slot (and 3 more problems)"
    rows[0][:4] = [0, 1, 2, 3]
    with pytest.raises(PlacementInvalid, match=r"^layer 3: expert 1 is in no slot$"):
        check_plan(with_slot(0, 1, 0))


def test_the_checker_shares_no_code_with_what_it_checks() -> None:
    tree = ast.parse(Path(eplb.check.__file__).read_text(encoding="ascii"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {
        "__future__",
        "math",
        "scipy.optimize",
        "scipy.sparse",
        "eplb.errors",
        "eplb.load_profile",
        # The optima of `batch`, which are compared with a linear programme.
        "eplb.metrics",
        "eplb.plan",
        "eplb.topology",
    }
