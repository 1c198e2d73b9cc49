"""On GPUs of one host: the exchange over peer memory gives what the one by collectives gives."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs GPUs", allow_module_level=True)

import torch.distributed as dist  # noqa: E402
from ep_ranks import (  # noqa: E402
    SPLITS,
    assert_nothing_lost,
    batch,
    buffers_for,
    build,
    check_batch,
    check_over_peers,
    drawn,
    make_group,
    random_plan,
    spawn,
)

from eplb.errors import InvalidInput, ServingFailed  # noqa: E402
from eplb.runtime.ep.layer import EPMoELayer  # noqa: E402
from eplb.runtime.ep.reference import reference_output, relative_error  # noqa: E402
from eplb.runtime.manager import PlacementManager  # noqa: E402

PROCESSES = min(torch.cuda.device_count(), 4)
NARROW = {"payload": "fp32", "hidden": 64, "inner": 32}
WIDE = {"hidden": 512, "inner": 256, "dtype": torch.bfloat16}
CASES = {
    "fp32": (NARROW, 1e-5),
    "padded": (NARROW | {"padded": True}, 1e-5),
    "micro-batches": (NARROW | {"micro_batches": 2}, 1e-5),
    "bf16": (WIDE | {"payload": "bf16"}, 1.5e-2),
    "fp8": (WIDE | {"payload": "fp8", "padded": True, "micro_batches": 2}, 1.5e-2),
}


def start(process, folder, **options):
    device = torch.device("cuda", process)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/store", rank=process, world_size=PROCESSES,
        timeout=timedelta(seconds=60), device_id=device,
    )  # fmt: skip
    return make_group(PROCESSES, folder, device=device, **options)


def cases(process, _, folder, num_ranks):
    group = start(process, folder, num_ranks=num_ranks)
    for options, bound in CASES.values():
        for seed in range(8):
            check_over_peers(group, seed, options, bound)
    group.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks_per_process", [1, 2])
def test_random_plans(tmp_path, ranks_per_process):
    spawn(cases, PROCESSES, tmp_path, ranks_per_process * PROCESSES)


def same_bits(process, _, folder):
    group = start(process, folder, num_ranks=2 * PROCESSES)
    plan = random_plan(np.random.default_rng(0), group, 16, 6, split="nearest")
    options = WIDE | {"payload": "bf16"}
    peers = buffers_for(group, plan, 512, options)
    over_peers, experts = build(group, plan, 0, peers=peers, **options)
    again, _ = build(group, plan, 0, peers=peers, **options)
    by_collectives, _ = build(group, plan, 0, **options)
    for step in range(20):
        x, topk, weight = drawn(group, plan, 512, torch.bfloat16, step)
        found = []
        for layer in (over_peers, again, by_collectives):
            layer.routing.append((topk, weight))
            found.append(layer(x))
        # Wherever pairs come to lie among those of their slot.
        assert torch.equal(found[0], found[1])
        # By collectives sums are rounded otherwise, in float32.
        assert relative_error(found[0], found[2]) < 4e-3
        assert over_peers.received_rows == by_collectives.received_rows
        assert over_peers.received_pairs == by_collectives.received_pairs
    del experts
    group.barrier()
    dist.destroy_process_group()


def test_it_gives_the_same_bits_each_time_and_what_collectives_give(tmp_path):
    spawn(same_bits, PROCESSES, tmp_path)


def captured(process, _, folder):
    group = start(process, folder, num_ranks=2 * PROCESSES)
    for split in SPLITS:
        plan = random_plan(np.random.default_rng(1), group, 12, 4, split=split)
        options = WIDE | {"payload": "bf16", "padded": True}
        peers = buffers_for(group, plan, 512, options)
        layer, experts = build(group, plan, 0, peers=peers, **options)
        held = torch.zeros(20, 512, device=group.device, dtype=torch.bfloat16)
        topk = torch.zeros(20, 4, dtype=torch.int64, device=group.device)
        weight = torch.zeros(20, 4, device=group.device)
        layer.router = lambda _, topk=topk, weight=weight: (topk, weight)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            layer(held)
            stream.synchronize()
            group.barrier()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                y = layer(held)
        group.barrier()
        for step in range(6):
            own = np.random.default_rng([step, process])
            x, ids, parts = batch(own, 12, 512, 4, 20)
            for into, new in ((held, x), (topk, ids), (weight, parts)):
                into.copy_(new)
            layer.word = step + process
            graph.replay()
            assert layer.word_min == step
            assert_nothing_lost(layer, topk, group)
            assert relative_error(y, reference_output(held, topk, weight, experts)) < 1.5e-2
        if split != "batch":
            # Swapped to another placement, under the same graph.
            turned = random_plan(
                np.random.default_rng(2), group, 12, 4, split=split,
                extra=plan.topology.slots_per_rank - -(-12 // group.num_ranks),
            )  # fmt: skip
            manager = PlacementManager(group, spare_rows=layer.slots.num_slots)
            manager.attach([layer], plan)
            manager.begin_swap(turned)
            result = None
            while result is None:
                result = manager.step()
                graph.replay()
                assert_nothing_lost(layer, topk, group)
                assert relative_error(y, reference_output(held, topk, weight, experts)) < 1.5e-2
            assert result.error is None
            assert layer.tables.digest == manager.plan.digest() == turned.digest()
            manager.close()
        torch.cuda.synchronize()
        del graph
        peers.close()
    group.barrier()
    dist.destroy_process_group()


def test_a_captured_forward_serves_other_tokens_and_placements(tmp_path):
    spawn(captured, PROCESSES, tmp_path)


def stalls(process, _, folder):
    group = start(process, folder, timeout_s=3.0)
    plan = random_plan(np.random.default_rng(0), group, 6, 2)
    peers = buffers_for(group, plan, 64, NARROW)
    layer, experts = build(group, plan, 0, peers=peers, **NARROW)
    x, topk, weight = drawn(group, plan, 64, torch.float32, 0)
    assert check_batch(layer, experts, x, topk, weight) < 1e-5
    with pytest.raises(InvalidInput, match="tokens in a batch, and PeerBuffers has room for"):
        check_batch(layer, experts, *(t.new_zeros(30, *t.shape[1:]) for t in (x, topk, weight)))
    with pytest.raises(InvalidInput, match="the layer's payload is bf16 and the PeerBuffers' fp32"):
        EPMoELayer(group, layer.tables, layer.slots, layer.router, hidden_size=64, peers=peers)
    layer.routing.clear()
    group.barrier()
    if process == PROCESSES - 1:
        time.sleep(12)
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(ServingFailed, match=rf"counts of layer 3, .* process {PROCESSES - 1}"):
        check_batch(layer, experts, x, topk, weight)
    # The kernel that waited has ended, so the device is free for what comes next.
    torch.cuda.synchronize()
    (Path(folder) / f"waited{process}").write_text(str(time.monotonic() - began))
    os._exit(0)


@pytest.mark.skipif(PROCESSES < 2, reason="needs two GPUs")
def test_a_stalled_peer_is_named_and_the_wait_on_the_device_ends(tmp_path):
    spawn(stalls, PROCESSES, tmp_path)
    waited = [float(path.read_text()) for path in tmp_path.glob("waited*")]
    assert len(waited) == PROCESSES - 1
    assert max(waited) < 9
