"""Files as the engines document them, to the last byte or number: what a change must not change.

A model of 4 decoder layers, the first dense, 3 experts, one layer of multi-token prediction (4); 2
ranks of 2 slots.
"""

import json

import numpy as np
import pytest

from eplb.engines.convert import export_plan
from eplb.model import MoEModel
from eplb.plan import Plan
from eplb.slots import Placement
from eplb.topology import Topology

ROWS = {1: [0, 1, 2, 0], 2: [2, 1, 0, 1], 3: [1, 2, 0, 2], 4: [0, 2, 1, 2]}
MAIN = [1, 2, 3]
# What engines start with, for the dense layer.
DENSE = [0, 1, 2, 0]


@pytest.fixture
def plan():
    return Plan(
        model=MoEModel(
            name="toy", num_experts=3, layer_ids=tuple(ROWS), num_layers=4, expert_bytes=10
        ),
        topology=Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=2),
        placement=Placement(
            phys_to_log_LS=np.array(list(ROWS.values())), layer_ids=tuple(ROWS), num_experts=3
        ),
    )


def test_sglang(plan, tmp_path):
    torch = pytest.importorskip("torch")
    expected = [DENSE, *(ROWS[i] for i in MAIN)]
    export_plan(plan, "sglang", tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"physical_to_logical_map": expected}
    export_plan(plan, "sglang", tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(loaded) == ["physical_to_logical_map"]
    assert torch.equal(loaded["physical_to_logical_map"], torch.tensor(expected))


def test_vllm(plan, tmp_path):
    export_plan(plan, "vllm", tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": 1,
        "num_slots": 4,
        "initial_global_assignments": {"0": ROWS[1], "1": ROWS[2], "2": ROWS[3]},
    }


def test_tensorrt_llm(plan, tmp_path):
    export_plan(plan, "tensorrt-llm", tmp_path / "x.yaml")
    assert (tmp_path / "x.yaml").read_text() == (
        "initial_global_assignments:\n"
        "  1: [0, 1, 2, 0]\n"
        "  2: [2, 1, 0, 1]\n"
        "  3: [1, 2, 0, 2]\n"
        "  4: [0, 2, 1, 2]\n"
        "num_slots: 4\n"
        "layer_updates_per_iter: 0\n"
    )


def test_vllm_ascend(plan, tmp_path):
    export_plan(plan, "vllm-ascend", tmp_path / "x.json")
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["moe_layer_count"] == 3
    assert document["layer_list"][1] == {
        "layer_id": 1,
        "device_count": 2,
        "device_list": [
            {"device_id": 0, "device_expert": [2, 1]},
            {"device_id": 1, "device_expert": [0, 1]},
        ],
    }


def test_omni(plan, tmp_path):
    export_plan(plan, "omni", tmp_path / "x.npy")
    pattern = np.load(tmp_path / "x.npy")
    assert pattern.dtype == np.int32
    assert pattern.tolist() == [
        [[1, 1, 0], [0, 1, 1], [0, 1, 1]],
        [[1, 0, 1], [1, 1, 0], [1, 0, 1]],
    ]
