"""The layer beside an unsharded reference, on gloo: every rule, payload, and way across."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from ep_ranks import random_plans, spawn  # noqa: E402

EXACT = {"payload": "fp32"}
BY_NODE = {"ranks_per_node": 2, "nodes": True, "by_node": True}
BF16 = {"hidden": 96, "inner": 64, "dtype": torch.bfloat16}
FP8 = BF16 | {"payload": "fp8"}
# Options, number of plans, largest error. At so few values a token BF16 can be more off than 1e-2.
CASES = {
    "ranks": (EXACT, 24, 1e-5),
    "virtual ranks": (EXACT | {"num_ranks": 12, "ranks_per_node": 2}, 8, 1e-5),
    "by node": (EXACT | BY_NODE, 8, 1e-5),
    "by node, virtual ranks": (
        EXACT | BY_NODE | {"num_ranks": 8, "ranks_per_node": 4}, 9, 1e-5
    ),
    "micro-batches": (EXACT | {"micro_batches": 2}, 8, 1e-5),
    "micro-batches by node": (EXACT | BY_NODE | {"micro_batches": 2}, 6, 1e-5),
    "alone": (EXACT, 6, 1e-5),
    "biases": (EXACT | {"biases": True}, 6, 1e-5),
    "bf16": (BF16, 8, 1.5e-2),
    "fp8": (FP8, 8, 1.5e-2),
    "fp8 weights": (BF16 | {"dtype": torch.float8_e4m3fn}, 6, 1.5e-2),
    "fp8 by node": (FP8 | BY_NODE | {"micro_batches": 2}, 6, 1.5e-2),
}  # fmt: skip


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    cases = {name: (options, range(number)) for name, (options, number, _) in CASES.items()}
    spawn(random_plans, 4, folder, cases)
    return torch.load(folder / "worst")


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_unsharded_layer(case, errors):
    assert errors[case] <= CASES[case][2]
