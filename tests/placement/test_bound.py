"""Bounds never exceed what can be reached, and are what the module says they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import optimal_max_rank_load
from strategies import loads

import eplb
from eplb.load_profile import LoadProfile
from eplb.model import MoEModel
from eplb.placement.bound import load_bound, weighted_bounds
from eplb.placement.greedy import place_greedy
from eplb.problem import Problem
from eplb.topology import Topology

FLASHLB_EXAMPLE = [600.0, 560, 120, 120, 20, 10, 10, 10]


@settings(max_examples=300)
@given(st.data())
def test_brute_force_is_never_below(data):
    num_experts = data.draw(st.integers(1, 5))
    num_ranks = data.draw(st.integers(1, 4))
    slots_per_rank = data.draw(st.integers(-(-num_experts // num_ranks), 8 // num_ranks))
    load_E = data.draw(loads(num_experts))
    best = optimal_max_rank_load(load_E.tolist(), num_ranks, slots_per_rank, distinct_ranks=False)
    bound_L = load_bound(load_E[np.newaxis], num_ranks=num_ranks, slots_per_rank=slots_per_rank)
    assert bound_L[0] * load_E.sum() / num_ranks <= float(best) * (1 + 1e-9)


@given(loads(2, 24), st.sampled_from([(4, 8), (8, 4), (14, 2), (16, 2)]))
def test_greedy_is_never_below(load_LE, ranks_and_slots):
    num_ranks, slots_per_rank = ranks_and_slots
    slots, _ = place_greedy(
        load_LE.astype(np.float32), num_slots=num_ranks * slots_per_rank, num_ranks=num_ranks
    )
    count_LE = np.stack([np.bincount(row, minlength=24) for row in slots])
    share_LS = np.take_along_axis(load_LE / count_LE, slots, axis=1)
    load_LR = share_LS.reshape(2, num_ranks, -1).sum(axis=2)
    reached_L = load_LR.max(axis=1) / load_LR.mean(axis=1)
    for bound_L in (
        load_bound(load_LE, num_ranks=num_ranks, slots_per_rank=slots_per_rank),
        load_bound(
            load_LE, num_ranks=num_ranks, slots_per_rank=slots_per_rank, reached_L=reached_L
        ),
    ):
        assert (bound_L <= reached_L * (1 + 1e-9)).all()


def test_hottest_expert_over_its_possible_replicas():
    # 4 ranks x 1 slot, 4 experts: one replica each, so the hottest rank is the hottest expert.
    bound_L = load_bound(np.array([[10.0, 2, 2, 2]]), num_ranks=4, slots_per_rank=1)
    assert bound_L[0] == pytest.approx(10 / 4)


def test_slot_counting():
    # Six experts of one load in eight slots: two have a second replica, so some rank of two slots
    # holds two whole experts or the bound of the mean is out of reach.
    bound_L = load_bound(np.ones((1, 3)), num_ranks=4, slots_per_rank=1)
    assert bound_L[0] == pytest.approx(4 / 3, rel=1e-3)


def test_large_replicas_cannot_share_a_rank():
    # Three equal experts, two ranks, two slots: the fourth slot halves one of them, and a rank
    # with two whole ones is out of reach of neither mean nor hottest expert.
    bound_L = load_bound(np.ones((1, 3)), num_ranks=2, slots_per_rank=2)
    best = optimal_max_rank_load([1.0, 1.0, 1.0], 2, 2, distinct_ranks=False)
    assert bound_L[0] * 1.5 == pytest.approx(float(best), rel=1e-3)


def test_flashlb_example_is_not_bounded_above_its_optimum():
    # 196.67 is the optimum that MILP proves for the example in vllm-ascend's FlashLB.
    load_LE = np.array([FLASHLB_EXAMPLE])
    bound = load_bound(load_LE, num_ranks=8, slots_per_rank=2)[0] * load_LE.sum() / 8
    assert 181.25 <= bound <= 196.67


def test_without_even_split_mean_hottest_and_slots_count():
    load_LE = np.array([FLASHLB_EXAMPLE])
    bound_L = load_bound(load_LE, num_ranks=8, slots_per_rank=2, even=False)
    assert bound_L[0] == pytest.approx(1.0)


@pytest.mark.parametrize("split", ["even", "nearest"])
@given(counts=loads(5, 3, 12))
def test_bound_of_many_windows_holds(split, counts):
    profile = LoadProfile.from_counts(counts)
    solution = eplb.solve(
        Problem(
            profile=profile,
            model=MoEModel(name="t", num_experts=12, layer_ids=profile.layer_ids),
            topology=Topology(num_nodes=2, ranks_per_node=4, slots_per_rank=2),
            split=split,
        )
    )
    # Up to rounding: windows are scaled to their mean before they are bounded.
    assert 1 - 1e-12 <= solution.bound <= solution.objective
    assert solution.gap == pytest.approx(solution.objective / solution.bound - 1)


def test_without_even_split_experts_above_the_target_need_slots():
    # Four slots, two experts of 2 and one of 0.1: below 2 both of the two need a second slot, and
    # there is one left; the mean rank load alone is 1.025.
    load_LE = np.array([[2.0, 2.0, 0.1]])
    bound_L = load_bound(load_LE, num_ranks=4, slots_per_rank=1, even=False)
    assert bound_L[0] * 4.1 / 4 == pytest.approx(2.0, rel=1e-3)


def test_windows_that_differ_are_bounded_by_their_own_hottest_expert():
    # In each window another expert has everything: their mean is flat, each window is not.
    load_WLE = np.eye(4)[:, np.newaxis] * 4
    bound_L = weighted_bounds(
        load_WLE, np.full(4, 0.25), num_ranks=4, slots_per_rank=1, split="batch"
    )
    assert bound_L[0] == pytest.approx(4.0)


def test_windows_and_layers_without_load_are_bounded_by_nothing():
    load_WLE = np.ones((3, 2, 6))
    load_WLE[1] = 0
    load_WLE[:, 1] = 0
    bound_L = weighted_bounds(
        load_WLE, np.array([0.5, 0.25, 0.25]), num_ranks=3, slots_per_rank=2, split="even"
    )
    np.testing.assert_allclose(bound_L, [0.75 * 2, 0])


def test_windows_with_hot_experts_of_their_own_need_slots_for_all():
    # Each window has two experts of its own that need two replicas below 1.5: 16 experts, 24 slots.
    load_WE = np.full((4, 16), 0.5)
    for window in range(4):
        load_WE[window, 4 * window : 4 * window + 2] = 2.5
        load_WE[window] *= 12 / load_WE[window].sum()
    shape = {"num_ranks": 12, "slots_per_rank": 2}
    weight_W = np.full(4, 0.25)
    for split in ("even", "nearest", "weighted", "batch"):
        alone, coupled = (
            weighted_bounds(
                load_WE[:, np.newaxis], weight_W, split=split, thorough=thorough, **shape
            )[0]
            for thorough in (False, True)
        )
        assert coupled >= alone
    even = weighted_bounds(load_WE[:, np.newaxis], weight_W, split="even", **shape)[0]
    assert even > alone * 1.05
