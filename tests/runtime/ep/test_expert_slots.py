"""Rows of bytes: what is put in comes out, and only whole experts go in."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from eplb.errors import InvalidInput  # noqa: E402
from eplb.runtime.ep.expert_slots import ExpertLayout, ExpertSlots  # noqa: E402

LAYOUT = ExpertLayout(
    {
        "w13": ((6, 5), torch.bfloat16),
        "w13_scale": ((1, 1), torch.float32),
        "w2": ((5, 3), torch.float8_e4m3fn),
        "b2": ((5,), torch.float32),
    }
)


def expert(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, (shape, dtype) in LAYOUT.tensors.items()
    }


def test_rows_hold_every_tensor_at_an_aligned_place():
    assert LAYOUT.row_bytes == 4 * 256
    assert [field.offset_bytes for field in LAYOUT.fields.values()] == [0, 256, 512, 768]
    slots = ExpertSlots(LAYOUT, 3)
    experts = [expert(seed) for seed in range(3)]
    for slot, tensors in enumerate(experts):
        slots.load(slot, tensors)
    for name in LAYOUT.fields:
        for slot in range(3):
            assert torch.equal(slots.tensor(name)[slot].float(), experts[slot][name].float())
    # A row moves as bytes, with all that belongs to it.
    slots.rows[0].copy_(slots.rows[2])
    for name in LAYOUT.fields:
        assert torch.equal(slots.tensor(name)[0].float(), experts[2][name].float())
    assert slots.checksum(0) == slots.checksum(2) != slots.checksum(1)


def test_checksums_see_a_flipped_bit_and_exchanged_words():
    slots = ExpertSlots(LAYOUT, 1)
    slots.load(0, expert(0))
    before = slots.checksum(0)
    slots.rows[0, 3] ^= 1
    assert slots.checksum(0) != before
    slots.rows[0, 3] ^= 1
    words = slots.rows[0].view(torch.int32)
    words[:2] = words[:2].flip(0)
    assert slots.checksum(0) != before


def test_parts_share_the_memory():
    slots = ExpertSlots(LAYOUT, 3)
    part = slots.part(1, 2)
    part.load(0, expert(4))
    assert slots.checksum(1) == part.checksum(0) != 0
    assert torch.equal(slots.tensor("w13")[1], part.tensor("w13")[0])
    with pytest.raises(InvalidInput, match="slot 2 is not"):
        part.checksum(2)


def test_digests_tell_layouts_apart():
    other = ExpertLayout({**LAYOUT.tensors, "b2": ((6,), torch.float32)})
    turned = ExpertLayout(dict(reversed(LAYOUT.tensors.items())))
    assert len({layout.digest() for layout in (LAYOUT, other, turned)}) == 3
    assert turned != LAYOUT == ExpertLayout(dict(LAYOUT.tensors))


def test_parts_of_an_expert_are_refused_and_change_nothing():
    slots = ExpertSlots(LAYOUT, 2)
    whole = expert(1)
    without = {name: value for name, value in whole.items() if name != "w13_scale"}
    with pytest.raises(InvalidInput, match=r"missing \['w13_scale'\]"):
        slots.load(0, without)
    with pytest.raises(InvalidInput, match=r"'b2' must be torch.float32 of \[5\]"):
        slots.load(0, {**whole, "b2": torch.zeros(4)})
    with pytest.raises(InvalidInput, match="slot 2 is not on this process"):
        slots.load(2, whole)
    assert not slots.rows.any()
    with pytest.raises(InvalidInput, match="no tensor 'w1'"):
        slots.tensor("w1")
    with pytest.raises(InvalidInput, match="at least one tensor"):
        ExpertLayout({})
    with pytest.raises(InvalidInput, match="sizes from 1 on"):
        ExpertLayout({"w": ((0, 3), torch.float32)})
