"""Through every engine's file and back: the placement as it was, layers by their decoder ids."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import placements, topologies

from eplb.engines.convert import ENGINES, export_plan, import_plan
from eplb.engines.engine import DENSE, MOE_AND_MTP
from eplb.errors import InvalidInput
from eplb.model import MoEModel, model_preset
from eplb.plan import Plan
from eplb.plan_file import read_plan, write_plan

FILES = [(name, suffix) for name, engine in ENGINES.items() for suffix in engine.suffixes]


@st.composite
def served_plans(draw, *, mtp: bool = True):
    """Plans that every engine can serve: all slots filled, replicas on distinct ranks."""
    num_experts = draw(st.integers(1, 9))
    topology = draw(topologies(min_slots=num_experts))
    if topology.slots_per_rank > num_experts:
        topology = replace(topology, slots_per_rank=num_experts)
    num_layers = draw(st.integers(1, 9))
    moe = draw(st.sets(st.integers(0, num_layers - 1), min_size=1))
    extra = draw(st.integers(0, 2)) if mtp else 0
    layer_ids = (*sorted(moe), *range(num_layers, num_layers + extra))
    model = MoEModel(
        name="toy", num_experts=num_experts, layer_ids=layer_ids, num_layers=num_layers
    )
    filled = placements(num_experts, layer_ids, topology, empties=False, distinct=True)
    placement = draw(filled.filter(lambda p: (p.phys_to_log_LS >= 0).all()))
    return Plan(model=model, topology=topology, placement=placement)


@pytest.mark.parametrize(("name", "suffix"), FILES)
@given(data=st.data())
def test_placements_come_back(tmp_path_factory, name, suffix, data):
    plan = data.draw(served_plans())
    path = tmp_path_factory.mktemp("engine") / f"file{suffix}"
    export = export_plan(plan, name, path)
    main = tuple(i for i in plan.model.layer_ids if i < plan.model.num_layers)
    found = import_plan(
        path, name, num_nodes=plan.topology.num_nodes,
        ranks_per_node=plan.topology.ranks_per_node, model=replace(plan.model, layer_ids=main),
    ).plan  # fmt: skip
    keeps_mtp = ENGINES[name].rows == MOE_AND_MTP
    expected = plan.placement.layer_ids if keeps_mtp else main
    assert found.placement.layer_ids == expected
    assert found.topology == plan.topology
    rows_LS, found_LS = plan.placement.of_layers(expected), found.placement.phys_to_log_LS
    if name == "omni":
        rows_LS, found_LS = (
            np.sort(rows.reshape(len(rows), plan.topology.num_ranks, -1), axis=2)
            for rows in (rows_LS, found_LS)
        )
    assert np.array_equal(found_LS, rows_LS)
    dropped = len(main) < len(plan.placement.layer_ids) and not keeps_mtp
    assert dropped == any("multi-token prediction is left out" in r for r in export.remarks)


@given(data=st.data())
def test_omni_keeps_layers_with_fewer_slots(tmp_path_factory, data):
    """Empty slots are the one thing that only Omni's file can say."""
    plan = data.draw(served_plans(mtp=False))
    rows_LS = plan.placement.phys_to_log_LS.copy()
    per_rank = plan.topology.slots_per_rank
    # A layer without replicas beside full ones: a slot less on every rank, if no expert is lost.
    lean = rows_LS[0].reshape(-1, per_rank)
    order = data.draw(st.permutations(range(lean.size)))
    for slot in order:
        rank, place = divmod(slot, per_rank)
        full = (lean[rank] >= 0).sum() == per_rank
        if full and (lean == lean[rank, place]).sum() > 1:
            lean[rank, place] = -1
    plan = replace(plan, placement=replace(plan.placement, phys_to_log_LS=rows_LS))
    path = tmp_path_factory.mktemp("omni") / "pattern.npy"
    nodes = {
        "num_nodes": plan.topology.num_nodes, "ranks_per_node": plan.topology.ranks_per_node
    }  # fmt: skip
    counts = (rows_LS.reshape(len(rows_LS), -1, per_rank) >= 0).sum(axis=2)
    room = counts.sum(axis=1).max() // plan.topology.num_ranks
    if counts.max() > room:
        with pytest.raises(InvalidInput, match="omni makes room for"):
            export_plan(plan, "omni", path)
        return
    export_plan(plan, "omni", path)
    found = import_plan(path, "omni", **nodes, model=plan.model).plan
    for row, was in zip(found.placement.phys_to_log_LS, rows_LS, strict=True):
        ranks = zip(
            row.reshape(plan.topology.num_ranks, -1), was.reshape(-1, per_rank), strict=True
        )
        assert all(sorted(a[a >= 0]) == sorted(b[b >= 0]) for a, b in ranks)


@pytest.mark.parametrize(("name", "suffix"), FILES)
def test_refused_and_reported(tmp_path, name, suffix):
    """Two replicas on a rank, and empty slots, are written where the engine can hold them."""
    engine = ENGINES[name]
    plan = _plan([[0, 1, 0, 2]])
    refused = {"sglang", "vllm-ascend", "omni"}
    shared = _plan([[0, 0, 1, 2]])
    path = tmp_path / f"file{suffix}"
    export_plan(plan, name, path)
    before = path.read_bytes()
    if name in refused:
        with pytest.raises(InvalidInput, match="layer 0, rank 0: expert 0 is there twice"):
            export_plan(shared, name, path)
        assert path.read_bytes() == before
    else:
        (remark,) = (r for r in export_plan(shared, name, path).remarks if "wastes" in r)
        assert remark.startswith("1 slots repeat")
    empty = _plan([[0, 1, 2, -1]])
    if engine.empty_slots:
        with pytest.raises(InvalidInput, match=r"makes room for 1 experts .* rank 0 has 2"):
            export_plan(empty, name, path)
    else:
        with pytest.raises(InvalidInput, match=r"slot 3 \(rank 1\) of layer 0 is empty"):
            export_plan(empty, name, path)


@pytest.mark.parametrize("split", ["even", "nearest"])
@pytest.mark.parametrize("name", ENGINES)
def test_what_becomes_of_the_split_rule_is_said(tmp_path, name, split):
    plan = replace(_plan([[0, 1, 0, 2]]), split=split)
    export = export_plan(plan, name, tmp_path / f"file{ENGINES[name].suffixes[0]}")
    kept_by = {"even": {"vllm", "tensorrt-llm"}, "nearest": {"omni"}}[split]
    said = any("even" in r or "near" in r or "first one of its node" in r for r in export.remarks)
    assert said != (name in kept_by)


@pytest.mark.parametrize("split", ["weighted", "batch"])
@pytest.mark.parametrize("name", ENGINES)
def test_split_rules_that_no_engine_has_are_named_and_the_slots_kept(tmp_path, name, split):
    plan = _plan([[0, 1, 0, 2]])
    weights = np.array([[0.25, 1, 0.75, 1]]) if split == "weighted" else None
    placement = replace(plan.placement, split_weights_LS=weights)
    plan = replace(plan, split=split, placement=placement)
    path = tmp_path / f"file{ENGINES[name].suffixes[0]}"
    assert any(f"not '{split}'" in remark for remark in export_plan(plan, name, path).remarks)
    found = import_plan(path, name, num_nodes=1, ranks_per_node=2).plan
    assert np.array_equal(found.placement.phys_to_log_LS, plan.placement.phys_to_log_LS)


def test_layers_that_the_plan_lacks_are_filled_in_and_said(tmp_path):
    """A profile without load in some layer gives a plan without it; ordinals must not shift."""
    model = replace(model_preset("qwen3-30b-a3b"), layer_ids=(1, 2, 47))
    plan = _plan([list(range(127, -1, -1))] * 3, layer_ids=(1, 2, 47), model=model)
    path = tmp_path / "map.json"
    export = export_plan(plan, "vllm-ascend", path)
    assert any(r.startswith("layer 0, 3, 4, 5, 6, 7, ... (45 in all)") for r in export.remarks)
    found = import_plan(path, "vllm-ascend", num_nodes=1, ranks_per_node=2,
                        model=model_preset("qwen3-30b-a3b")).plan  # fmt: skip
    assert found.placement.layer_ids == tuple(range(48))
    assert np.array_equal(found.placement.phys_to_log_LS[0], np.arange(128))
    assert np.array_equal(found.placement.phys_to_log_LS[47], np.arange(127, -1, -1))


def test_moe_layers_say_what_no_preset_does(tmp_path):
    plan = _plan([[0, 1, 0, 2]] * 2, layer_ids=(3, 5))
    path = tmp_path / "map.json"
    export_plan(plan, "vllm", path, moe_layers=(1, 3, 5))
    found = import_plan(path, "vllm", num_nodes=1, ranks_per_node=2, moe_layers=(1, 3, 5)).plan
    assert found.placement.layer_ids == (1, 3, 5)
    assert np.array_equal(found.placement.of_layers((3, 5)), plan.placement.phys_to_log_LS)
    with pytest.raises(InvalidInput, match="the plan places experts in layer 3, which is not"):
        export_plan(plan, "vllm", path, moe_layers=(1, 5))


def test_imported_plans_can_be_written_and_read(tmp_path):
    export_plan(_plan([[0, 1, 0, 2]]), "sglang", tmp_path / "map.json")
    found = import_plan(tmp_path / "map.json", "sglang", num_nodes=1, ranks_per_node=2)
    write_plan(found.plan, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == found.plan
    assert found.plan.provenance["imported_from"] == "sglang"
    assert any("dense" in r for r in found.remarks)


def test_dense_layers_of_sglang_are_filled_and_left_out_again(tmp_path):
    model = replace(model_preset("deepseek-v3"), layer_ids=tuple(range(3, 61)))
    row = np.arange(288)[::-1] % 256
    plan = _plan([row.tolist()] * 58, layer_ids=model.layer_ids, model=model, ranks=32)
    path = tmp_path / "map.pt"
    export_plan(plan, "sglang", path)
    everything = import_plan(path, "sglang", num_nodes=4, ranks_per_node=8).plan.placement
    assert everything.layer_ids == tuple(range(61))
    assert np.array_equal(everything.phys_to_log_LS[0], np.arange(288) % 256)
    back = import_plan(path, "sglang", num_nodes=4, ranks_per_node=8, model=model).plan
    assert back.placement == plan.placement
    assert ENGINES["sglang"].rows == DENSE


def _plan(rows, layer_ids=None, model=None, ranks=2):
    from eplb.slots import Placement
    from eplb.topology import Topology

    ids = tuple(range(len(rows))) if layer_ids is None else layer_ids
    experts = max(max(row) for row in rows) + 1
    return Plan(
        model=model or MoEModel(name="toy", num_experts=experts, layer_ids=ids),
        topology=Topology(num_nodes=1, ranks_per_node=ranks, slots_per_rank=len(rows[0]) // ranks),
        placement=Placement(phys_to_log_LS=np.array(rows), layer_ids=ids, num_experts=experts),
    )
