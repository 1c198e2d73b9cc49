"""What spawned processes do in the tests of the expert-parallel layer.

It is a module of its own because spawned processes import it by name.
"""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from eplb.errors import InvalidInput, ServingFailed
from eplb.model import MoEModel
from eplb.plan import Plan
from eplb.runtime.ep.agreement import agree_on_plan
from eplb.runtime.ep.expert_slots import ExpertSlots
from eplb.runtime.ep.experts import gated_layout
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.layer import EPMoELayer
from eplb.runtime.ep.peer_buffers import PeerBuffers
from eplb.runtime.ep.reference import reference_output, relative_error
from eplb.runtime.ep.tables import PlacementTables
from eplb.slots import Placement
from eplb.topology import Topology

LAYER_ID = 3
SPLITS = ("even", "nearest", "weighted", "batch")
MOST_TOKENS = 20


def start(process: int, num_processes: int, folder: str, timeout_s: float = 60.0) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=num_processes,
        timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip
    torch.set_num_threads(1)


def make_group(num_processes: int, folder: str, name: str = "calls", **options) -> EPGroup:
    store = dist.PrefixStore(name, dist.FileStore(f"{folder}/calls", num_processes))
    return EPGroup(dist.group.WORLD, store, **options)


def alone(folder: str) -> EPGroup:
    """A group of this process only, with four ranks."""
    process = dist.get_rank()
    own = dist.new_group([process], use_local_synchronization=True)
    return EPGroup(own, dist.FileStore(f"{folder}/alone{process}", 1), num_ranks=4)


def _entry(process, work, num_processes, folder, arguments):
    try:
        work(process, num_processes, folder, *arguments)
    except BaseException:  # noqa: BLE001
        (Path(folder) / f"error{process}").write_text(traceback.format_exc())
        # Other processes wait for this one in collectives; end it at once.
        os._exit(1)


def spawn(work, num_processes, folder, *arguments):
    """Run ``work(process, num_processes, folder, *arguments)`` and show the first error."""
    try:
        multiprocessing.spawn(
            _entry, (work, num_processes, str(folder), arguments), nprocs=num_processes
        )
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException):
        errors = sorted(Path(folder).glob("error*"), key=lambda path: path.stat().st_mtime)
        raise AssertionError("\n".join(path.read_text() for path in errors)) from None


def random_plan(rng, group, num_experts, top_k=None, *, split="even", extra=None):
    """A plan of one layer: every expert somewhere, the other slots filled, repeated or empty."""
    least = -(-num_experts // group.num_ranks)
    slots_per_rank = least + (int(rng.integers(0, 3)) if extra is None else extra)
    num_slots = slots_per_rank * group.num_ranks
    row = np.full(num_slots, -1)
    order = rng.permutation(num_slots)
    row[order[:num_experts]] = rng.permutation(num_experts)
    spare = order[num_experts:]
    row[spare] = rng.integers(-1, num_experts, len(spare))
    weights = None
    if split == "weighted":
        weights = np.where(row >= 0, rng.exponential(size=num_slots), 0.0)
        total = np.bincount(row[row >= 0], weights[row >= 0], minlength=num_experts)
        weights = np.where(row >= 0, weights / total[np.maximum(row, 0)], 0.0)[None]
    model = MoEModel(name="toy", num_experts=num_experts, layer_ids=(LAYER_ID,), top_k=top_k)
    return Plan(
        model=model,
        topology=Topology(
            num_nodes=group.num_nodes,
            ranks_per_node=group.ranks_per_node,
            slots_per_rank=slots_per_rank,
        ),
        placement=Placement(
            phys_to_log_LS=row[None], layer_ids=(LAYER_ID,), num_experts=num_experts,
            split_weights_LS=weights,
        ),
        split=split,
    )  # fmt: skip


def make_experts(layout, seed, num_experts):
    """The tensors of all logical experts, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (shape, dtype) in layout.tensors.items():
        value = torch.randn(num_experts, *shape, generator=generator) / shape[-1] ** 0.5
        if name.endswith("_scale"):
            value = value.abs() + 0.1
        tensors[name] = value.to(dtype)
    return tensors


def fill(slots, phys_to_log_S, first_slot, experts):
    """Load the experts that a placement puts into this process' slots."""
    for slot in range(slots.num_slots):
        held = int(phys_to_log_S[first_slot + slot])
        if held >= 0:
            slots.load(slot, {name: every[held] for name, every in experts.items()})


def build(group, plan, seed, *, hidden=16, inner=8, dtype=torch.float32, biases=False, **more):
    """A layer with random experts, whose router is given by ``layer.routing``."""
    layout = gated_layout(hidden, inner, dtype, biases=biases)
    tables = PlacementTables.of_plan(plan, LAYER_ID, group)
    spr = plan.topology.slots_per_rank
    slots = ExpertSlots(layout, spr * group.ranks_per_process, group.device)
    made = make_experts(layout, seed, plan.model.num_experts)
    experts = {name: every.to(group.device) for name, every in made.items()}
    fill(slots, tables.phys_to_log_S, group.first_rank * spr, experts)
    queue = []
    layer = EPMoELayer(group, tables, slots, lambda _: queue.pop(0), hidden_size=hidden, **more)
    layer.routing = queue
    return layer, experts


def batch(rng, num_experts, hidden, top_k, num_tokens):
    """Tokens with distinct experts each, some of them none, and weights."""
    topk = np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :top_k]
    topk = np.where(rng.random(topk.shape) < 0.1, -1, topk)
    return (
        torch.from_numpy(rng.standard_normal((num_tokens, hidden)).astype(np.float32)),
        torch.from_numpy(topk),
        torch.from_numpy(rng.random((num_tokens, top_k)).astype(np.float32)),
    )


def check_batch(layer, experts, x, topk, weight):
    """One forward beside the reference; returns the error."""
    pieces = layer.micro_batches if layer.micro_batches == 1 or len(x) > 1 else 1
    layer.routing += list(zip(topk.chunk(pieces), weight.chunk(pieces), strict=True)) or [
        (topk, weight)
    ]
    while len(layer.routing) < layer.micro_batches:
        layer.routing.append((topk[:0], weight[:0]))
    y = layer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    # What travels as FP8 has been rounded; all else is compared to the tightness of BF16.
    sent = layer.payload.decode(layer.payload.encode(x))
    return relative_error(y, reference_output(sent, topk, weight, experts))


def assert_nothing_lost(layer, topk, group):
    """Every token-expert pair arrived, once."""
    pairs = torch.tensor([int((topk >= 0).sum()), sum(layer.received_pairs)])
    dist.all_reduce(pairs, group=group.control)
    assert pairs[0] == pairs[1], pairs


def assert_rounded(payload, bytes_NB, x_NH):
    """FP8 keeps three bits of a mantissa, and nothing below 2**-9 of a block's largest / 448."""
    blocks = torch.nn.functional.pad(x_NH, (0, -x_NH.shape[1] % 128)).view(len(x_NH), -1, 128)
    scale = (blocks.abs().amax(2) / 448).repeat_interleave(128, 1)[:, : x_NH.shape[1]]
    off = (payload.decode(bytes_NB).float() - x_NH).abs()
    # Behind it comes the rounding to BF16.
    assert (off <= x_NH.abs() * (1 / 16 + 1 / 256) + scale * 2.0**-9).all()


GROUP_OPTIONS = ("num_ranks", "ranks_per_node", "nodes")


def random_plans(process, num_processes, folder, cases):
    """Random plans under every rule, each with two batches; case by case."""
    start(process, num_processes, folder)
    worst = {}
    for name, (options, seeds) in cases.items():
        group_options = {key: options[key] for key in GROUP_OPTIONS if key in options}
        layer_options = {key: options[key] for key in options if key not in GROUP_OPTIONS}
        if name == "alone":
            group = alone(folder)
        else:
            group = make_group(num_processes, folder, name, **group_options)
        worst[name] = max(random_plan_error(group, seed, layer_options) for seed in seeds)
    if process == 0:
        torch.save(worst, f"{folder}/worst")
    dist.destroy_process_group()


def seeded_plan(group, seed):
    """A random plan of a random model; the split rules in turn."""
    rng = np.random.default_rng(seed)
    num_experts = int(rng.integers(2, 17))
    top_k = int(rng.integers(1, min(num_experts, 6) + 1))
    return random_plan(rng, group, num_experts, top_k, split=SPLITS[seed % len(SPLITS)])


def random_plan_error(group, seed, options):
    plan = seeded_plan(group, seed)
    num_experts, top_k = plan.model.num_experts, plan.model.top_k
    layer, experts = build(group, plan, seed, **options)
    hidden = options.get("hidden", 16)
    worst = 0.0
    for step in range(2):
        own = np.random.default_rng([seed, step, group.process])
        num_tokens = int(own.choice([0, 1, 2, 7, 20]))
        x, topk, weight = batch(own, num_experts, hidden, top_k, num_tokens)
        if layer.payload.kind != "fp32":
            x = x.bfloat16()
        layer.word = 10 * seed + group.process
        worst = max(worst, check_batch(layer, experts, x, topk, weight))
        assert layer.word_min == 10 * seed
        assert_nothing_lost(layer, topk, group)
    return agreed_maximum(worst, group)


def buffers_for(group, plan, hidden, options):
    """Peer memory with room for :func:`drawn` batches."""
    return PeerBuffers(
        group, max_tokens=MOST_TOKENS, hidden_size=hidden, top_k=plan.model.top_k,
        slots_per_rank=plan.topology.slots_per_rank, num_experts=plan.model.num_experts,
        payload=options["payload"], micro_batches=options.get("micro_batches", 1),
    )  # fmt: skip


def drawn(group, plan, hidden, dtype, *seed, most=MOST_TOKENS):
    """A batch of this process, on its device."""
    own = np.random.default_rng([*seed, group.process])
    num_tokens = int(own.choice([n for n in (0, 1, 2, 7, 20) if n <= most]))
    x, topk, weight = batch(own, plan.model.num_experts, hidden, plan.model.top_k, num_tokens)
    return x.to(group.device, dtype), topk.to(group.device), weight.to(group.device)


def check_over_peers(group, seed, options, bound):
    """Two batches under a random plan over peer memory, each followed by a fault."""
    plan = seeded_plan(group, seed)
    hidden, dtype = options.get("hidden", 16), options.get("dtype", torch.float32)
    peers = buffers_for(group, plan, hidden, options)
    layer, experts = build(group, plan, seed, peers=peers, **options)
    for step in range(2):
        x, topk, weight = drawn(group, plan, hidden, dtype, seed, step)
        layer.word = 10 * seed + group.process
        error = check_batch(layer, experts, x, topk, weight)
        assert error < bound, (options, seed, step, error)
        assert layer.word_min == 10 * seed
        assert_nothing_lost(layer, topk, group)
        # A fault on one process is told on all, and the next forward is served.
        spoilt = torch.ones(1, hidden, device=group.device, dtype=dtype)
        spoilt[0, 3] = torch.nan if group.process == 0 else 1.0
        one = topk.new_zeros(1, plan.model.top_k), weight.new_ones(1, plan.model.top_k)
        with pytest.raises(ServingFailed, match="process 0 are not finite"):
            _ = check_batch(layer, experts, spoilt, *one), layer.word_min
        layer.routing.clear()
    peers.close()


def agreed_maximum(value, group):
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group.control)
    return float(tensor)


def faults(process, num_processes, folder):
    """What goes wrong before and while serving; the last of three processes stalls at the end."""
    start(process, num_processes, folder, timeout_s=3.0)
    group = make_group(num_processes, folder, timeout_s=3.0)
    rng = np.random.default_rng(0)
    plan = random_plan(rng, group, 6)
    layer, experts = build(group, plan, 0, payload="fp32")
    x, topk, weight = batch(np.random.default_rng(process), 6, 16, 2, 5)

    # Plans that differ, and one that is for another model: all processes raise the same.
    agree_on_plan(plan, plan.model, group)
    other = random_plan(np.random.default_rng(1 + process // 2), group, 6, extra=1)
    with pytest.raises(InvalidInput, match=r"different plans: .* on \[0, 1\]; .* on \[2\]"):
        agree_on_plan(other, other.model, group)
    served = replace(plan.model, revision="b")
    planned = replace(plan, model=replace(plan.model, revision="a" if process == 1 else "b"))
    with pytest.raises(InvalidInput, match=r"process 1: .* revision is a, and b is served"):
        agree_on_plan(planned, served, group)

    # Numbers that are none, on one process: all raise, and serve on.
    for bad in (torch.nan, torch.inf):
        spoilt = x.clone()
        if process == 1:
            spoilt[3, 5] = bad
        with pytest.raises(ServingFailed, match="process 1 are not finite"):
            check_batch(layer, experts, spoilt, topk, weight)
        assert check_batch(layer, experts, x, topk, weight) < 1e-5

    # Other tables change nothing in the output, and other layers' are refused.
    calls = []
    layer.before_step = lambda: calls.append(layer.step)
    turned = random_plan(np.random.default_rng(9), group, 6, extra=plan.topology.slots_per_rank - 2)
    tables = PlacementTables.of_plan(turned, LAYER_ID, group)
    address = layer.tables.block.data_ptr()
    fill(layer.slots, tables.phys_to_log_S, group.first_rank * tables.slots_per_rank, experts)
    layer.install(tables)
    assert check_batch(layer, experts, x, topk, weight) < 1e-5
    assert layer.tables.block.data_ptr() == address
    assert layer.tables.digest == turned.digest()
    assert calls == [layer.step - 1]
    wider = random_plan(np.random.default_rng(9), group, 6, extra=5)
    with pytest.raises(InvalidInput, match="cannot replace those of layer 3"):
        layer.install(PlacementTables.of_plan(wider, LAYER_ID, group))
    assert layer.tables.digest == turned.digest()

    # One stays away: the others say so, and who it is.
    dist.barrier()
    if process == 2:
        time.sleep(9)
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(ServingFailed, match=r"counts of layer 3, .*no word from process 2"):
        check_batch(layer, experts, x, topk, weight)
    (Path(folder) / f"waited{process}").write_text(str(time.monotonic() - began))
    os._exit(0)


def refuse(group: EPGroup, _: object) -> dict[str, int]:
    """Raise on one of two processes, while the other one waits."""
    if group.process == 1:
        raise InvalidInput("process 1 says no")
    group.barrier()
    return {}
