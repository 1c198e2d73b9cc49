"""vLLM's policy interface, maps and rearrangement of weights, with our plug-in and plans."""

import inspect
import json
import re
from importlib.metadata import entry_points

import numpy as np
import pytest
from with_engines.conftest import TOPOLOGY, counts
from with_engines.vllm_ranks import EXPERTS, LAYERS, RANKS, SLOTS, serve_rank

from eplb.engines.vllm import VLLM
from eplb.errors import InvalidInput
from eplb.placement.keep_slots import count_moves
from eplb.plan_file import read_plan, write_plan
from eplb.profiles import read_profile
from eplb.runtime import vllm_policy

torch = pytest.importorskip("torch")


@pytest.fixture
def registry(vllm):
    """vLLM's dict of policies, restored after the test."""
    policies = vllm.load("vllm.distributed.eplb.policy").EPLB_POLICIES
    before = dict(policies)
    yield policies
    policies.update(before)


@pytest.fixture
def plugged(vllm, registry, monkeypatch):
    """Load the plug-in as vLLM does, with this value of EPLB_POLICY."""
    vllm.give("vllm.envs", VLLM_PLUGINS=["eplb"])
    plugins = vllm.load("vllm.plugins")

    def load(value):
        monkeypatch.setenv("EPLB_POLICY", str(value))
        monkeypatch.setattr(plugins, "plugins_loaded", False)
        plugins.load_general_plugins()
        return registry["default"]

    return load


def skewed(seed, layers=LAYERS, experts=EXPERTS):
    return torch.tensor(np.random.default_rng(seed).lognormal(5, 1, (layers, experts)).round())


def test_the_entry_point_is_installed_and_does_nothing_by_itself(registry, monkeypatch):
    (entry,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "eplb")
    monkeypatch.delenv("EPLB_POLICY", raising=False)
    before = registry["default"]
    entry.load()()
    assert registry["default"] is before


@pytest.mark.parametrize("name", ["global", "hierarchical"])
def test_the_policy_keeps_the_contract_of_the_interface(vllm, plugged, name):
    policy = plugged(name)
    base = vllm.load("vllm.distributed.eplb.policy.abstract").AbstractEplbPolicy
    assert issubclass(policy, base)
    assert not inspect.isabstract(policy)
    assert inspect.signature(policy.rebalance_experts).parameters.keys() == (
        inspect.signature(base.rebalance_experts).parameters.keys()
    )
    old = torch.arange(SLOTS).repeat(LAYERS, 1) % EXPERTS
    new = policy.rebalance_experts(skewed(0), SLOTS, 4, 2, RANKS, old)
    assert (new.dtype, new.device.type) == (torch.int64, "cpu")
    assert tuple(new.shape) == (LAYERS, SLOTS)
    for row in new.tolist():
        assert set(row) == set(range(EXPERTS))
        if name == "hierarchical":
            # Four groups of four experts on two nodes: no group is on both.
            groups = [{e // 4 for e in row[:12]}, {e // 4 for e in row[12:]}]
            assert not groups[0] & groups[1]
    again = policy.rebalance_experts(skewed(0), SLOTS, 4, 2, RANKS, new)
    assert torch.equal(again, new)


def test_an_idle_server_moves_nothing(plugged):
    old = torch.arange(SLOTS).repeat(LAYERS, 1) % EXPERTS
    idle = torch.zeros((LAYERS, EXPERTS), dtype=torch.int32)
    assert torch.equal(plugged("global").rebalance_experts(idle, SLOTS, 1, 1, RANKS, old), old)


def test_moves_fewer_experts_than_vllms_own(vllm, plugged):
    own = vllm.load("vllm.distributed.eplb.policy.default").DefaultEplbPolicy
    sizes = 288, 1, 1, 32
    old = own.rebalance_experts(skewed(1, 8, 256), *sizes)
    load = skewed(2, 8, 256)
    theirs = own.rebalance_experts(load, *sizes, old)
    ours = plugged("global").rebalance_experts(load, *sizes, old)
    moves = [count_moves(old.numpy(), new.numpy(), 32) for new in (ours, theirs)]
    assert moves[0] < moves[1]


def test_elastic_maps_with_empty_slots_are_understood(plugged):
    old = torch.arange(SLOTS).repeat(LAYERS, 1) % EXPERTS
    old[:, 18:] = -1
    new = plugged("global").rebalance_experts(skewed(0), SLOTS, 1, 1, RANKS, old)
    assert all(set(row) == set(range(EXPERTS)) for row in new.tolist())
    # Fewer ranks than before: another shape, nothing to keep.
    fewer = plugged("global").rebalance_experts(skewed(0), 18, 1, 1, 3, old)
    assert tuple(fewer.shape) == (LAYERS, 18)


def test_a_plan_is_served_as_it_is(plan, plugged, tmp_path):
    write_plan(plan, tmp_path / "plan.yaml")
    policy = plugged(tmp_path / "plan.yaml")
    main = policy.rebalance_experts(skewed(0, 58, 256), 320, 8, 4, 16)
    assert np.array_equal(main.numpy(), plan.placement.phys_to_log_LS[:-1])
    draft = policy.rebalance_experts(skewed(0, 1, 256), 320, 8, 4, 16)
    assert np.array_equal(draft.numpy(), plan.placement.phys_to_log_LS[-1:])
    with pytest.raises(InvalidInput, match="the plan is for 256 experts in 320 slots of 16 ranks"):
        policy.rebalance_experts(skewed(0, 58, 256), 288, 8, 4, 32)


@pytest.mark.parametrize("policy", [None, "global"])
def test_loads_are_recorded_around_any_policy(plugged, registry, monkeypatch, tmp_path, policy):
    monkeypatch.setenv("EPLB_RECORD", str(tmp_path / "loads.jsonl"))
    before = registry["default"]
    recording = plugged(policy or "")
    assert issubclass(recording, before) == (policy is None)
    old = torch.arange(SLOTS).repeat(LAYERS, 1) % EXPERTS
    sizes = SLOTS, 1, 1, RANKS, old
    asked = [torch.zeros((LAYERS, EXPERTS)), skewed(0), skewed(1)]
    placed = [recording.rebalance_experts(load, *sizes) for load in asked]
    recording.rebalance_experts(skewed(2, 1), SLOTS, 1, 1, RANKS)  # a draft model
    if policy is None:
        own = before.rebalance_experts(asked[2], *sizes)
        assert torch.equal(placed[2], own)
    profile = read_profile(tmp_path / "loads.3x16.jsonl")
    assert np.array_equal(profile.counts_WLE, np.stack(asked[1:]))
    assert read_profile(tmp_path / "loads.1x16.jsonl").num_layers == 1


def test_another_interface_is_refused(vllm, registry, monkeypatch):
    policies = vllm.load("vllm.distributed.eplb.policy")

    class Other:
        def rebalance_experts(cls, weight, something_new):  # noqa: N805
            raise NotImplementedError

    monkeypatch.setenv("EPLB_POLICY", "global")
    monkeypatch.setattr(policies, "AbstractEplbPolicy", Other)
    with pytest.raises(
        InvalidInput, match=r"vLLM 0\.33\.0 calls its policies with .*something_new"
    ):
        vllm_policy.register()


def test_maps_of_our_placements_are_what_the_router_needs(vllm, plan):
    state = vllm.load("vllm.distributed.eplb.eplb_state")
    rows = torch.tensor(plan.placement.phys_to_log_LS)
    slots, count = state.compute_logical_maps(rows, 256)
    assert torch.equal(count.sum(dim=1), torch.full((59,), 320))
    layer, expert, replica = torch.nonzero(slots >= 0, as_tuple=True)
    assert torch.equal(rows[layer, slots[layer, expert, replica]], expert)


def test_vllm_moves_the_weights_to_where_our_policy_says(plugged, unused_port):
    policy = plugged("global")
    old = torch.arange(SLOTS).repeat(LAYERS, 1) % EXPERTS
    new = policy.rebalance_experts(skewed(4), SLOTS, 1, 1, RANKS, old)
    assert not torch.equal(new, old)
    torch.multiprocessing.spawn(serve_rank, (old, new, unused_port), nprocs=RANKS)


def test_options_that_are_printed_exist(vllm, plan):
    lines = VLLM.launch(plan, plan.placement, "file.json", "plan.yaml")
    released, pending = (line for line in lines if "vllm serve" in line)
    (config,) = re.findall(r"--eplb-config '(.*)'", released)
    declared = vllm.text("config/parallel.py")
    assert json.loads(config)["num_redundant_experts"] == 64
    for key in json.loads(config):
        assert re.search(rf"^    {key}: ", declared, re.MULTILINE), key
    arguments = vllm.text("engine/arg_utils.py")
    for flag in re.findall(r"--[a-z-]+", released):
        assert f'"{flag}"' in arguments, flag
    assert "initial_mapping_path" in pending
    assert "initial_mapping_path" not in declared  # once it is there, the page can say so


def test_from_recording_to_a_served_plan(vllm, plugged, registry, monkeypatch, eplb_command):
    """The page on vLLM, from start to end: record around its own policy, plan, serve, check."""
    monkeypatch.setenv("EPLB_RECORD", "loads.jsonl")
    held = torch.arange(320).repeat(58, 1) % 256
    recording = plugged("")
    for load in counts(3, 58):
        held = recording.rebalance_experts(torch.tensor(load), 320, 8, 4, 16, held)
    monkeypatch.delenv("EPLB_RECORD")
    registry["default"] = vllm.load("vllm.distributed.eplb.policy.default").DefaultEplbPolicy
    eplb_command("profile convert loads.58x256.jsonl --model deepseek-v3 -o loads.npz")
    eplb_command(f"plan loads.npz {TOPOLOGY} -o plan.yaml")
    out = eplb_command("export plan.yaml --to vllm -o mapping.json")
    assert "EPLB_POLICY=" in out
    served = plugged("plan.yaml").rebalance_experts(skewed(0, 58, 256), 320, 8, 4, 16, held)
    plan = read_plan("plan.yaml")
    assert plan.placement.layer_ids == tuple(range(3, 61))
    assert np.array_equal(served.numpy(), plan.placement.phys_to_log_LS)
    eplb_command("import mapping.json --from vllm --nodes 4 --ranks-per-node 4 --model "
                 "deepseek-v3 -o back.yaml")  # fmt: skip
    assert read_plan("back.yaml").placement == plan.placement
