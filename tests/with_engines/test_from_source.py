"""TensorRT-LLM and Omni-placement have no wheels on the package index: their sources, checked out.

``TENSORRT_LLM_SOURCE`` and ``OMNI_INFER_SOURCE`` name the checkouts; without them these tests skip.
"""

import ast
import os
import sys
import typing
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import yaml

from eplb.engines.convert import export_plan, import_plan
from eplb.profiles import read_profile

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


def test_dumps_of_omni_are_read_through_the_pattern_that_was_served(plan, tmp_path):
    """Columns of a dump are slots, rank by rank, each rank's experts by id."""
    from eplb.engines.omni import read_statistics
    from eplb.source import Source

    path = tmp_path / "pattern.npy"
    export_plan(plan, "omni", path)
    served = import_plan(path, "omni", num_nodes=4, ranks_per_node=4).plan.placement
    counts = np.random.default_rng(0).integers(0, 99, served.phys_to_log_LS.shape)
    folder = tmp_path / "decoder"
    folder.mkdir()
    text = "".join("\t".join(map(str, row)) + "\t\n" for row in counts.tolist())
    (folder / "activation_counts_recordstep_7_rank_0.txt").write_text(text)
    profile = read_statistics(Source(path=folder, array=None, name="decoder"), served)
    expected = np.zeros((58, 256))
    for layer, row in enumerate(served.phys_to_log_LS):
        np.add.at(expected[layer], row, counts[layer])
    assert profile.phase_W == ("decode",)
    assert np.array_equal(profile.counts_WLE[0], expected)
    assert read_profile(folder).num_experts == 320
