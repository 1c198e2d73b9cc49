"""Hot swaps under load on gloo: outputs, weights and tokens, and what every fault leaves behind."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from swap_ranks import (
    FAULTS,
    FAULTS_OF_PARTS,
    faults,
    faults_of_one,
    random_swaps,
    run_apart,
)

# Group, manager, number of swaps.
CASES = {
    "a layer at a time": ({}, {"spare_rows": 4}, 5),
    "all layers at once": ({}, {"spare_rows": 12}, 5),
    "a layer a step": ({}, {"spare_rows": 12, "switch_bytes": 1}, 3),
    "throttled": ({}, {"spare_rows": 6, "bytes_per_s": 2e6}, 1),
    "nodes, virtual ranks": ({"num_ranks": 6, "ranks_per_node": 2}, {"spare_rows": 20}, 4),
}


def test_swaps_between_random_plans_change_no_output(tmp_path):
    assert run_apart(random_swaps, 3, tmp_path, CASES) == [0, 0, 0]


def test_after_every_fault_the_old_placement_serves_on(tmp_path):
    assert run_apart(faults, 3, tmp_path, list(FAULTS), {"spare_rows": 5}) == [0, 0, 0]


def test_between_the_parts_of_a_switch_all_goes_back(tmp_path):
    options = {"spare_rows": 15, "switch_bytes": 1}
    assert run_apart(faults, 3, tmp_path, list(FAULTS_OF_PARTS), options) == [0, 0, 0]


def test_what_fails_on_one_process_keeps_none_of_the_others_waiting(tmp_path):
    assert run_apart(faults_of_one, 2, tmp_path) == [0, 0]
