"""The layer beside an unsharded reference, on gloo: every rule, payload, and way across."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from ep_ranks import random_plans, spawn  # noqa: E402

CASES = {
    "one process": (1, {"bound": 1e-5}),
    "ranks": (4, {"bound": 1e-5}),
    "virtual ranks": (2, {"bound": 1e-5, "num_ranks": 6, "ranks_per_node": 2}),
    "by node": (4, {"bound": 1e-5, "ranks_per_node": 2, "nodes": True, "by_node": True}),
    "by node, virtual ranks": (
        4,
        {"bound": 1e-5, "num_ranks": 8, "ranks_per_node": 4, "nodes": True, "by_node": True},
    ),
    "two micro-batches": (3, {"bound": 1e-5, "micro_batches": 2}),
    "two micro-batches by node": (
        4,
        {"bound": 1e-5, "ranks_per_node": 2, "nodes": True, "by_node": True, "micro_batches": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_unsharded_layer(case, tmp_path):
    num_processes, options = CASES[case]
    payload = {"payload": "fp32"}
    spawn(random_plans, num_processes, tmp_path, options | payload, range(30))
