"""Packing and replication against one-step-at-a-time references."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEVERITIES, loads

from eplb.placement.packing import falling_order, pack_balanced
from eplb.placement.replication import replicate


def pack_one_by_one(weight, num_packs):
    """The description, to the letter: longest first, into the lightest pack with room."""
    size = len(weight) // num_packs
    total, packs = [np.float32(0)] * num_packs, [[] for _ in range(num_packs)]
    for item in sorted(range(len(weight)), key=lambda i: -weight[i]):
        pack = min((p for p in range(num_packs) if len(packs[p]) < size), key=total.__getitem__)
        packs[pack].append(item)
        total[pack] = np.float32(total[pack] + weight[item])
    return [item for pack in packs for item in pack]


@st.composite
def items(draw):
    num_packs, size = draw(st.integers(1, 12)), draw(st.integers(2, 12))
    weight = draw(loads(draw(st.integers(1, 5)), num_packs * size))
    return weight.astype(np.float32), num_packs


@given(items())
def test_packs_as_one_item_at_a_time_does(case):
    weight_XI, num_packs = case
    packed = pack_balanced(weight_XI, falling_order(weight_XI), num_packs)
    assert packed.tolist() == [pack_one_by_one(row, num_packs) for row in weight_XI]


@pytest.mark.parametrize("severity", SEVERITIES)
def test_packs_real_sizes_as_one_item_at_a_time_does(severity):
    @given(loads(3, 288, severity=severity))
    def check(weight):
        weight_XI = weight.astype(np.float32)
        for num_packs in (32, 144):
            packed = pack_balanced(weight_XI, falling_order(weight_XI), num_packs)
            assert packed.tolist() == [pack_one_by_one(row, num_packs) for row in weight_XI]

    check()


def test_one_item_a_pack_keeps_the_order():
    weight_XI = np.array([[3, 9, 1]], np.float32)
    assert pack_balanced(weight_XI, falling_order(weight_XI), 3).tolist() == [[0, 1, 2]]


def test_weightless_items_fill_the_first_pack_first():
    weight_XI = np.zeros((2, 6), np.float32)
    assert (
        pack_balanced(weight_XI, falling_order(weight_XI), 2).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    )


@given(loads(4, 50))
def test_falling_order_is_a_stable_sort(weight):
    weight_XI = weight.astype(np.float32)
    assert np.array_equal(falling_order(weight_XI), np.argsort(-weight_XI, axis=1, kind="stable"))


def replicate_one_by_one(load, num_slots, max_replicas):
    load = load.astype(np.float32)
    count = np.ones(len(load), np.float32)
    experts, replicas = list(range(len(load))), [0] * len(load)
    while len(experts) < num_slots:
        share = np.where(count < max_replicas, load / count, -1)
        best = int(share.argmax())
        experts.append(best)
        replicas.append(int(count[best]))
        count[best] += 1
    return experts, replicas, load / count


@given(loads(3, 9), st.integers(0, 30), st.integers(0, 40))
def test_replicates_the_largest_share(load_XE, num_redundant, spare_cap):
    num_slots = 9 + num_redundant
    max_replicas = -(-num_slots // 9) + spare_cap
    expert_XS, replica_XS, replica_load_XE = replicate(
        load_XE.astype(np.float32), num_slots, max_replicas
    )
    for row, load in enumerate(load_XE):
        experts, replicas, share = replicate_one_by_one(load, num_slots, max_replicas)
        assert expert_XS[row].tolist() == experts
        assert replica_XS[row].tolist() == replicas
        assert replica_load_XE[row].tolist() == share.tolist()
