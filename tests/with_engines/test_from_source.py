"""TensorRT-LLM and Omni-placement have no wheels on the package index: their sources, checked out.

``TENSORRT_LLM_SOURCE`` and ``OMNI_INFER_SOURCE`` name the checkouts; without them these tests skip.
"""

import ast
import os
import sys
import typing
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from with_engines.conftest import TOPOLOGY, counts

from eplb.engines.convert import export_plan
from eplb.plan_file import read_plan

torch = pytest.importorskip("torch")


def checkout(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"needs a checkout of the engine, named by {variable}")
    return Path(folder)


@pytest.fixture
def config_class():
    """Return the pydantic model that TensorRT-LLM validates the file with."""
    pydantic = pytest.importorskip("pydantic")
    source = checkout("TENSORRT_LLM_SOURCE") / "tensorrt_llm/llmapi/llm_args.py"
    module = ast.parse(source.read_text())
    classes = [
        node for node in module.body
        if isinstance(node, ast.ClassDef) and node.name == "MoeLoadBalancerConfig"
    ]  # fmt: skip
    scope = {
        **vars(typing), "Field": pydantic.Field, "PrivateAttr": pydantic.PrivateAttr,
        # llmapi/utils.py: extra keys are forbidden.
        "StrictBaseModel": type("StrictBaseModel", (pydantic.BaseModel,), {
            "model_config": pydantic.ConfigDict(extra="forbid"), "__module__": __name__,
        }),
    }  # fmt: skip
    exec(compile(ast.Module(classes, []), str(source), "exec"), scope)  # noqa: S102
    return scope["MoeLoadBalancerConfig"]


def test_tensorrt_llm_validates_the_file(config_class, plan, tmp_path):
    path = tmp_path / "balancer.yaml"
    export_plan(plan, "tensorrt-llm", path)
    config = config_class(**yaml.safe_load(path.read_text()))
    config.setup(ep_rank=5, ep_size=16)
    assert (config.num_local_slots, config.slot_start, config.slot_end) == (20, 100, 120)
    assert config.layer_updates_per_iter == 0
    for layer_id, row in zip(
        plan.placement.layer_ids, plan.placement.phys_to_log_LS.tolist(), strict=True
    ):
        assert config.get_layer_initial_global_assignments(layer_id) == row
    with pytest.raises(KeyError):
        config.get_layer_initial_global_assignments(0)
    with pytest.raises(ValueError, match="Extra inputs"):
        config_class(**yaml.safe_load(path.read_text()), provenance={})


@pytest.fixture
def expert_mapping(monkeypatch):
    """Return Omni-placement's ExpertMapping, with its compiled half left out."""
    folder = checkout("OMNI_INFER_SOURCE") / "omni/accelerators/placement/omni_planner"
    package = ModuleType("omni_planner")
    package.__path__ = [str(folder)]
    package.omni_placement = SimpleNamespace(PlacementMapping=lambda *_: None)
    monkeypatch.setitem(sys.modules, "omni_planner", package)
    for name in ("config", "expert_mapping"):
        monkeypatch.delitem(sys.modules, f"omni_planner.{name}", raising=False)
    import importlib

    config = importlib.import_module("omni_planner.config")
    mapping = importlib.import_module("omni_planner.expert_mapping")
    yield lambda path, rank: mapping.ExpertMapping(
        config.Config(path), device="cpu", rank=rank, world_size=16, num_devices_per_host=4
    )
    for name in ("config", "expert_mapping"):
        sys.modules.pop(f"omni_planner.{name}", None)


def test_omni_loads_the_pattern(expert_mapping, plan, tmp_path):
    path = tmp_path / "pattern.npy"
    export = export_plan(plan, "omni", path)
    config = tmp_path / "config.yaml"
    lines = [line for line in export.launch if not line.startswith(("#", "use_", "omni_"))]
    config.write_text("\n".join(lines) + "\n")
    rows_LRK = plan.placement.phys_to_log_LS[:-1].reshape(58, 16, 20)
    for rank in (0, 9):
        mapping = expert_mapping(config, rank)
        assert mapping.get_max_num_deployed_expert_per_rank() == 20
        assert set(mapping.get_deployed_experts_per_layer()) == {320}
        for layer in (0, 57):
            assert mapping.get_local_expert_indices_offset(layer, rank, 16) == 20 * rank
            for position, expert in enumerate(sorted(rows_LRK[layer, rank].tolist())):
                here, at = mapping.is_expert_on_current_rank(layer, expert, rank, 16)
                assert (bool(here), at) == (True, position)


def test_from_recording_to_a_loaded_plan_of_tensorrt_llm(config_class, eplb_command):
    """The page on TensorRT-LLM, from start to end."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    folder = Path("expert_statistic")
    folder.mkdir()
    (folder / "meta_info.json").write_text('{"num_experts": 256, "num_experts_per_token": 8}')
    for rank in range(2):
        save_file(
            {f"{i}_{layer}": row for i, window in enumerate(counts(3, 59), start=100)
             for layer, row in enumerate(window, start=3)},
            folder / f"rank{rank}.safetensors",
        )  # fmt: skip
    eplb_command(f"plan expert_statistic {TOPOLOGY} -o plan.yaml")
    eplb_command("export plan.yaml --to tensorrt-llm -o balancer.yaml")
    config = config_class(**yaml.safe_load(Path("balancer.yaml").read_text()))
    placement = read_plan("plan.yaml").placement
    assert placement.layer_ids == tuple(range(3, 62))
    for layer_id, row in zip(placement.layer_ids, placement.phys_to_log_LS, strict=True):
        assert config.get_layer_initial_global_assignments(layer_id) == row.tolist()


def test_from_recording_to_a_loaded_plan_of_omni(expert_mapping, eplb_command):
    """The page on Omni-placement, from start to end."""
    folder = Path("decoder")
    folder.mkdir()
    for step, window in enumerate(counts(3, 58)):
        text = "".join("\t".join(map(str, row)) + "\t\n" for row in window.tolist())
        (folder / f"activation_counts_recordstep_{step}_rank_0.txt").write_text(text)
    eplb_command("profile convert decoder --model deepseek-v3 -o decode.npz")
    eplb_command(f"plan decode.npz {TOPOLOGY} -o plan.yaml")
    out = eplb_command("export plan.yaml --to omni -o pattern.npy")
    lines = [line.strip() for line in out.partition("# that config.yaml")[2].splitlines()]
    Path("config.yaml").write_text("\n".join(lines) + "\n")
    placement = read_plan("plan.yaml").placement
    assert placement.layer_ids == tuple(range(3, 61))
    mapping = expert_mapping("config.yaml", 0)
    for layer, ranks in enumerate(placement.phys_to_log_LS.reshape(58, 16, 20).tolist()):
        for rank, experts in enumerate(ranks):
            held = mapping.placement_pattern[rank, layer].nonzero().flatten()
            assert held.tolist() == sorted(experts)
