"""Few moves from the placement in force: limits hold, and what the curve says is so."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb.check import check_plan
from eplb.errors import InvalidInput, PlacementInvalid
from eplb.load_profile import LoadProfile
from eplb.metrics import evaluate
from eplb.model import MoEModel
from eplb.placement.keep_slots import count_moves
from eplb.placement.replan import Point, break_even, replan
from eplb.plan import Plan
from eplb.problem import OBJECTIVES, Problem
from eplb.slots import initial_placement
from eplb.split import SPLIT_RULES
from eplb.topology import Topology
from tests.strategies import plan_of

TOPOLOGY = Topology(num_nodes=2, ranks_per_node=2, slots_per_rank=3)


def case(seed, layers=2, windows=3, **options):
    """A problem and a placement in force."""
    random = np.random.default_rng(seed)
    counts = random.poisson(random.lognormal(4, 1, (layers, 8)), (windows, layers, 8)) + 1
    profile = LoadProfile.from_counts(counts.astype(float))
    model = MoEModel(name="toy", num_experts=8, layer_ids=profile.layer_ids, num_groups=2)
    problem = Problem(profile=profile, model=model, topology=TOPOLOGY, **options)
    start = initial_placement(profile.layer_ids, 8, TOPOLOGY.num_slots)
    if problem.split == "weighted":
        rows = start.phys_to_log_LS
        count = np.stack([np.bincount(row, minlength=8) for row in rows])
        weights = 1.0 / np.take_along_axis(count, rows, axis=1)
        start = replace(start, split_weights_LS=weights)
    return problem, start


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 12),
    st.none() | st.integers(0, 3),
    st.sampled_from(SPLIT_RULES),
    st.sampled_from(OBJECTIVES),
)
def test_limits_hold_and_the_plan_is_valid(seed, limit, per_layer, split, statistic):
    problem, start = case(seed, split=split, statistic=statistic)
    found = replan(problem, start, max_moves=limit, max_moves_per_layer=per_layer)
    old, new = start.phys_to_log_LS, found.placement.phys_to_log_LS
    moved = [count_moves(old[[i]], new[[i]], 4) for i in range(len(old))]
    assert found.num_moves == sum(moved) <= limit
    assert per_layer is None or max(moved) <= per_layer
    # The independent check knows of experts without a slot, fractions and shared ranks.
    check_plan(plan_of(found.placement, TOPOLOGY, split, statistic=statistic), problem.profile)
    moves = [point.moves for point in found.curve]
    values = [point.imbalance for point in found.curve]
    assert moves[0] == 0
    assert moves[-1] == found.num_moves
    assert moves == sorted(set(moves))
    assert values == sorted(values, reverse=True)
    assert (
        count_moves(old, found.at(moves[len(moves) // 2]).phys_to_log_LS, 4)
        == (moves[len(moves) // 2])
    )


def test_an_expert_that_stays_keeps_its_slot():
    for seed in range(20):
        problem, start = case(seed)
        new = replan(problem, start, max_moves=4).placement.phys_to_log_LS.reshape(2, 4, 3)
        old = start.phys_to_log_LS.reshape(2, 4, 3)
        for layer, rank in np.ndindex(2, 4):
            both = set(old[layer, rank]) & set(new[layer, rank])
            assert all(
                old[layer, rank].tolist().index(e) == new[layer, rank].tolist().index(e)
                for e in both
            )


def test_ranks_out_of_service_stay_empty():
    problem, _ = case(0, windows=1)
    topology = Topology(num_nodes=2, ranks_per_node=2, slots_per_rank=4, ranks_out_of_service=(1,))
    row = np.array([0, 1, 2, 3, -1, -1, -1, -1, 4, 5, 6, 7, 0, 1, 2, 3])
    start = replace(
        initial_placement(problem.profile.layer_ids, 8, 16), phys_to_log_LS=np.stack([row, row])
    )
    found = replan(replace(problem, topology=topology), start, max_moves=6)
    new = found.placement.phys_to_log_LS
    assert found.num_moves == count_moves(start.phys_to_log_LS, new, 4) > 0
    assert ((new < 0) == (start.phys_to_log_LS < 0)).all()
    balance = evaluate(problem.profile, found.placement, topology, "even")
    assert balance.imbalance_mean == pytest.approx(found.curve[-1].imbalance)


def test_groups_stay_in_their_nodes():
    for seed in range(20):
        problem, start = case(seed, windows=1, groups_in_nodes=True)
        rows = np.concatenate([[0, 1, 2, 3, 0, 1], [4, 5, 6, 7, 4, 5]])
        start = replace(start, phys_to_log_LS=np.stack([rows, rows]))
        new = replan(problem, start, max_moves=8).placement.phys_to_log_LS
        assert (new // 4 == np.repeat([0, 1], 6)).all()


def largest(row_S, load_E):
    """The largest rank load of one layer and window under the rule even."""
    share_S = load_E[row_S] / np.bincount(row_S, minlength=len(load_E))[row_S]
    return share_S.reshape(4, -1).sum(axis=1).max()


def test_one_move_is_as_good_as_the_best_replacement_there_is():
    for seed in range(20):
        problem, start = case(seed, layers=1, windows=1)
        old = start.phys_to_log_LS
        load_E = problem.profile.counts_WLE[0, 0]
        load_E = load_E * 4 / load_E.sum()
        options = [largest(old[0], load_E)]
        for slot, expert in np.ndindex(12, 8):
            row_S = old[0].copy()
            row_S[slot] = expert
            rank = row_S.reshape(4, 3)[slot // 3]
            if len(set(row_S.tolist())) == 8 and len(set(rank.tolist())) == 3:
                options.append(largest(row_S, load_E))
        found = replan(problem, start, max_moves=1)
        assert found.curve[-1].imbalance == pytest.approx(
            largest(found.placement.phys_to_log_LS[0], load_E)
        )
        # The norm of power 16 stands for the largest load, within 4 ** (1 / 16).
        assert found.curve[-1].imbalance <= min(options) * 4 ** (1 / 16)


def test_brute_force_confirms_that_no_fewer_moves_reach_a_balance():
    """Four ranks of one slot and two of two: every placement within the moves is looked at."""
    topology = Topology(num_nodes=1, ranks_per_node=3, slots_per_rank=2)
    behind = []
    for seed in range(30):
        random = np.random.default_rng(seed)
        counts = random.integers(1, 100, (1, 1, 5)).astype(float)
        profile = LoadProfile.from_counts(counts)
        model = MoEModel(name="toy", num_experts=5, layer_ids=profile.layer_ids)
        problem = Problem(profile=profile, model=model, topology=topology)
        start = initial_placement(profile.layer_ids, 5, 6)
        old = start.phys_to_log_LS
        load_E = counts[0, 0] * 3 / counts[0, 0].sum()
        best = dict.fromkeys(range(7), np.inf)
        for twice in range(5):
            for row in set(permutations([*range(5), twice])):
                row_S = np.array(row)
                if any(a == b for a, b in row_S.reshape(3, 2)):
                    continue
                share_S = load_E[row_S] / np.bincount(row_S, minlength=5)[row_S]
                value = share_S.reshape(3, 2).sum(axis=1).max()
                moves = count_moves(old, row_S[np.newaxis], 3)
                for m in range(moves, 7):
                    best[m] = min(best[m], value)
        for point in replan(problem, start, max_moves=6).curve:
            # Never better than what there is within so many moves, or moves were miscounted.
            assert point.imbalance >= best[point.moves] - 1e-9
            behind.append(point.imbalance / best[point.moves])
    assert np.mean(behind) < 1.05


def test_nothing_moves_where_nothing_gains():
    problem, start = case(0, windows=1)
    even = LoadProfile.from_counts(np.ones((1, 2, 8)))
    start = replace(start, phys_to_log_LS=np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]] * 2))
    counts = np.where(np.arange(8) < 4, 2.0, 1.0) * np.ones((1, 2, 8))
    balanced = replace(even, counts_WLE=counts)
    found = replan(replace(problem, profile=balanced), start, max_moves=12)
    assert found.num_moves == 0
    assert found.placement == start


@pytest.mark.parametrize("split", SPLIT_RULES)
def test_many_moves_lower_the_imbalance_under_every_rule(split):
    before, after = [], []
    for seed in range(5):
        problem, start = case(seed, windows=1, split=split)
        found = replan(problem, start, max_moves=24)
        before.append(evaluate(problem.profile, start, TOPOLOGY, split).imbalance_mean)
        after.append(evaluate(problem.profile, found.placement, TOPOLOGY, split).imbalance_mean)
        assert after[-1] <= before[-1] + 1e-9
    assert np.mean(after) < np.mean(before) - 0.05


def test_break_even_weighs_gain_against_transfer():
    curve = [
        Point(moves=0, imbalance=1.5), Point(moves=1, imbalance=1.2), Point(moves=9, imbalance=1.1)
    ]  # fmt: skip

    def best(horizon):
        return break_even(curve, step_s=1.0, horizon_steps=horizon, transfer_s=float)

    kept = best(1)
    assert kept.moves == 0
    assert kept.gain_s == pytest.approx(0.3)
    assert kept.transfer_s == 1.0
    assert best(10).moves == 1
    assert best(1000).moves == 9
    assert best(1000).gain_s == pytest.approx(400.0)
    assert break_even(curve[:1], step_s=1.0, horizon_steps=9, transfer_s=float).moves == 0


def test_bad_limits_and_doubled_replicas_are_refused():
    problem, start = case(0)
    with pytest.raises(InvalidInput, match="at least 0"):
        replan(problem, start, max_moves=-1)
    doubled = start.phys_to_log_LS.copy()
    doubled[0, :3] = 0
    with pytest.raises(PlacementInvalid, match="on one rank"):
        replan(problem, replace(start, phys_to_log_LS=doubled), max_moves=1)
    other = replace(problem, topology=Topology(num_nodes=2, ranks_per_node=2, slots_per_rank=4))
    with pytest.raises(PlacementInvalid, match="topology"):
        replan(other, start, max_moves=1)
    with pytest.raises(PlacementInvalid, match="split_weights"):
        replan(replace(problem, split="weighted"), start, max_moves=1)
    with pytest.raises(InvalidInput, match="no point"):
        replan(problem, start, max_moves=1).at(99)
    assert isinstance(plan_of(start, TOPOLOGY), Plan)
