from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import strategies as own
from hypothesis import given

from eplb.errors import PlacementInvalid
from eplb.slots import Placement, initial_placement, log_to_phys, replica_count


def placement(rows: Any, layer_ids: tuple[int, ...] = (3,), num_experts: int = 3) -> Placement:
    return Placement(phys_to_log_LS=np.array(rows), layer_ids=layer_ids, num_experts=num_experts)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1, 2, 3]], "layer 3, slot 3: unknown expert 3; experts are 0 to 2, or -1"),
        ([[0, 1, -2, 2]], "layer 3, slot 2: unknown expert -2"),
        ([[0, 2, 2, -1]], "layer 3: expert 1 is missing"),
        ([[0, 1]], "layer 3: expert 2 is missing"),
        ([0, 1, 2], r"whole numbers of the shape \[layers, slots\], got int64 of \[3\]"),
        ([[0.0, 1.0, 2.0]], "whole numbers.*got float64"),
        (np.empty((1, 0), dtype=int), "whole numbers"),
        ([[0, 1, 2], [0, 1, 2]], "1 layer ids for 2 layers"),
    ],
)
def test_what_is_no_placement_is_named(rows: Any, message: str) -> None:
    with pytest.raises(PlacementInvalid, match=message):
        placement(rows)


def test_the_layer_at_fault_is_named_by_its_id() -> None:
    with pytest.raises(PlacementInvalid, match="layer 60: expert 0 is missing"):
        placement([[0, 1, 2], [1, 1, 2]], layer_ids=(3, 60))


@given(own.plans())
def test_log_to_phys_is_the_inverse(plan: Any) -> None:
    rows, num_experts = plan.placement.phys_to_log_LS, plan.placement.num_experts
    inverse = log_to_phys(rows, num_experts)
    count_LE = replica_count(rows, num_experts)
    assert inverse.shape == (*count_LE.shape, count_LE.max())
    for layer, row in enumerate(rows.tolist()):
        for expert in range(num_experts):
            slots = [slot for slot, held in enumerate(row) if held == expert]
            assert count_LE[layer, expert] == len(slots)
            padding = [-1] * (inverse.shape[2] - len(slots))
            assert inverse[layer, expert].tolist() == slots + padding


def test_of_layers_picks_rows_by_id_in_the_order_asked() -> None:
    found = placement([[0, 1, 2], [2, 1, 0]], layer_ids=(3, 60))
    assert found.of_layers([60, 3]).tolist() == [[2, 1, 0], [0, 1, 2]]
    with pytest.raises(PlacementInvalid, match="layer 4 has load and is not in the plan"):
        found.of_layers([3, 4])


def test_placements_are_equal_by_value_and_not_hashable() -> None:
    assert placement([[0, 1, 2]]) == placement(np.array([[0, 1, 2]], dtype=np.uint8))
    assert placement([[0, 1, 2]]) != placement([[0, 2, 1]])
    assert placement([[0, 1, 2]]) != placement([[0, 1, 2]], layer_ids=(4,))
    with pytest.raises(TypeError, match="unhashable"):
        hash(placement([[0, 1, 2]]))


def test_the_array_is_a_read_only_copy() -> None:
    rows = np.array([[0, 1, 2]])
    found = placement(rows)
    rows[:] = 0
    assert found.phys_to_log_LS.tolist() == [[0, 1, 2]]
    with pytest.raises(ValueError, match="read-only"):
        found.phys_to_log_LS[0, 0] = 1


def test_engines_start_with_experts_in_order_and_again_from_zero() -> None:
    found = initial_placement((3, 7), num_experts=3, num_slots=5)
    assert found.phys_to_log_LS.tolist() == [[0, 1, 2, 0, 1]] * 2
    with pytest.raises(PlacementInvalid, match="expert 2 is missing"):
        initial_placement((3,), num_experts=3, num_slots=2)
