"""Without GPUs, in Triton's interpreter: what the exchange over peer memory gives."""

from __future__ import annotations

import torch
from ep_ranks import spawn
from interpreted_ranks import random_plans

NARROW = {"payload": "fp32"}
WIDE = {"payload": "bf16", "dtype": torch.bfloat16, "hidden": 32}
BLOCKS = {"payload": "fp8", "dtype": torch.bfloat16, "hidden": 160}
NODES = {"num_ranks": 4, "ranks_per_node": 2, "nodes": True, "by_node": True}
# Options of group and layer, the largest error, and how many plans.
CASES = {
    "a rank a process": (NARROW, 1e-5, 4),
    "virtual ranks": (NARROW | {"num_ranks": 6}, 1e-5, 4),
    "padded": (NARROW | {"num_ranks": 4, "padded": True}, 1e-5, 4),
    "micro-batches": (NARROW | {"micro_batches": 2}, 1e-5, 4),
    "padded micro-batches": (NARROW | {"micro_batches": 2, "padded": True}, 1e-5, 4),
    "bf16": (WIDE, 1.5e-2, 4),
    # The interpreter rounds some FP8 numbers down to half (see test_kernels.py).
    "fp8": (BLOCKS | {"num_ranks": 4}, 2.5e-2, 4),
}
CASES_BY_NODE = {
    "by node": (NARROW | NODES, 1e-5, 4),
    "by node, micro-batches": (NARROW | NODES | {"micro_batches": 2}, 1e-5, 4),
}


def test_random_plans(tmp_path):
    spawn(random_plans, 2, tmp_path, CASES)


def test_random_plans_by_node(tmp_path):
    spawn(random_plans, 4, tmp_path, CASES_BY_NODE)
