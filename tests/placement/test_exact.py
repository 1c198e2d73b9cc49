"""Exact solutions against brute force, each other, and the promises of the solver."""

import os

import numpy as np
import pytest
from agreement import disagreements, full_row
from exhaustive import RULES, best_score, score, tiny_layer

from eplb.errors import InfeasibleProblem, InvalidInput
from eplb.placement.bound import weighted_bounds
from eplb.placement.exact import solve_layer
from eplb.placement.exact_shares import place_by_shares
from eplb.placement.pairs import solve_pairs
from eplb.slots import initial_placement
from eplb.topology import Topology

# Tiny layers a rule. Thousands were tried: EPLB_TINY_CASES=2000 pytest tests/placement
CASES = int(os.environ.get("EPLB_TINY_CASES", "25"))
FLASHLB_EXAMPLE = np.array([[600.0, 560, 120, 120, 20, 10, 10, 10]])
ONE = np.ones(1)


@pytest.mark.parametrize("split", RULES)
def test_brute_force_agrees_and_no_bound_is_above_it(split):
    for seed in range(CASES):
        load_WE, weight_W, topology = tiny_layer(np.random.default_rng(seed), split)
        best = best_score(load_WE, weight_W, topology, split)
        quick = weighted_bounds(
            load_WE[:, np.newaxis], weight_W, num_ranks=topology.num_ranks,
            slots_per_rank=topology.slots_per_rank, split=split,
        )[0]  # fmt: skip
        assert quick <= best * (1 + 1e-9), seed
        layer = solve_layer(load_WE, weight_W, topology=topology, split=split)
        assert layer.proven, seed
        assert layer.stop_reason == "finished"
        assert layer.objective == pytest.approx(best, rel=2e-6), seed
        assert layer.bound <= best * (1 + 1e-7), seed
        reached = score(load_WE, weight_W, layer.phys_to_log_S, topology, split)
        assert layer.objective == pytest.approx(reached, rel=1e-6), seed
        held = layer.phys_to_log_S.reshape(topology.num_ranks, -1).tolist()
        for rank in held:
            filled = [expert for expert in rank if expert >= 0]
            assert len(filled) == len(set(filled)), seed


@pytest.mark.parametrize("split", RULES)
def test_all_methods_and_bounds_agree(split):
    # Thousands were tried: python tests/agreement.py --cases 2000
    for seed in range(max(3, CASES // 8)):
        assert not disagreements(split, 1000 + seed)


def test_pairs_and_share_programme_agree():
    random = np.random.default_rng(2)
    for _ in range(max(6, CASES // 4)):
        num_ranks = int(random.integers(2, 6))
        num_experts = int(random.integers(2, 2 * num_ranks + 1))
        load_E = random.pareto(1.0, num_experts) + 0.01
        load_E *= num_ranks / load_E.sum()
        topology = Topology(num_nodes=1, ranks_per_node=num_ranks, slots_per_rank=2)
        row = full_row(num_experts, topology)
        start = score(load_E[np.newaxis], ONE, row, topology, "even")
        pairs = solve_pairs(load_E, num_ranks)
        rows, bound = place_by_shares(
            load_E[np.newaxis], ONE, topology, row, start, 0.0, None, seed=0, workers=1
        )
        best = min(score(load_E[np.newaxis], ONE, r, topology, "even") for r in (row, *rows))
        assert bound == pytest.approx(best, rel=2e-6)
        assert pairs.objective >= best * (1 - 2e-6)
        assert pairs.bound <= best * (1 + 1e-9)


@pytest.mark.parametrize(
    ("split", "optimum"), [("even", 590 / 3), ("weighted", 181.25), ("batch", 181.25)]
)
def test_flashlb_example_is_proven(split, optimum):
    # FlashLB claims 205 for it; 196.67 is the fewest under even split, 181.25 is the mean.
    topology = Topology(num_nodes=1, ranks_per_node=8, slots_per_rank=2)
    layer = solve_layer(FLASHLB_EXAMPLE, ONE, topology=topology, split=split)
    assert layer.proven
    assert layer.objective == pytest.approx(optimum, rel=1e-9)
    assert layer.bound <= layer.objective <= layer.bound * (1 + 1.1e-6)


@pytest.mark.parametrize("split", RULES)
def test_out_of_time_the_start_is_returned_with_a_bound(split):
    random = np.random.default_rng(3)
    load_WE = random.lognormal(0, 0.7, (3, 48))
    load_WE *= 16 / load_WE.sum(axis=1, keepdims=True)
    topology = Topology(num_nodes=2, ranks_per_node=8, slots_per_rank=4)
    start_S = initial_placement([0], 48, 64).phys_to_log_LS[0]
    weight_W = np.full(3, 1 / 3)
    layer = solve_layer(
        load_WE, weight_W, topology=topology, split=split, start_S=start_S, time_limit_s=0.5
    )
    assert layer.stop_reason == "time_limit"
    assert not layer.proven
    start = score(load_WE, weight_W, start_S, topology, split)
    assert 1 <= layer.bound <= layer.objective <= start * (1 + 1e-9)
    assert (layer.fraction_S is not None) == (split == "weighted")
    assert np.bincount(layer.phys_to_log_S[layer.phys_to_log_S >= 0], minlength=48).min() >= 1


@pytest.mark.parametrize("split", ["weighted", "batch"])
@pytest.mark.parametrize(("slots_per_rank", "experts"), [(2, 12), (2, 16), (3, 16), (4, 16)])
def test_one_load_of_sixteen_experts_is_proven_under_free_splits(split, slots_per_rank, experts):
    load_WE = np.random.default_rng(experts).lognormal(0, 0.9, (1, experts))
    load_WE *= 8 / load_WE.sum()
    topology = Topology(num_nodes=2, ranks_per_node=4, slots_per_rank=slots_per_rank)
    layer = solve_layer(load_WE, ONE, topology=topology, split=split)
    assert layer.proven
    reached = score(load_WE, ONE, layer.phys_to_log_S, topology, split)
    assert layer.objective == pytest.approx(reached, rel=1e-9)


def test_without_replicas_all_rules_are_one():
    load_WE = np.random.default_rng(6).lognormal(0, 0.9, (3, 12))
    load_WE *= 6 / load_WE.sum(axis=1, keepdims=True)
    topology = Topology(num_nodes=2, ranks_per_node=3, slots_per_rank=2)
    weight_W = np.full(3, 1 / 3)
    layers = [solve_layer(load_WE, weight_W, topology=topology, split=split) for split in RULES]
    assert all(layer.proven for layer in layers)
    for layer in layers:
        assert layer.objective == pytest.approx(layers[0].objective, rel=2e-6)
    np.testing.assert_array_equal(layers[RULES.index("weighted")].fraction_S, np.ones(12))


def test_a_freer_split_is_never_worse():
    random = np.random.default_rng(4)
    topology = Topology(num_nodes=1, ranks_per_node=3, slots_per_rank=2)
    weight_W = np.array([0.5, 0.3, 0.2])
    for _ in range(5):
        load_WE = random.lognormal(0, 1, (3, 4))
        even, weighted, batch = (
            solve_layer(load_WE, weight_W, topology=topology, split=split).objective
            for split in ("even", "weighted", "batch")
        )
        assert batch <= weighted * (1 + 2e-6)
        assert weighted <= even * (1 + 2e-6)


def test_one_worker_and_one_seed_give_one_answer():
    load_WE, weight_W, topology = tiny_layer(np.random.default_rng(5), "even")
    first, second = (
        solve_layer(load_WE, weight_W, topology=topology, split="even", seed=7) for _ in range(2)
    )
    np.testing.assert_array_equal(first.phys_to_log_S, second.phys_to_log_S)


def test_bad_requests_are_errors():
    topology = Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=1)
    with pytest.raises(InvalidInput, match="did you mean 'even'"):
        solve_layer(np.ones((1, 2)), ONE, topology=topology, split="evn")
    with pytest.raises(InfeasibleProblem, match="use more slots a rank"):
        solve_layer(np.ones((1, 3)), ONE, topology=topology, split="even")
