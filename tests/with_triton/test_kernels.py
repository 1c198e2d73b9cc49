"""In Triton's interpreter: kernels are what plain torch gives, which is their meaning."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ep_ranks import LAYER_ID, SPLITS, random_plan

from eplb.replicas import UNIT_BITS
from eplb.runtime.ep import (
    batch_kernel,
    batch_split,
    choice_kernels,
    experts,
    kernels,
    place_kernels,
    places,
    rows,
)
from eplb.runtime.ep.exchange import NO_FAULT
from eplb.runtime.ep.payload import Payload
from eplb.runtime.ep.tables import PlacementTables

# Kernels compute with what is not finite, and numpy under the interpreter says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def tables(seed, split, ranks_per_process=2):
    """Tables of the first of the processes that four ranks on two nodes are on."""
    group = SimpleNamespace(
        num_ranks=4, ranks_per_node=2, num_nodes=2, ranks=range(ranks_per_process),
        ranks_per_process=ranks_per_process, device=torch.device("cpu"),
    )  # fmt: skip
    plan = random_plan(np.random.default_rng(seed), group, 9, 3, split=split)
    return PlacementTables.of_plan(plan, LAYER_ID, group)


@pytest.mark.parametrize("width", [26, 48, 1])
def test_rows_are_gathered(width):
    torch.manual_seed(0)
    wide = torch.randint(256, (50, width + 16), dtype=torch.uint8)
    index, out = torch.randint(50, (70,)), torch.zeros(70, width + 32, dtype=torch.uint8)
    kernels.gather_rows(wide[:, :width], index, out[:, 16 : 16 + width])
    assert torch.equal(out[:, 16 : 16 + width], wide[index, :width])
    assert not out[:, :16].any()
    assert not out[:, 16 + width :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_rows_are_added_up(dtype, is_weighted):
    torch.manual_seed(0)
    values, index = torch.randn(50, 96).to(dtype), torch.randint(-1, 50, (30, 6))
    weight = torch.rand(30, 6) if is_weighted else None
    found = kernels.sum_rows(values, index, weight, torch.float32)
    assert torch.allclose(found, rows.sum_rows(values, index, weight), rtol=1e-5, atol=1e-6)


def test_gates():
    torch.manual_seed(0)
    gate_up = torch.randn(5, 2 * 150)
    assert torch.allclose(kernels.gated_silu(gate_up), experts.gated_silu(gate_up), atol=1e-6)


# Encoding is compared on GPUs only: the interpreter rounds FP8 down to half where the mantissa
# overflows (Triton 3.7.1), and BF16 towards zero.
@pytest.mark.parametrize("hidden", [128, 96, 200])
def test_fp8_is_decoded(hidden):
    torch.manual_seed(0)
    payload = Payload("fp8", hidden)
    bytes_NB = payload.encode(torch.randn(9, hidden) * torch.logspace(-6, 6, 9)[:, None])
    found = kernels.decode_fp8(*payload.fp8_parts(bytes_NB), payload.dtype)
    assert torch.allclose(found, payload.decode(bytes_NB), rtol=2.0**-7)


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_marked(bad):
    x, fault = torch.ones(3, 50), torch.tensor([NO_FAULT])
    x[1, 7] = bad
    kernels.mark_unsound(x, fault, 4)
    assert int(fault) == (NO_FAULT if bad == 0.0 else 4)


@pytest.mark.parametrize(("num_parts", "per_part", "top_k"), [(4, 6, 5), (5, 3, 6), (1, 7, 1)])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_rows_are_placed_and_packed(num_parts, per_part, top_k, num_tokens):
    torch.manual_seed(0)
    slot_TK = torch.randint(-1, num_parts * per_part, (num_tokens, top_k))
    slot_TK = torch.where(slot_TK >= 0, slot_TK + 9, -1)
    weight_TK, bytes_TB = torch.rand(num_tokens, top_k), torch.randint(256, (num_tokens, 26)).byte()
    found = []
    for module in (place_kernels, places):
        placed = module.place_rows(slot_TK, 9, per_part, num_parts)
        packed = torch.zeros(int(placed.rows_P.sum()), 32 + 8 * top_k, dtype=torch.uint8)
        meta = packed[:, 32:]
        module.pack_rows(
            placed, bytes_TB, slot_TK, weight_TK, packed[:, :26],
            meta[:, : 4 * top_k].view(torch.int32), meta[:, 4 * top_k :].view(torch.float32),
        )  # fmt: skip
        found.append([*(getattr(placed, name) for name in placed.__slots__), packed])
    for interpreted, plain in zip(*found, strict=True):
        assert torch.equal(interpreted, plain)


@pytest.mark.parametrize("seed", range(8))
def test_replicas_are_chosen(seed):
    made = tables(seed, SPLITS[seed % 4], 1 + seed % 2)
    random = np.random.default_rng(seed)
    topk_TK = torch.from_numpy(np.argsort(random.random((17, 9)), axis=1)[:, :3].copy())
    topk_TK[3, 1] = -1
    for step in (0, 5, torch.tensor([7])):
        found = choice_kernels.choose_slots(
            topk_TK, made.block, made._edges, made.num_experts, step
        )
        assert torch.equal(found, made.choose_slots(topk_TK, step))


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_is_divided(seed):
    phases = tables(seed, "batch").phases
    count_E = torch.from_numpy(np.random.default_rng(seed).integers(0, 100, 9))
    load_R1 = torch.zeros(phases.num_ranks + 1)
    load_R1.scatter_add_(0, phases.single_E, count_E.float())
    found = batch_kernel.begin_of_replicas(phases, count_E, load_R1)
    expected = batch_split.begin_of_replicas(phases, count_E)
    there = phases.rank_FMX >= 0
    # In parts of a unit; sums are taken in another order.
    unit = 1 << UNIT_BITS
    assert torch.allclose(found[there] / unit, expected[there] / unit, atol=1e-5)
