"""Fractions of ``weighted`` in plan files: to the last bit, or refused."""

import numpy as np
import pytest

import eplb
from eplb.errors import EplbError, InvalidInput, PlacementInvalid
from eplb.model import MoEModel
from eplb.plan import Plan
from eplb.slots import Placement
from eplb.topology import Topology


def weighted_plan(weights=((0.1 + 0.2, 1.0, 1.0, 0.7), (1e-9, 1.0, 1.0, 1 - 1e-9)), **options):
    model = MoEModel(name="toy", num_experts=3, layer_ids=(3, 10))
    return Plan(
        model=model,
        topology=Topology(num_nodes=1, ranks_per_node=2, slots_per_rank=2),
        split=options.get("split", "weighted"),
        placement=Placement(
            phys_to_log_LS=np.array([[0, 1, 2, 0]] * 2),
            layer_ids=(3, 10),
            num_experts=3,
            split_weights_LS=None if weights is None else np.array(weights),
        ),
    )


@pytest.mark.parametrize("part", [1 / 3, 1e-9, 1e-300, 5e-324, 0.0, 1.0, 0.123456789012345678])
def test_fractions_come_back_to_the_last_bit(tmp_path, part):
    plan = weighted_plan([[part, 1, 1, 1 - part], [1 - part, 1, 1, part]])
    assert plan.placement.split_weights_LS[0, 0] == part
    eplb.write_plan(plan, tmp_path / "plan.yaml")
    again = eplb.read_plan(tmp_path / "plan.yaml")
    assert again == plan
    assert again.digest() == plan.digest()
    found = again.placement.split_weights_LS
    assert found.tobytes() == plan.placement.split_weights_LS.tobytes()


FIRST = "  3: [0.30000000000000004, 1.0, 1.0, 0.7]"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (FIRST, "  3: [0.4, 1.0, 1.0, 0.7]", "add up to 1.1"),
        (FIRST, "  3: [0.3, 1.0, 0.7]", "list of 4 fractions"),
        (FIRST, "  3: 0.3", "list of 4 fractions"),
        (FIRST, "  3: [-0.3, 1.0, 1.0, 1.3]", "slot 0: -0.3 is"),
        (FIRST, "  3: [x, 1.0, 1.0, 0.7]", "slot 0: 'x' is no"),
        (FIRST, "  3: [.nan, 1.0, 1.0, 0.7]", "slot 0: nan is"),
        (FIRST, "  3: [true, 1.0, 1.0, 0.7]", "slot 0: True is"),
        (FIRST, "  4: [0.3, 1.0, 1.0, 0.7]", "must name the layers"),
        (FIRST, "", "must name the layers"),
        ("split: weighted", "split: even", "split even takes no split_weights"),
    ],
)
def test_false_fractions_are_refused(tmp_path, old, new, message):
    path = tmp_path / "plan.yaml"
    eplb.write_plan(weighted_plan(), path)
    text = path.read_text()
    assert old in text
    changed = text.replace(old, new)
    path.write_text(changed)
    with pytest.raises(InvalidInput, match=r"the digest is|JSON cannot express"):
        eplb.read_plan(path)
    path.write_text(changed[: changed.index("digest:")])
    with pytest.warns(UserWarning, match="no digest"), pytest.raises(EplbError, match=message):
        eplb.read_plan(path)


@pytest.mark.filterwarnings("ignore:the plan has no digest")
@pytest.mark.parametrize("value", ["[1, 2]", "text", "3"])
def test_fractions_that_are_no_mapping_are_refused(tmp_path, value):
    path = tmp_path / "plan.yaml"
    eplb.write_plan(weighted_plan(), path)
    text = path.read_text()
    path.write_text(text[: text.index("split_weights:")] + f"split_weights: {value}\n")
    with pytest.raises(InvalidInput, match="split_weights is"):
        eplb.read_plan(path)


def test_fractions_and_rule_have_to_agree():
    with pytest.raises(InvalidInput, match="split weighted needs split_weights"):
        weighted_plan(None)
    with pytest.raises(InvalidInput, match="split even takes no split_weights"):
        weighted_plan(split="even")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[0.5, 1, 1]] * 2, r"shape \[2, 3\] for slots of \[2, 4\]"),
        ([[0.5, 1, 1, 0.4]] * 2, "layer 3: the split weights of expert 0 add up to 0.9"),
        ([[-0.5, 1, 1, 1.5]] * 2, "must be numbers from 0 on"),
        ([[np.nan, 1, 1, 0.5]] * 2, "must be numbers from 0 on"),
    ],
)
def test_placements_check_fractions(weights, message):
    with pytest.raises(PlacementInvalid, match=message):
        weighted_plan(weights)


def test_an_empty_slot_receives_nothing():
    with pytest.raises(PlacementInvalid, match="0 for empty slots"):
        Placement(
            phys_to_log_LS=np.array([[0, -1]]),
            layer_ids=(0,),
            num_experts=1,
            split_weights_LS=np.array([[1.0, 0.5]]),
        )
