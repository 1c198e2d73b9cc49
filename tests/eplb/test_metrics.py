from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import strategies as own
from hypothesis import given
from hypothesis import strategies as st
from oracles import best_split_max_load, rank_loads

from eplb.check import rescore
from eplb.errors import InvalidInput, PlacementInvalid
from eplb.load_profile import LoadProfile
from eplb.metrics import evaluate, imbalance, rank_load, tail_mean
from eplb.slots import Placement, initial_placement
from eplb.topology import Topology


def naive_loads(case: Any) -> dict[tuple[int, int], list[float]]:
    """Rank loads by (window, layer), where there are any."""
    profile, placement, topology, split = case
    rows = placement.of_layers(profile.layer_ids).tolist()
    weights_LS = placement.split_weights_LS
    weights = [None] * len(rows) if weights_LS is None else weights_LS.tolist()
    return {
        (w, layer): [
            float(x)
            for x in rank_loads(load_E.tolist(), rows[layer], topology, split, weights[layer])
        ]
        for w, load_LE in enumerate(profile.counts_WLE)
        for layer, load_E in enumerate(load_LE)
        if load_E.any()
    }


def of_window(values: dict[tuple[int, int], float]) -> list[list[float]]:
    """Values of each window with load."""
    windows = sorted({w for w, _ in values})
    return [[x for (w, _), x in values.items() if w == window] for window in windows]


FIXED = (*own.SPLITS, "weighted")


@given(own.cases(splits=FIXED))
def test_rank_loads_are_those_of_the_enumeration(case: Any) -> None:
    load_WLR = rank_load(*case)
    for cell, loads in naive_loads(case).items():
        assert load_WLR[cell] == pytest.approx(loads, rel=1e-12, abs=1e-12 * max(loads))
    assert load_WLR.sum(axis=2) == pytest.approx(case[0].counts_WLE.sum(axis=2), rel=1e-12)


@given(own.cases(splits=("batch",)))
def test_the_best_split_of_a_window_is_that_of_the_enumeration(case: Any) -> None:
    profile, placement, topology, _ = case
    load_WLR = rank_load(*case)
    assert load_WLR.min() >= 0
    assert load_WLR.sum(axis=2) == pytest.approx(profile.counts_WLE.sum(axis=2), rel=1e-9)
    for layer, row in enumerate(placement.of_layers(profile.layer_ids).tolist()):
        for window, load_E in enumerate(profile.counts_WLE[:, layer].tolist()):
            best = float(best_split_max_load(load_E, row, topology))
            assert load_WLR[window, layer].max() == pytest.approx(best, rel=1e-9)


@given(own.cases(splits=FIXED))
def test_figures_are_those_of_their_definitions(case: Any) -> None:
    loads = naive_loads(case)
    ratio = {cell: max(x) / fmean(x) for cell, x in loads.items()}
    steps = sorted(fmean(x) for x in of_window(ratio))
    found = evaluate(*case)
    assert found.imbalance_mean == pytest.approx(fmean(ratio.values()), rel=1e-9)
    assert found.imbalance_worst == pytest.approx(steps[-1], rel=1e-9)
    assert found.imbalance_worst_layer == pytest.approx(max(ratio.values()), rel=1e-9)
    below = sum(fmean(x) for x in loads.values()) / sum(max(x) for x in loads.values())
    assert found.balancedness == pytest.approx(below, rel=1e-9)
    # Percentiles interpolate between the two steps they fall between.
    at = 0.95 * (len(steps) - 1)
    low, high = steps[int(at)], steps[min(int(at) + 1, len(steps) - 1)]
    assert found.imbalance_p95 == pytest.approx(low + (high - low) * (at % 1), rel=1e-9)
    assert found.max_receive_rows_worst == pytest.approx(max(map(max, loads.values())), rel=1e-9)


@given(own.cases())
def test_largest_receive_is_a_mean_over_what_is_scored(case: Any) -> None:
    largest = [max(loads) for loads in naive_loads(case).values()]
    assert evaluate(*case).max_receive_rows_mean == pytest.approx(fmean(largest), rel=1e-9)


@given(own.cases(splits=FIXED))
def test_the_tail_is_the_mean_of_its_steps(case: Any) -> None:
    loads = naive_loads(case)
    ratio = {cell: max(x) / fmean(x) for cell, x in loads.items()}
    steps = [fmean(x) for x in of_window(ratio)]
    assert evaluate(*case).imbalance_cvar == pytest.approx(mean_of_worst(steps, 0.1), rel=1e-9)


def mean_of_worst(values: list[float], tail: float) -> float:
    """Spend a budget of windows on the worst ones first, the last of them in part."""
    left = budget = max(Fraction(tail) * len(values), Fraction(1))
    total = Fraction(0)
    for value in sorted(values, reverse=True):
        part = min(left, Fraction(1))
        total += part * Fraction(value)
        left -= part
    return float(total / budget)


@given(
    st.lists(st.floats(1, 100), min_size=1, max_size=45),
    st.sampled_from([0.01, 0.1, 0.25, 0.5, 1.0]),
)
def test_tail_mean_is_its_definition(costs: list[float], tail: float) -> None:
    found = tail_mean(np.array(costs), tail)
    assert found == pytest.approx(mean_of_worst(costs, tail), rel=1e-12)
    # The definition by Rockafellar and Uryasev: the least over thresholds, which a cost attains.
    size = max(tail * len(costs), 1.0)
    least = min(t + sum(max(c - t, 0.0) for c in costs) / size for t in costs)
    assert found == pytest.approx(least, rel=1e-12)
    assert fmean(costs) * (1 - 1e-12) <= found <= max(costs) * (1 + 1e-12)


@given(own.cases(splits=FIXED))
def test_the_checker_scores_alike(case: Any) -> None:
    profile, placement, topology, split = case
    found = evaluate(*case)
    derived = rescore(own.plan_of(placement, topology, split), profile)
    assert derived == pytest.approx((found.imbalance_mean, found.imbalance_worst), rel=1e-11)


def full(profile: LoadProfile) -> bool:
    """Whether all layers have load in all windows, so that the mean is the mean of the steps."""
    return bool(profile.counts_WLE.any(axis=2).all())


@given(own.cases(splits=own.ALL_SPLITS))
def test_figures_lie_where_they_can(case: Any) -> None:
    found = evaluate(*case)
    one = 1 - 1e-12
    num_ranks = case[2].num_ranks
    assert one <= found.imbalance_mean <= found.imbalance_worst / one
    assert found.imbalance_p95 <= found.imbalance_worst / one
    if full(case[0]):
        assert found.imbalance_mean * one <= found.imbalance_cvar / one
    assert found.imbalance_cvar <= found.imbalance_worst / one
    assert found.imbalance_worst <= found.imbalance_worst_layer / one
    assert found.imbalance_worst_layer <= num_ranks / one
    assert 1 / num_ranks * one <= found.balancedness <= 1 / one
    assert found.max_receive_rows_mean <= found.max_receive_rows_worst / one


@given(own.cases(), st.sampled_from([2.0**-60, 0.5, 3.0, 1e6]))
def test_ratios_do_not_depend_on_the_unit_of_loads(case: Any, factor: float) -> None:
    profile = replace(case[0], counts_WLE=case[0].counts_WLE * factor)
    before, after = evaluate(*case), evaluate(profile, *case[1:])
    for name in ("imbalance_mean", "imbalance_p95", "imbalance_worst", "balancedness"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-9)
    rows = before.max_receive_rows_worst * factor
    assert after.max_receive_rows_worst == pytest.approx(rows, rel=1e-9)


@given(own.cases())
def test_figures_by_scenario_are_those_of_the_scenario_alone(case: Any) -> None:
    profile, *rest = case
    with_load = {
        name
        for name, load_LE in zip(profile.scenario_W, profile.counts_WLE, strict=True)
        if load_LE.any()
    }
    found = evaluate(*case).by_scenario
    for name in with_load:
        alone = evaluate(profile.of_scenario(name), *rest)
        assert found[name].imbalance_mean == pytest.approx(alone.imbalance_mean, rel=1e-12)
        assert found[name].imbalance_worst == pytest.approx(alone.imbalance_worst, rel=1e-12)
        assert not found[name].by_layer


@given(own.cases())
def test_figures_by_layer_are_those_of_the_layer_alone(case: Any) -> None:
    profile, placement, topology, split = case
    found = evaluate(*case)
    assert tuple(found.by_layer) == profile.layer_ids
    for layer, layer_id in enumerate(profile.layer_ids):
        alone = LoadProfile.from_counts(
            profile.counts_WLE[:, [layer]], layer_ids=[layer_id], scenario=profile.scenario_W
        )
        expected = evaluate(alone, placement, topology, split)
        for name in ("imbalance_mean", "imbalance_worst", "balancedness", "max_receive_rows_mean"):
            assert getattr(found.by_layer[layer_id], name) == pytest.approx(
                getattr(expected, name), rel=1e-12
            )
    worst = max(figures.imbalance_worst_layer for figures in found.by_layer.values())
    assert found.imbalance_worst_layer == pytest.approx(worst, rel=1e-12)


@given(own.cases(idle=False))
def test_the_mean_is_the_mean_of_layers_where_all_are_scored(case: Any) -> None:
    found = evaluate(*case)
    layers = [figures.imbalance_mean for figures in found.by_layer.values()]
    assert found.imbalance_mean == pytest.approx(fmean(layers), rel=1e-12)


@given(own.cases())
def test_windows_without_load_score_nothing(case: Any) -> None:
    profile, *rest = case
    idle = np.zeros_like(profile.counts_WLE[:1])
    longer = replace(
        profile,
        counts_WLE=np.concatenate([profile.counts_WLE, idle]),
        scenario_W=(*profile.scenario_W, profile.scenario_W[0]),
        phase_W=(*profile.phase_W, "mixed"),
        tokens_W=None,
        time_s_W=None,
    )
    before, after = (
        replace(b, by_layer={}, by_scenario={}) for b in (evaluate(*case), evaluate(longer, *rest))
    )
    assert after.to_dict() == pytest.approx(before.to_dict(), rel=1e-12)


def test_a_scenario_without_load_is_scored_or_left_out_and_no_warning_is_given() -> None:
    profile = LoadProfile(
        counts_WLE=np.array([[[1.0, 1.0]], [[0.0, 0.0]]]),
        layer_ids=(0,),
        scenario_W=("busy", "idle"),
        phase_W=("mixed", "mixed"),
    )
    topology = Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=1)
    found = evaluate(profile, initial_placement((0,), 2, 2), topology, "even")
    assert found.imbalance_mean == 1
    assert found.by_scenario["busy"].imbalance_mean == 1


def test_figures_by_hand() -> None:
    """Ranks receive 3 and 1 in the first window, 2 and 2 in the second."""
    profile = LoadProfile.from_counts([[[3, 1]], [[2, 2]]], layer_ids=[5], scenario=["a", "b"])
    topology = Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=1)
    found = evaluate(profile, initial_placement((5,), 2, 2), topology, "even").to_dict()
    figures = {
        "imbalance_mean": 1.25,
        "imbalance_p95": 1 + 0.5 * 0.95,
        "imbalance_worst": 1.5,
        "imbalance_cvar": 1.5,
        "imbalance_worst_layer": 1.5,
        "balancedness": 4 / 5,
        "max_receive_rows_mean": 2.5,
        "max_receive_rows_worst": 3.0,
    }
    by_layer, by_scenario = found.pop("by_layer"), found.pop("by_scenario")
    assert found == figures
    assert by_layer == {"5": figures}
    assert {name: x["imbalance_mean"] for name, x in by_scenario.items()} == {"a": 1.5, "b": 1}


def test_no_load_has_no_imbalance() -> None:
    ratio = imbalance(
        np.array([[0.0, 0.0], [1.0, 3.0]]),
        Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=1),
    )
    assert np.isnan(ratio[0])
    assert ratio[1] == 1.5


@pytest.mark.parametrize(
    ("placement", "error", "message"),
    [
        (initial_placement((0,), 2, 3), InvalidInput, "3 slots a layer and the topology 2"),
        (initial_placement((0,), 1, 2), InvalidInput, "2 experts and the plan 1"),
        (initial_placement((9,), 2, 2), PlacementInvalid, "layer 0 has load and is not in"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    placement: Placement, error: type[Exception], message: str
) -> None:
    topology = Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=1)
    with pytest.raises(error, match=message):
        evaluate(LoadProfile.from_counts([[1, 2]]), placement, topology, "even")


def test_recorded_loads_are_scored_alike_by_metrics_and_checker(shared_data: Path) -> None:
    with np.load(shared_data / "deepseek_v3_sglang" / "logical_count.npz") as arrays:
        counts = arrays[min(arrays.files)]
    profile = LoadProfile.from_counts(counts)
    assert profile.layer_ids == tuple(range(3, 61))
    topology = Topology(num_nodes=4, ranks_per_node=8, slots_per_rank=9)
    placement = initial_placement(profile.layer_ids, 256, topology.num_slots)
    for split in own.SPLITS:
        found = evaluate(profile, placement, topology, split)
        derived = rescore(own.plan_of(placement, topology, split), profile)
        assert derived == pytest.approx((found.imbalance_mean, found.imbalance_worst), rel=1e-12)
