"""What goes wrong: each is one error with its cause, on every process, and never a hang."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ep_ranks import faults, spawn  # noqa: E402

from eplb.errors import InvalidInput, PlacementInvalid  # noqa: E402
from eplb.model import MoEModel  # noqa: E402
from eplb.plan import Plan  # noqa: E402
from eplb.runtime.ep.agreement import (  # noqa: E402
    check_plan_of_group,
    check_plan_of_model,
)
from eplb.runtime.ep.group import EPGroup  # noqa: E402
from eplb.slots import Placement, initial_placement  # noqa: E402
from eplb.topology import Topology  # noqa: E402

MODEL = MoEModel(
    name="toy", num_experts=4, layer_ids=(1, 2), top_k=2, hidden_size=16, revision="r1"
)
PLAN = Plan(
    model=MODEL,
    topology=Topology(num_nodes=2, ranks_per_node=2, slots_per_rank=2),
    placement=initial_placement((1, 2), 4, 8),
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "other"}, "name is toy, and other is served"),
        ({"revision": "r2"}, "revision is r1, and r2 is served"),
        ({"num_experts": 8}, "num_experts is 4, and 8 is served"),
        ({"top_k": 1}, "top_k is 2, and 1 is served"),
        ({"hidden_size": 32}, "hidden_size is 16, and 32 is served"),
        ({"layer_ids": (1, 2, 3)}, "layer 3 of the model toy is not in the plan"),
    ],
)
def test_a_plan_of_another_model_is_refused(change, message):
    with pytest.raises(InvalidInput, match=message):
        check_plan_of_model(PLAN, replace(MODEL, **change))


def test_what_is_not_known_of_a_model_is_not_compared():
    check_plan_of_model(PLAN, MODEL)
    check_plan_of_model(PLAN, MoEModel(name="unknown", num_experts=4, layer_ids=(2,)))


@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(8, 2), (4, 4), (2, 2)])
def test_a_plan_of_another_topology_is_refused(num_ranks, ranks_per_node):
    group = object.__new__(EPGroup)
    group.num_ranks, group.ranks_per_node = num_ranks, ranks_per_node
    message = f"4 ranks, 2 a node, and this group has {num_ranks}, {ranks_per_node} a node"
    with pytest.raises(InvalidInput, match=message):
        check_plan_of_group(PLAN, group)


def test_a_plan_without_an_expert_cannot_be_made():
    with pytest.raises(PlacementInvalid, match="expert 3 is missing"):
        Placement(phys_to_log_LS=np.array([[0, 1, 2, 0]]), layer_ids=(1,), num_experts=4)


def test_faults_while_serving(tmp_path):
    spawn(faults, 3, tmp_path)
    for process in range(2):
        assert float((tmp_path / f"waited{process}").read_text()) < 9
