"""What engines get when they ask for a placement, without an engine."""

import logging
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import loads

from eplb.engines.engine import DENSE, MOE_ORDINALS
from eplb.errors import EplbError, InvalidInput
from eplb.model import MoEModel
from eplb.placement.keep_slots import count_moves
from eplb.plan import Plan
from eplb.plan_file import write_plan
from eplb.profiles import read_profile
from eplb.runtime.engine_policy import (
    POLICIES,
    Request,
    keep,
    plan_policy,
    policy_of,
    solving_policy,
)
from eplb.runtime.sglang_algorithm import make_algorithm
from eplb.runtime.vllm_policy import make_policy, make_recorder
from eplb.slots import Placement
from eplb.topology import Topology


@st.composite
def requests(draw):
    """Any sizes that an engine may ask for, layers without load and empty slots among them."""
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ranks, layers = nodes * per_node, draw(st.integers(1, 3))
    groups = draw(st.integers(1, 4))
    experts = groups * draw(st.integers(1, 3))
    slots = ranks * (-(-experts // ranks) + draw(st.integers(0, 2)))
    load = draw(loads(layers, experts))
    load[draw(st.lists(st.booleans(), min_size=layers, max_size=layers))] = 0
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    current = draw(st.sampled_from(["none", "whole", "empty slots", "other shape"]))
    current_LS = None
    if current != "none":
        width = slots + ranks if current == "other shape" else slots
        current_LS = np.stack([random.permutation(width) % experts for _ in range(layers)])
    if current == "empty slots":
        current_LS[:, random.integers(slots)] = -1
    return Request(
        load_LE=load, num_slots=slots, num_ranks=ranks, num_nodes=nodes, num_groups=groups,
        current_LS=current_LS,
    )  # fmt: skip


@given(requests(), st.booleans())
def test_every_answer_can_be_served(request_, hierarchical):
    placed_LS = solving_policy(hierarchical=hierarchical)(request_)
    layers, experts = request_.load_LE.shape
    assert placed_LS.shape == (layers, request_.num_slots)
    assert placed_LS.dtype == np.int64
    assert placed_LS.flags.writeable
    for row in placed_LS.tolist():
        assert set(row) == set(range(experts))
    if hierarchical and request_.num_groups % request_.num_nodes == 0:
        size = experts // request_.num_groups
        for row in placed_LS.reshape(layers, request_.num_nodes, -1).tolist():
            groups = [{e // size for e in node} for node in row]
            assert sum(map(len, groups)) == request_.num_groups or _idle(request_)
    again = solving_policy(hierarchical=hierarchical)(replace(request_, current_LS=placed_LS))
    assert count_moves(placed_LS, again, request_.num_ranks) == 0


def _idle(request_):
    """A layer without load keeps the placement it had, groups or not."""
    return bool((request_.load_LE.sum(axis=1) <= 0).any()) and request_.current_LS is not None


def test_layers_without_load_keep_what_they_have():
    load = np.array([[5.0, 1, 1, 1], [0, 0, 0, 0]])
    current = np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 3]])
    request_ = Request(load_LE=load, num_slots=6, num_ranks=3, current_LS=current)
    assert np.array_equal(solving_policy(hierarchical=False)(request_)[1], current[1])


@given(requests())
def test_keep_moves_nothing(request_):
    kept = keep(request_)
    current = request_.current_LS
    if current is not None and current.shape == kept.shape and current.min() >= 0:
        assert np.array_equal(kept, current)
        assert kept.flags.writeable
    else:
        experts = request_.load_LE.shape[1]
        assert (kept == np.arange(request_.num_slots) % experts).all()


def test_groups_that_nodes_do_not_divide_are_placed_globally_with_a_warning(caplog):
    request_ = Request(load_LE=np.ones((1, 6)), num_slots=6, num_ranks=2, num_nodes=2, num_groups=3)
    with caplog.at_level(logging.WARNING):
        solving_policy(hierarchical=True)(request_)
    assert "3 groups cannot be divided over 2 nodes: placing globally" in caplog.text


def plan():
    layer_ids = (1, 3, 4)
    return Plan(
        model=MoEModel(name="toy", num_experts=3, layer_ids=layer_ids, num_layers=4),
        topology=Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=2),
        placement=Placement(
            phys_to_log_LS=np.array([[0, 1, 2, 0], [2, 1, 0, 1], [1, 2, 0, 2]]),
            layer_ids=layer_ids, num_experts=3,
        ),
    )  # fmt: skip


def ask(place, layers, **changes):
    sizes = {"num_slots": 4, "num_ranks": 2, **changes}
    return place(Request(load_LE=np.ones((layers, 3)), **sizes)).tolist()


def test_a_plan_answers_with_the_rows_that_the_engine_counts():
    moe = plan_policy(plan(), MOE_ORDINALS)
    assert ask(moe, 2) == [[0, 1, 2, 0], [2, 1, 0, 1]]
    assert ask(moe, 1) == [[1, 2, 0, 2]]  # the draft model of multi-token prediction
    dense = plan_policy(plan(), DENSE)
    assert ask(dense, 4) == [[0, 1, 2, 0], [0, 1, 2, 0], [0, 1, 2, 0], [2, 1, 0, 1]]
    for wrong in ({"num_slots": 6}, {"num_ranks": 4}):
        with pytest.raises(InvalidInput, match="the plan is for 3 experts in 4 slots of 2 ranks"):
            ask(moe, 2, **wrong)
    with pytest.raises(InvalidInput, match="2 or 1 layers; the engine has 3, 4, 2 and 3; start"):
        ask(moe, 3)


def test_the_variable_names_a_policy_or_a_plan(tmp_path):
    assert policy_of({}, MOE_ORDINALS) is None
    assert policy_of({"EPLB_POLICY": ""}, MOE_ORDINALS) is None
    for name in POLICIES:
        assert policy_of({"EPLB_POLICY": name}, MOE_ORDINALS) is not None
    write_plan(plan(), tmp_path / "plan.yaml")
    place = policy_of({"EPLB_POLICY": str(tmp_path / "plan.yaml")}, MOE_ORDINALS)
    assert ask(place, 2) == [[0, 1, 2, 0], [2, 1, 0, 1]]
    with pytest.raises(InvalidInput, match=r"EPLB_POLICY: 'globl'; did you mean 'global'.*\.yaml"):
        policy_of({"EPLB_POLICY": "globl"}, MOE_ORDINALS)
    with pytest.raises(EplbError, match="does not exist"):
        policy_of({"EPLB_POLICY": "missing.yaml"}, MOE_ORDINALS)


def test_vllms_side_takes_and_returns_tensors():
    torch = pytest.importorskip("torch")
    policy = make_policy(solving_policy(hierarchical=False), object)
    old = torch.tensor([[0, 1, 2, 0]])
    new = policy.rebalance_experts(torch.tensor([[9, 1, 5]], dtype=torch.int32), 4, 1, 1, 2, old)
    assert (new.dtype, tuple(new.shape)) == (torch.int64, (1, 4))
    assert set(new[0].tolist()) == {0, 1, 2}


def test_a_recording_that_cannot_be_written_stops_no_rebalancing(tmp_path, caplog):
    torch = pytest.importorskip("torch")
    policy = make_policy(solving_policy(hierarchical=False), object)
    recorder = make_recorder(policy, tmp_path / "missing" / "loads.jsonl")
    with caplog.at_level(logging.WARNING):
        placed = recorder.rebalance_experts(torch.tensor([[9, 1, 5]]), 4, 1, 1, 2)
    assert tuple(placed.shape) == (1, 4)
    assert "cannot record loads in" in caplog.text
    recorder = make_recorder(policy, tmp_path / "loads.jsonl")
    recorder.rebalance_experts(torch.tensor([[9, 1, 5]]), 4, 1, 1, num_ranks=2)
    assert read_profile(tmp_path / "loads.1x3.jsonl").counts_WLE.tolist() == [[[9, 1, 5]]]


def test_sglangs_side_returns_its_three_tables(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("eplb.runtime.sglang_algorithm._placement_in_force", lambda shape: None)
    algorithm = make_algorithm(solving_policy(hierarchical=False))
    windows = torch.tensor([[[9.0, 1, 5]], [[1, 1, 1]]])
    rows, slots, count = algorithm(windows, 4, 2, None, 1, None)
    assert tuple(rows.shape) == (1, 4)
    assert count.tolist() == [[2, 1, 1]]
    for expert in range(3):
        assert [rows[0, s] for s in slots[0, expert] if s >= 0] == [expert] * count[0, expert]


def test_the_plug_ins_import_no_torch_and_no_solver_that_is_not_asked_for():
    code = (
        "import sys, eplb.runtime.vllm_policy as v, eplb.runtime.sglang_algorithm as s; "
        "v.register(); s.register(); "
        "print([m for m in ('torch', 'vllm', 'sglang', 'scipy', 'ortools') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={}
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("group", ["vllm.general_plugins", "sglang.srt.plugins"])
def test_the_engines_find_the_plug_ins(group):
    (entry,) = (e for e in entry_points(group=group) if e.name == "eplb")
    assert entry.load().__module__.startswith("eplb.runtime.")
