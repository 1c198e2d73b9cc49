"""On a GPU: kernels are what plain torch gives, and grouped GEMMs take slots as they lie."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from ep_ranks import assert_rounded  # noqa: E402

from eplb.runtime.ep.expert_slots import ExpertSlots  # noqa: E402
from eplb.runtime.ep.experts import compute_experts, gated_layout, gated_silu  # noqa: E402
from eplb.runtime.ep.payload import Payload  # noqa: E402
from eplb.runtime.ep.places import pack_rows, place_rows  # noqa: E402
from eplb.runtime.ep.reference import relative_error  # noqa: E402
from eplb.runtime.ep.rows import gather_rows, sum_rows  # noqa: E402

DEVICE = "cuda"


@pytest.mark.parametrize(("hidden", "width"), [(7168, 14336), (96, 193), (5, 10), (1, 1)])
def test_rows_are_gathered_and_added_up(hidden, width):
    torch.manual_seed(0)
    rows = torch.randint(256, (50, width + 16), dtype=torch.uint8)[:, :width]
    index = torch.randint(50, (70,))
    wide = torch.zeros(70, width + 32, dtype=torch.uint8, device=DEVICE)
    gather_rows(rows.to(DEVICE), index.to(DEVICE), wide[:, 16 : 16 + width])
    assert torch.equal(wide[:, 16 : 16 + width].cpu(), rows[index])
    assert not wide[:, :16].any()
    assert not wide[:, 16 + width :].any()
    values = torch.randn(50, hidden)
    parts = torch.randint(-1, 50, (30, 6))
    weight = torch.rand(30, 6)
    for dtype in (torch.float32, torch.bfloat16):
        given = values.to(dtype)
        for weights in (None, weight):
            expected = sum_rows(given, parts, weights)
            on_gpu = None if weights is None else weights.to(DEVICE)
            found = sum_rows(given.to(DEVICE), parts.to(DEVICE), on_gpu)
            assert torch.allclose(found.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(sum_rows(values.to(DEVICE)[:0], parts.to(DEVICE).fill_(-1)).cpu(),
                       torch.zeros(30, hidden))  # fmt: skip


@pytest.mark.parametrize(("num_parts", "per_part", "top_k"), [(4, 66, 8), (5, 3, 6), (1, 7, 1)])
@pytest.mark.parametrize("num_tokens", [0, 1, 500])
def test_rows_are_placed_and_packed(num_parts, per_part, top_k, num_tokens):
    torch.manual_seed(0)
    slot_TK = torch.randint(-1, num_parts * per_part, (num_tokens, top_k))
    slot_TK = torch.where(slot_TK >= 0, slot_TK + 9, -1)
    weight_TK, bytes_TB = torch.rand(num_tokens, top_k), torch.randint(256, (num_tokens, 26)).byte()
    found = {}
    for device in ("cpu", DEVICE):
        slots, weights, tokens = (t.to(device) for t in (slot_TK, weight_TK, bytes_TB))
        places = place_rows(slots, 9, per_part, num_parts)
        rows = torch.zeros(int(places.rows_P.sum()), 32 + 8 * top_k, dtype=torch.uint8,
                           device=device)  # fmt: skip
        meta = rows[:, 32:]
        pack_rows(
            places, tokens, slots, weights, rows[:, :26],
            meta[:, : 4 * top_k].view(torch.int32), meta[:, 4 * top_k :].view(torch.float32),
        )  # fmt: skip
        found[device] = [*(getattr(places, name) for name in places.__slots__), rows]
    for there, here in zip(found[DEVICE], found["cpu"], strict=True):
        assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("hidden", [7168, 128, 96, 1000])
def test_fp8_is_encoded_and_decoded(hidden):
    torch.manual_seed(0)
    payload = Payload("fp8", hidden)
    x = torch.randn(40, hidden) * torch.logspace(-6, 6, 40)[:, None]
    x[3] = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype)
        there = payload.encode(given.to(DEVICE))
        assert torch.equal(payload.decode(there).cpu(), payload.decode(there.cpu()))
        for bytes_NB in (there.cpu(), payload.encode(given)):
            assert_rounded(payload, bytes_NB, given.float())


def test_gated_silu():
    torch.manual_seed(0)
    rows = torch.randn(33, 2 * 1500)
    assert torch.allclose(gated_silu(rows.to(DEVICE)).cpu(), gated_silu(rows), atol=1e-6)
    assert gated_silu(rows[:0].to(DEVICE)).shape == (0, 1500)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
@pytest.mark.parametrize("biases", [False, True])
def test_experts_in_slots_are_multiplied_as_one_by_one(dtype, biases):
    torch.manual_seed(0)
    layout = gated_layout(256, 128, dtype, biases=biases)
    assert layout.row_bytes % 256 == 0
    slots = ExpertSlots(layout, 7)
    for slot in range(7):
        slots.load(
            slot,
            {
                name: (torch.rand(shape) if "scale" in name else torch.randn(shape) / 11).to(kind)
                for name, (shape, kind) in layout.tensors.items()
            },
        )
    on_gpu = ExpertSlots(layout, 7, DEVICE)
    on_gpu.rows.copy_(slots.rows)
    assert [slots.checksum(s) for s in range(7)] == [on_gpu.checksum(s) for s in range(7)]
    wide = torch.float32 if dtype == torch.float32 else torch.bfloat16
    # Some slots get nothing.
    slot_P = torch.tensor([0] * 5 + [2] * 300 + [3] + [6] * 40)
    end_S = torch.bincount(slot_P, minlength=7).cumsum(0).int()
    x_PH = torch.randn(len(slot_P), 256).to(wide)
    expected = compute_experts(x_PH.float(), end_S, _as_float(slots), gated_silu)
    found = compute_experts(x_PH.to(DEVICE), end_S.to(DEVICE), on_gpu, gated_silu)
    assert relative_error(found.cpu(), expected) < (1e-5 if dtype == torch.float32 else 2e-2)


def _as_float(slots):
    """The same experts in float32; FP8 keeps its scales."""
    if slots.layout.fields["w13"].dtype.itemsize == 1:
        return slots
    layout = gated_layout(256, 128, torch.float32, biases="b2" in slots.layout.fields)
    wide = ExpertSlots(layout, slots.num_slots)
    for slot in range(slots.num_slots):
        wide.load(slot, {name: slots.tensor(name)[slot].float() for name in layout.fields})
    return wide
