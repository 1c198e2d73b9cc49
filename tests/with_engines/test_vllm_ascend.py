"""vLLM-Ascend's loader of expert maps and its tables, on our files."""

import ast
import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from with_engines.conftest import TOPOLOGY, counts, share_a_rank

from eplb.engines.convert import export_plan, import_plan
from eplb.engines.vllm_ascend import VLLM_ASCEND
from eplb.errors import InvalidInput
from eplb.model import model_preset
from eplb.plan_file import read_plan

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def loader(release, vllm):
    """Return the module that reads expert maps."""
    vllm.package("vllm.model_executor.layers")
    vllm.package("vllm.model_executor.layers.fused_moe")
    vllm.give("vllm.model_executor.layers.fused_moe.expert_map_manager", determine_expert_map=None)
    found = release("vllm_ascend")
    module = found.load("vllm_ascend.eplb.core.eplb_utils")
    module.release = found
    return module


@pytest.fixture
def init(loader, monkeypatch):
    """Return the tables of a rank for a layer, made on the CPU instead of an NPU."""
    monkeypatch.setattr(torch.Tensor, "npu", lambda tensor: tensor, raising=False)

    def tables(path, layer_id, rank):
        return loader.init_eplb_config(
            SimpleNamespace(expert_map_path=str(path), dynamic_eplb=False, num_redundant_experts=0),
            layer_id,
            SimpleNamespace(num_experts=256, ep_size=16, ep_rank=rank),
        )

    return tables


@pytest.fixture
def path(tmp_path):
    return tmp_path / "expert_map.json"


def test_the_loader_places_what_the_plan_says(plan, path, loader, init):
    export = export_plan(plan, "vllm-ascend", path)
    assert any("61 of multi-token prediction is left out" in r for r in export.remarks)
    for layer_id in (0, 31, 57):
        row = plan.placement.phys_to_log_LS[layer_id]
        placement, count = loader.expert_file_to_tensor(path, layer_id)
        assert count == 320
        assert np.array_equal(placement.numpy().reshape(-1), row)
        maps, own, slots, redundant = init(path, layer_id, 5)
        assert redundant == 64
        assert np.array_equal(maps[5].numpy(), own.numpy())
        # Where rank 5 sends tokens is a slot of the expert, number rank % replicas.
        assert np.array_equal(row[slots.numpy()], np.arange(256))
        for expert in range(256):
            replicas = np.flatnonzero(row == expert)
            assert int(slots[expert]) == replicas[5 % len(replicas)]
    # The draft layer gets slots, and no placement.
    assert loader.expert_file_to_tensor(path, 58) == (None, 320)


def test_two_replicas_on_a_rank_would_shift_all_others(plan, path, init):
    """Why they are refused."""
    rows_LS = plan.placement.phys_to_log_LS.copy()
    share_a_rank(rows_LS[0], 20)
    # Rank 0 gets them, whose number of experts counts the slots of all.
    order = np.arange(16)
    shared_rank = next(r for r in range(16) if len(set(rows_LS[0, r * 20 : r * 20 + 20])) < 20)
    order[[0, shared_rank]] = shared_rank, 0
    rows_LS = rows_LS.reshape(-1, 16, 20)[:, order].reshape(-1, 320)
    shared = replace(plan, placement=replace(plan.placement, phys_to_log_LS=rows_LS))
    with pytest.raises(InvalidInput, match="would be counted wrongly"):
        export_plan(shared, "vllm-ascend", path)
    path.write_bytes(VLLM_ASCEND.encode(shared.placement, plan.topology, ".json"))
    _, _, slots, _ = init(path, 0, 5)
    assert not np.array_equal(rows_LS[0][slots.numpy()], np.arange(256))


def test_what_the_engine_records_is_read(loader, plan, path):
    """The record of its adaptor, made by its own code from its own maps."""
    source = loader.release.text("eplb/adaptor/vllm_adaptor.py")
    tree = ast.parse(source)
    (method,) = (
        node for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "_export_tensor_to_file"
    )  # fmt: skip
    scope = {"json": json, "Any": Any}
    exec(compile(ast.Module([method], []), "adaptor", "exec"), scope)  # noqa: S102
    rows_LRK = plan.placement.phys_to_log_LS[:-1].reshape(58, 16, 20)
    maps = torch.full((58, 16, 256), -1)
    maps.scatter_(2, torch.tensor(rows_LRK), torch.arange(20).expand(58, 16, 20).contiguous())
    scope["_export_tensor_to_file"](SimpleNamespace(rank_id=0), maps, str(path))
    found = import_plan(
        path, "vllm-ascend", num_nodes=4, ranks_per_node=4, model=model_preset("deepseek-v3")
    )
    assert found.plan.placement.layer_ids == tuple(range(3, 61))
    assert np.array_equal(found.plan.placement.phys_to_log_LS, rows_LRK.reshape(58, -1))


def test_options_that_are_printed_exist(loader, plan):
    (line,) = VLLM_ASCEND.launch(plan, plan.placement, "file.json", "plan.yaml")
    keys = re.findall(r'"(\w+)": "file.json"', line)
    config = loader.release.text("ascend_config.py")
    config = config[config.index("class EplbConfig") :]
    assert keys == ["expert_map_path"]
    assert f'"{keys[0]}": None' in config
    assert '"eplb_config"' in loader.release.text("ascend_config.py")


def test_from_recording_to_a_loaded_plan(init, eplb_command):
    """The page on vLLM-Ascend, from start to end."""
    torch.save(torch.tensor(counts(1, 58)[0]), "workload.pt")
    eplb_command("profile convert workload.pt --model deepseek-v3 -o loads.npz")
    eplb_command(f"plan loads.npz {TOPOLOGY} -o plan.yaml")
    eplb_command("export plan.yaml --to vllm-ascend -o expert_map.json")
    rows_LS = read_plan("plan.yaml").placement.phys_to_log_LS
    for layer_id in (0, 57):
        maps, _, _, redundant = init("expert_map.json", layer_id, 0)
        assert redundant == 64
        for rank in range(16):
            experts = torch.argsort(maps[rank])[-20:]
            assert experts.tolist() == rows_LS[layer_id, rank * 20 : rank * 20 + 20].tolist()
