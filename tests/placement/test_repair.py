"""Repairs against brute force and on a model of the cluster."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases, plan_of, profiles, rows, weighted

from eplb.check import check_plan
from eplb.errors import InfeasibleProblem, InvalidInput
from eplb.load_profile import LoadProfile
from eplb.metrics import evaluate
from eplb.placement.repair import repair
from eplb.placement.schedule import schedule_moves
from eplb.slots import Placement
from eplb.topology import Topology


@st.composite
def broken(draw, splits=("even", "nearest", "weighted", "batch")):
    """(plan, profile, dead ranks); there may be too few slots left."""
    profile, placement, topology, split = draw(cases(distinct=True, splits=splits))
    plan = plan_of(placement, topology, split)
    dead = draw(st.sets(st.integers(0, topology.num_ranks - 1), max_size=topology.num_ranks))
    return plan, profile, sorted(dead)


def by_rank(slots_LS, topology):
    return slots_LS.reshape(len(slots_LS), topology.num_ranks, -1)


@given(broken(), st.booleans(), st.integers(0, 6))
@settings(deadline=None)
def test_what_survives_stays_and_every_expert_is_back(case, with_loads, max_moves):
    plan, profile, dead = case
    num_left = plan.topology.num_ranks - len(dead)
    if num_left * plan.topology.slots_per_rank < plan.model.num_experts:
        with pytest.raises(InfeasibleProblem, match=r"eplb resize|no rank is left"):
            repair(plan, dead, profile)
        return
    moves = max_moves if with_loads else 0
    found = repair(plan, dead, profile if with_loads else None, max_moves=moves)
    topology = found.plan.topology
    assert topology.ranks_out_of_service == tuple(dead)
    check_plan(found.plan, distinct_ranks=True)
    old, new = (by_rank(p.placement.phys_to_log_LS, topology) for p in (plan, found.plan))
    assert (new[:, dead] == -1).all()
    # Lived through: what survives, then the loads, then the transfers.
    live = [[set(r) - {-1} if n not in dead else set() for n, r in enumerate(layer)]
            for layer in old.tolist()]  # fmt: skip
    missing = sum(len(set(range(plan.model.num_experts)) - set().union(*layer)) for layer in live)
    assert found.min_loads == missing == found.lost.num_moves
    restored = [[set(r) - {-1} for r in layer] for layer in found.lost.new_LRK.tolist()]
    for layer, rank, slot, expert in zip(
        *(getattr(found.lost, f"{x}_M").tolist() for x in ("layer", "rank", "slot", "expert")),
        strict=True,
    ):
        assert expert not in set().union(*live[layer])
        assert restored[layer][rank] - live[layer][rank] >= {expert}
        assert found.lost.new_LRK[layer, rank, slot] == expert
    schedule = schedule_moves(found.moves, topology.ranks_per_node)
    for layer, rank, expert, source in zip(
        found.moves.layer_M, found.moves.rank_M, found.moves.expert_M, schedule.source_M,
        strict=True,
    ):  # fmt: skip
        assert source not in dead
        assert expert in restored[layer][source]
        restored[layer][rank].add(expert)
    assert found.moves.num_moves <= moves
    for layer, wanted in enumerate(new.tolist()):
        assert all(set(w) - {-1} <= restored[layer][r] for r, w in enumerate(wanted))
    # Where nothing was brought in, slots are as they were.
    same = (old == new) | (new == -1)
    changed = set(zip(*np.nonzero(~same), strict=True))
    brought = {
        (layer, rank)
        for part in (found.lost, found.moves)
        for layer, rank in zip(part.layer_M, part.rank_M, strict=True)
    }
    assert {(layer, rank) for layer, rank, _ in changed} <= brought


@given(st.data())
@settings(max_examples=30)
def test_no_placement_of_the_ranks_left_brings_in_less(data):
    topology = Topology(num_nodes=1, ranks_per_node=3, slots_per_rank=2)
    experts = data.draw(st.integers(1, 4))
    row = data.draw(rows(experts, topology, distinct=True))
    placement = Placement(phys_to_log_LS=row[np.newaxis], layer_ids=(3,), num_experts=experts)
    dead = data.draw(st.integers(0, 2))
    found = repair(plan_of(placement, topology), [dead])
    left = [set(row[2 * r : 2 * r + 2].tolist()) for r in range(3) if r != dead]

    def brought(new):
        sides = new[:2], new[2:]
        return sum(len(set(side) - held - {-1}) for side, held in zip(sides, left, strict=True))

    least = min(
        brought(new)
        for new in itertools.product(range(-1, experts), repeat=4)
        if set(new) >= set(range(experts))
    )
    assert found.lost.num_moves + found.moves.num_moves == least == found.min_loads


@given(profiles(num_experts=6, max_layers=1, idle=False), st.data())
@settings(max_examples=30)
def test_a_lost_expert_goes_where_it_costs_least(profile, data):
    """Against every slot it could take, by the power mean that stands for the largest load."""
    topology = Topology(num_nodes=1, ranks_per_node=4, slots_per_rank=3)
    row = data.draw(rows(6, topology, distinct=True))
    placement = Placement(
        phys_to_log_LS=row[np.newaxis], layer_ids=profile.layer_ids, num_experts=6
    )
    dead = data.draw(st.integers(0, 3))
    found = repair(plan_of(placement, topology), [dead], profile)
    if found.min_loads != 1:
        return
    share_WE = profile.counts_WLE[:, 0] / profile.counts_WLE[:, 0].sum(axis=1, keepdims=True) * 3

    def cost(slots):
        slots = np.delete(slots.reshape(4, 3), dead, axis=0)
        count = np.bincount(slots[slots >= 0], minlength=6)
        if (count == 0).any():
            return np.inf
        load = np.where(slots >= 0, (share_WE / count)[:, slots], 0.0).sum(axis=2)
        return (load**16).sum(axis=1).__pow__(1 / 16).mean()

    survivors = row.reshape(4, 3).copy()
    survivors[dead] = -1
    lost = (set(range(6)) - set(survivors.reshape(-1).tolist())).pop()
    costs = []
    for slot in range(12):
        if slot // 3 != dead:
            tried = survivors.reshape(-1).copy()
            tried[slot] = lost
            costs.append(cost(tried))
    assert cost(found.plan.placement.phys_to_log_LS[0]) <= min(costs) * (1 + 1e-6)


def skewed_plan(seed=0):
    random = np.random.default_rng(seed)
    profile = LoadProfile.from_counts(random.lognormal(3, 1, (1, 4, 32)).round() + 1)
    topology = Topology(num_nodes=4, ranks_per_node=2, slots_per_rank=6)
    slots = np.stack(
        [
            np.concatenate([random.permutation(32), random.permutation(32)[:16]])
            for _ in range(profile.num_layers)
        ]
    )
    placement = Placement(phys_to_log_LS=slots, layer_ids=profile.layer_ids, num_experts=32)
    return plan_of(placement, topology), profile


def test_moves_beyond_what_is_lost_improve_the_balance_and_stay_within_the_limit():
    plan, profile = skewed_plan()
    reached = []
    for max_moves in (0, 4, 16):
        found = repair(plan, [5], profile, max_moves=max_moves)
        assert found.moves.num_moves <= max_moves
        reached.append(
            evaluate(profile, found.plan.placement, found.plan.topology, "even").imbalance_mean
        )
    assert reached[0] > reached[1] > reached[2]


def test_one_after_another_is_as_all_at_once_for_what_is_out_of_service():
    plan, profile = skewed_plan()
    first = repair(plan, [1], profile).plan
    second = repair(first, [6], profile)
    assert second.plan.topology.ranks_out_of_service == (1, 6)
    assert repair(first, [1, 6], profile).plan == second.plan
    assert repair(second.plan, [], profile).lost.num_moves == 0


def test_slower_ranks_get_less_and_fewer_slots_stay_fewer():
    plan, profile = skewed_plan()
    slots = plan.placement.phys_to_log_LS.reshape(4, 8, 6).copy()
    slots[:, 2, 5] = -1
    if not all(set(row.reshape(-1).tolist()) >= set(range(32)) for row in slots):
        slots[:, 2, 5] = plan.placement.phys_to_log_LS.reshape(4, 8, 6)[:, 2, 5]
    topology = replace(plan.topology, rank_speed=(1.0, 0.25) + (1.0,) * 6)
    uneven = replace(plan, topology=topology)
    found = repair(uneven, [7], profile)
    check_plan(found.plan)
    with pytest.raises(InvalidInput, match="one speed"):
        repair(uneven, [7], profile, max_moves=100)


@given(st.data())
@settings(max_examples=10, deadline=None)
def test_fractions_are_solved_anew(data):
    plan, profile = skewed_plan(data.draw(st.integers(0, 99)))
    placement = data.draw(weighted(plan.placement))
    plan = replace(plan, placement=placement, split="weighted")
    for loads in (profile, None):
        found = repair(plan, [0, 3], loads).plan
        weights = found.placement.split_weights_LS
        assert weights is not None
        assert not weights[:, :6].any()
    even = evaluate(profile, found.placement, found.topology, "even")
    best = repair(plan, [0, 3], profile).plan
    assert (
        evaluate(profile, best.placement, best.topology, "weighted").imbalance_mean
        <= evaluate(profile, best.placement, best.topology, "even").imbalance_mean + 1e-9
    )
    assert even.imbalance_mean >= 1


def test_what_cannot_be_repaired_says_so():
    plan, profile = skewed_plan()
    with pytest.raises(InvalidInput, match="rank 8 does not exist"):
        repair(plan, [8])
    with pytest.raises(InvalidInput, match="at least 0"):
        repair(plan, [1], profile, max_moves=-1)
    with pytest.raises(InvalidInput, match="give a profile"):
        repair(plan, [1], max_moves=1)
    with pytest.raises(
        InfeasibleProblem, match=r"5 ranks that are left have 30 .*--slots-per-rank 7"
    ):
        repair(plan, [0, 1, 2])
    with pytest.raises(InfeasibleProblem, match="no rank is left"):
        repair(plan, range(8))
