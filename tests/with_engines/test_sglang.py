"""SGLang's loader of expert locations, its algorithms and its plug-in framework, on our files."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from with_engines.conftest import TOPOLOGY, counts, plan_of_layers, share_a_rank

from eplb.engines.convert import export_plan, import_plan
from eplb.errors import InvalidInput
from eplb.model import model_preset
from eplb.plan_file import read_plan, write_plan
from eplb.profiles import read_profile
from eplb.runtime import sglang_algorithm

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def settings():
    """What a server's arguments come to."""
    moe = SimpleNamespace(
        init_expert_location="trivial", ep_num_redundant_experts=64, moe_a2a_backend="deepep",
        ep_dispatch_algorithm="static", ep_join_mode=None, eplb_algorithm="auto",
    )  # fmt: skip
    parallel = SimpleNamespace(ep_size=16, nnodes=4, elastic_ep_initial_size=None)
    return SimpleNamespace(
        moe=moe, parallel=parallel, resources=SimpleNamespace(expert_location_metadata=None)
    )


@pytest.fixture(scope="module")
def sglang(release, settings):
    found = release("sglang")
    found.package("sglang.srt")
    found.give(
        "sglang.srt.runtime_context",
        get_exec=lambda: SimpleNamespace(moe=settings.moe),
        get_parallel=lambda: settings.parallel,
        get_resources=lambda: settings.resources,
        get_device=lambda: SimpleNamespace(device="cpu"),
    )
    found.give("sglang.srt.elastic_ep")
    found.give("sglang.srt.elastic_ep.elastic_ep", elastic_expanded_world_enabled=lambda: False)
    location = found.load("sglang.srt.eplb.expert_location")
    # The layers of a DeepSeek-V3 server: deepseek_v2.py, get_model_config_for_expert_location.
    location.ModelConfigForExpertLocation.from_model_config = lambda _: (
        location.ModelConfigForExpertLocation(num_layers=61, num_logical_experts=256, num_groups=8)
    )
    found.location = location
    return found


@pytest.fixture
def serve(sglang, settings, monkeypatch):
    """Return what rank ``rank`` of a server gets from an initial expert location."""

    def start(path, rank, **arguments):
        for name, value in {"init_expert_location": str(path), **arguments}.items():
            monkeypatch.setattr(settings.moe, name, value)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        return sglang.location.compute_initial_expert_location_metadata(None, rank)

    return start


@pytest.fixture(params=[".pt", ".json"])
def path(request, tmp_path):
    return tmp_path / f"location{request.param}"


def test_the_loader_places_what_the_plan_says(plan, path, serve):
    export = export_plan(plan, "sglang", path)
    assert any("61 of multi-token prediction is left out" in r for r in export.remarks)
    for rank in (0, 7, 15):
        served = serve(path, rank)
        assert (served.num_layers, served.num_physical_experts, served.ep_size) == (61, 320, 16)
        rows_LS = served.physical_to_logical_map.numpy()
        assert np.array_equal(rows_LS[3:], plan.placement.phys_to_log_LS[:-1])
        # Dense layers have a row too, with every expert in it.
        assert np.array_equal(rows_LS[:3], np.tile(np.arange(320) % 256, (3, 1)))
        # Where this rank sends tokens: to a slot that holds the expert, on itself if it can.
        slot_LE = served.logical_to_rank_dispatch_physical_map.numpy()
        assert np.array_equal(
            np.take_along_axis(rows_LS, slot_LE, axis=1), np.tile(np.arange(256), (61, 1))
        )
        own_S = np.arange(320) // 20 == rank
        layer, slot = np.nonzero(own_S & (np.arange(61) >= 3)[:, None])
        assert (slot_LE[layer, rows_LS[layer, slot]] // 20 == rank).all()


def test_a_file_comes_back_as_the_plan(plan, path):
    export_plan(plan, "sglang", path)
    found = import_plan(
        path, "sglang", num_nodes=4, ranks_per_node=4, model=model_preset("deepseek-v3")
    )
    assert found.plan.placement.layer_ids == plan.placement.layer_ids[:-1]
    assert np.array_equal(found.plan.placement.phys_to_log_LS, plan.placement.phys_to_log_LS[:-1])


def test_without_all_to_all_replicas_are_split_evenly(plan, path, serve):
    export_plan(plan, "sglang", path)
    served = serve(path, 5, moe_a2a_backend="none", ep_dispatch_algorithm="dynamic")
    count_LE = np.stack([np.bincount(row) for row in plan.placement.phys_to_log_LS[:-1]])
    assert np.array_equal(served.logical_to_all_physical_map_num_valid[3:].numpy(), count_LE)


def test_with_all_to_all_a_file_is_split_by_nearness_whatever_the_dispatch(plan, path, serve):
    """What `eplb export` warns of: a rank forgets the replicas of others where it has one."""
    export_plan(plan, "sglang", path)
    for algorithm in ("static", "dynamic"):
        served = serve(path, 5, ep_dispatch_algorithm=algorithm)
        own = torch.tensor(plan.placement.phys_to_log_LS[0, 100:120].tolist())
        assert (served.logical_to_all_physical_map_num_valid[3, own] == 1).all()
        assert (served.logical_to_all_physical_map[3, own, 0] // 20 == 5).all()


def test_two_replicas_on_a_rank_would_lose_weights(plan, serve, tmp_path):
    """Why they are refused: the rank loads one of them, and others send tokens to the other."""
    rows_LS = plan.placement.phys_to_log_LS.copy()
    expert, first, second = share_a_rank(rows_LS[0], 20)
    dense = np.tile(np.arange(320) % 256, (3, 1))
    torch.save(
        {"physical_to_logical_map": torch.tensor(np.vstack([dense, rows_LS[:-1]]))},
        tmp_path / "raw.pt",
    )
    holder = serve(tmp_path / "raw.pt", first // 20)
    assert holder.logical_to_all_physical(3, expert) == [first]
    used = {
        int(serve(tmp_path / "raw.pt", rank).logical_to_rank_dispatch_physical_map[3, expert])
        for rank in range(16)
    }
    assert second in used
    shared = replace(plan, placement=replace(plan.placement, phys_to_log_LS=rows_LS))
    with pytest.raises(InvalidInput, match="weights of the second replica are not loaded"):
        export_plan(shared, "sglang", tmp_path / "refused.pt")


def test_recorded_loads_are_what_the_recorder_means(sglang, tmp_path):
    """``logical_count`` of the recorder, through its own conversion, and through our reader."""
    random = np.random.default_rng(0)
    rows_LS = np.stack([random.permutation(np.arange(320) % 256) for _ in range(61)])
    physical = torch.tensor(random.integers(1, 50, (6, 61, 320)))
    physical[:, :3] = 0
    source = sglang.text("srt/eplb/expert_distribution.py")
    function = source[source.index("def _convert_global_physical_count_to_logical_count") :]
    code = function[: function.index("\n\n\n")] if "\n\n\n" in function else function
    scope = {"torch": torch}
    exec(code, scope)  # noqa: S102
    logical = scope["_convert_global_physical_count_to_logical_count"](
        physical, num_layers=61, num_logical_experts=256,
        physical_to_logical_map=torch.tensor(rows_LS),
    )  # fmt: skip
    torch.save({"rank": 0, "logical_count": logical}, tmp_path / "dump.pt")
    profile = read_profile(tmp_path / "dump.pt")
    assert profile.layer_ids == tuple(range(3, 61))
    assert np.array_equal(profile.counts_WLE, logical[:, 3:].numpy())


@pytest.fixture
def plugged(sglang, monkeypatch):
    """Load the plug-in through SGLang's own framework, with this value of EPLB_POLICY."""
    plugins = sglang.load("sglang.srt.plugins")
    algorithms = sglang.load("sglang.srt.eplb.eplb_algorithms")
    original = algorithms.rebalance_experts

    def load(value):
        monkeypatch.setenv("EPLB_POLICY", str(value))
        monkeypatch.setattr(plugins, "_plugins_loaded", False)
        plugins.load_plugins()
        return algorithms.rebalance_experts

    yield load
    plugins.HookRegistry._hooks.clear()
    plugins.HookRegistry._patched.clear()
    algorithms.rebalance_experts = original


def test_the_plug_in_brings_a_plan_in_and_keeps_all_replicas(
    plan, plugged, serve, settings, tmp_path
):
    write_plan(plan, tmp_path / "plan.yaml")
    plugged(tmp_path / "plan.yaml")
    torch.save({"rank": 0, "logical_count": torch.ones((2, 61, 256))}, tmp_path / "dump.pt")
    served = serve(tmp_path / "dump.pt", 5, ep_dispatch_algorithm="dynamic")
    rows_LS = served.physical_to_logical_map.numpy()
    assert np.array_equal(rows_LS[3:], plan.placement.phys_to_log_LS[:-1])
    count_LE = np.stack([np.bincount(row) for row in plan.placement.phys_to_log_LS[:-1]])
    assert np.array_equal(served.logical_to_all_physical_map_num_valid[3:].numpy(), count_LE)


def test_the_plug_in_solves_and_keeps_slots(sglang, plugged, serve, settings, tmp_path):
    plugged("global")
    random = np.random.default_rng(1)
    load = torch.tensor(random.lognormal(0, 1, (1, 61, 256)) * 1000)
    load[:, :3] = 0
    torch.save({"logical_count": load}, tmp_path / "dump.pt")
    served = serve(tmp_path / "dump.pt", 0, ep_dispatch_algorithm="dynamic")
    for row in served.physical_to_logical_map.tolist():
        assert set(row) == set(range(256))
        assert all(len(set(row[r * 20 : r * 20 + 20])) == 20 for r in range(16))
    sglang.location.set_global_expert_location_metadata(served, allow_overwrite=True)
    try:
        again = sglang.location.ExpertLocationMetadata.init_by_eplb(None, load)
    finally:
        sglang.location.set_global_expert_location_metadata(None, allow_overwrite=True)
    assert torch.equal(again.physical_to_logical_map, served.physical_to_logical_map)


def test_without_the_variable_the_engine_is_left_alone(sglang, plugged, monkeypatch):
    algorithms = sglang.load("sglang.srt.eplb.eplb_algorithms")
    before = algorithms.rebalance_experts
    assert plugged("") is before
    monkeypatch.delenv("EPLB_POLICY")
    sglang_algorithm.register()
    assert algorithms.rebalance_experts is before


def test_flags_that_are_printed_exist(sglang, plan):
    fields = "".join(p.read_text() for p in Path(sglang.path, "srt/arg_groups").rglob("*.py"))
    lines = " ".join(export_plan_lines(plan))
    flags = set(re.findall(r"--([a-z0-9-]+)", lines))
    assert {"init-expert-location", "ep-dispatch-algorithm", "moe-a2a-backend"} <= flags
    for flag in flags:
        assert re.search(rf"^    {flag.replace('-', '_')}: A\[", fields, re.MULTILINE), flag


def export_plan_lines(plan):
    from eplb.engines.sglang import SGLANG

    return SGLANG.launch(plan, plan.placement, "file.pt", "plan.yaml")


def test_from_recording_to_a_loaded_plan(serve, eplb_command):
    """The page on SGLang, from start to end: record, plan, export, load, check."""
    recorded = torch.tensor(counts(4, 61))
    recorded[:, :3] = 0
    torch.save({"rank": 0, "logical_count": recorded.int()}, "dump.pt")
    eplb_command(f"plan dump.pt {TOPOLOGY} --split nearest -o plan.yaml")
    out = eplb_command("export plan.yaml --to sglang -o location.pt")
    assert "--ep-dispatch-algorithm static" in out
    served = serve("location.pt", 3).physical_to_logical_map[3:].numpy()
    assert np.array_equal(served, read_plan("plan.yaml").placement.phys_to_log_LS)
    eplb_command("import location.pt --from sglang --nodes 4 --ranks-per-node 4 --model "
                 "deepseek-v3 -o back.yaml")  # fmt: skip
    assert read_plan("back.yaml").placement == read_plan("plan.yaml").placement


def test_plans_without_multi_token_prediction_need_no_remark(path):
    plan = plan_of_layers(tuple(range(3, 61)), split="nearest")
    assert len(export_plan(plan, "sglang", path).remarks) == 1
