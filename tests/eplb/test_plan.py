from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import strategies as own
from hypothesis import assume, given
from hypothesis import strategies as st

from eplb.errors import EplbError, InvalidInput, PlacementInvalid
from eplb.model import MoEModel, model_preset
from eplb.plan import Plan, Quality, content_digest
from eplb.slots import Placement, initial_placement
from eplb.topology import Topology

TOPOLOGY = Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=2)
QUALITY = Quality(imbalance_mean=1.2, imbalance_worst=1.3, bound_mean=1.0, gap_mean=0.2)


def toy(**more: Any) -> Plan:
    parts = {"placement": initial_placement((3, 4, 10), 3, 4), "topology": TOPOLOGY, **more}
    return own.plan_of(**parts)


def test_the_digest_never_changes() -> None:
    """Ranks agree on it before they load a plan, and files carry it."""
    digest = "sha256:16290294af92cc6321f08662e18d1d15ea415a5267730b8c99a0c2751eefe0fa"
    assert toy().digest() == digest


@given(own.plans())
def test_the_digest_ignores_quality_and_provenance(plan: Plan) -> None:
    other = replace(plan, quality=QUALITY, provenance={"seed": 1})
    assert other.digest() == plan.digest()
    assert other.content() == plan.content()


@given(own.plans(), st.randoms(use_true_random=False))
def test_the_digest_does_not_depend_on_the_order_of_keys(plan: Plan, random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        items = [(key, shuffled(inner)) for key, inner in value.items()]
        random.shuffle(items)
        return dict(items)

    assert content_digest(shuffled(plan.content())) == plan.digest()


@given(own.plans(), st.data())
def test_the_digest_changes_with_any_slot(plan: Plan, data: Any) -> None:
    rows = plan.placement.phys_to_log_LS.copy()
    cell = tuple(data.draw(st.integers(0, n - 1)) for n in rows.shape)
    rows[cell] = data.draw(st.integers(-1, plan.model.num_experts - 1))
    assume(rows[cell] != plan.placement.phys_to_log_LS[cell])
    try:
        placement = replace(plan.placement, phys_to_log_LS=rows)
    except PlacementInvalid:
        assume(False)
    before = plan.digest()
    assert replace(plan, placement=placement).digest() != before == plan.digest()


@pytest.mark.parametrize(
    "other",
    [
        toy(split="nearest"),
        toy(statistic="worst"),
        toy(topology=replace(TOPOLOGY, ranks_per_node=4, slots_per_rank=1)),
        toy(topology=replace(TOPOLOGY, num_nodes=2, ranks_per_node=1)),
        toy(placement=initial_placement((3, 4, 11), 3, 4)),
        replace(toy(), model=replace(toy().model, name="other")),
        replace(toy(), model=replace(toy().model, revision="abc")),
        replace(toy(), model=replace(toy().model, num_groups=3)),
    ],
)
def test_the_digest_covers_what_a_plan_is_for(other: Plan) -> None:
    assert other.digest() != toy().digest()


def test_rows_of_two_layers_exchanged_are_another_plan() -> None:
    rows = [[0, 1, 2, 0], [0, 1, 2, 1]]
    digests = {
        toy(
            placement=Placement(phys_to_log_LS=np.array(order), layer_ids=(2, 10), num_experts=3)
        ).digest()
        for order in (rows, rows[::-1])
    }
    assert len(digests) == 2


def test_a_plan_of_a_layer_twice_is_refused_or_its_digest_covers_both() -> None:
    """Rows of layers are a mapping in the file: one of the two would be lost without a word."""

    def twice(first: list[int]) -> str:
        rows = np.array([first, [0, 1, 2, 0]])
        placement = Placement(phys_to_log_LS=rows, layer_ids=(3, 3), num_experts=3)
        return toy(placement=placement).digest()

    try:
        digests = {twice([0, 1, 2, 1]), twice([0, 1, 2, 2])}
    except EplbError:
        return
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"topology": replace(TOPOLOGY, slots_per_rank=3)},
            PlacementInvalid,
            "4 slots and the topology 6",
        ),
        ({"model": MoEModel(name="m", num_experts=4, layer_ids=(3, 4, 10))}, InvalidInput, "m 4"),
        (
            {"model": MoEModel(name="m", num_experts=3, layer_ids=(3, 4))},
            InvalidInput,
            "same layer",
        ),
        ({"split": "nearst"}, InvalidInput, "unknown split rule.*did you mean 'nearest'"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        replace(toy(), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "num_experts must be a whole number of at least 1, got 0"),
        ({"num_experts": 2.0}, "num_experts must be a whole number"),
        ({"num_experts": True}, "num_experts must be a whole number"),
        ({"top_k": 9}, r"top_k \(9\) must not exceed num_experts \(8\)"),
        ({"num_groups": 3}, r"num_experts \(8\) must be divisible by num_groups \(3\)"),
        ({"groups_per_token": 5, "num_groups": 4}, r"groups_per_token \(5\) must not exceed"),
    ],
)
def test_a_model_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        MoEModel(**{"name": "m", "num_experts": 8, "layer_ids": (0,), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_nodes": 0}, "num_nodes must be a whole number of at least 1, got 0"),
        ({"slots_per_rank": 1.5}, "slots_per_rank must be a whole number"),
        ({"ranks_per_node": 1 << 20}, "2097152 slots, over the limit"),
        ({"intra_node_bytes_per_s": 0}, "intra_node_bytes_per_s must be a positive number"),
        (
            {"inter_node_bytes_per_s": float("nan")},
            "inter_node_bytes_per_s must be a positive number",
        ),
    ],
)
def test_a_topology_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        replace(TOPOLOGY, **change)


def test_deepseek_v3_is_the_reference_of_the_design() -> None:
    model = model_preset("deepseek-v3")
    assert (len(model.layer_ids), model.num_experts, model.top_k) == (58, 256, 8)
    assert model.expert_bytes == 44040192
