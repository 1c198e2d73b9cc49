"""Hot swaps under load on gloo: outputs, weights and tokens, and what every fault leaves behind."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from ep_ranks import spawn
from swap_ranks import FAULTS, faults, random_swaps

# Group, manager, number of swaps.
CASES = {
    "a layer at a time": ({}, {"spare_rows": 4}, 8),
    "all layers at once": ({}, {"spare_rows": 12}, 8),
    "throttled": ({}, {"spare_rows": 6, "bytes_per_s": 2e6}, 2),
    "nodes, virtual ranks": ({"num_ranks": 6, "ranks_per_node": 2}, {"spare_rows": 20}, 6),
}


def test_swaps_between_random_plans_change_no_output(tmp_path):
    spawn(random_swaps, 3, tmp_path, CASES)


@pytest.mark.parametrize("first", range(3))
def test_after_every_fault_the_old_placement_serves_on(first, tmp_path):
    spawn(faults, 3, tmp_path, list(FAULTS)[first::3])
