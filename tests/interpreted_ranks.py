"""The exchange over peer memory without GPUs: Triton's interpreter, and files that all map.

It is a module of its own because spawned processes import it by name.
"""

from __future__ import annotations

from math import prod

import ep_ranks
import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb.errors import ServingFailed
from eplb.runtime.ep import peer_buffers

MOST_TOKENS = 20


class MappedFiles:
    """In the place of PeerMemory: a file for each allocation of a process, mapped by all."""

    folder = ""
    allocations = 0

    def __init__(self, group):
        self._group = group
        self._views = {}

    def allocate(self, shape):
        number = MappedFiles.allocations
        MappedFiles.allocations += 1
        own = self._mapped(number, self._group.process, shape)
        own.zero_()
        self._group.barrier()
        self._views = {
            process: self._mapped(number, process, shape)
            for process in range(self._group.num_processes)
            if process != self._group.process
        }
        return own

    def _mapped(self, number, process, shape):
        path = f"{self.folder}/memory{number}-{process}"
        return torch.from_file(path, shared=True, size=prod(shape), dtype=torch.uint8).view(shape)

    def rows_of(self, process):
        return self._views.get(process)

    def close(self):
        self._views = {}


def random_plans(process, num_processes, folder, cases):
    """Random plans under every rule, case by case; each with a fault between two batches."""
    peer_buffers.PeerMemory = MappedFiles
    MappedFiles.folder = folder
    ep_ranks.start(process, num_processes, folder)
    for name, (options, bound, seeds) in cases.items():
        group_options = {k: options[k] for k in ep_ranks.GROUP_OPTIONS if k in options}
        layer_options = {k: options[k] for k in options if k not in ep_ranks.GROUP_OPTIONS}
        group = ep_ranks.make_group(num_processes, folder, name, **group_options)
        for seed in range(seeds):
            check_plan(group, seed, layer_options, bound)
    dist.destroy_process_group()


def check_plan(group, seed, options, bound):
    rng = np.random.default_rng(seed)
    num_experts = int(rng.integers(2, 17))
    top_k = int(rng.integers(1, min(num_experts, 6) + 1))
    split = ep_ranks.SPLITS[seed % len(ep_ranks.SPLITS)]
    plan = ep_ranks.random_plan(rng, group, num_experts, top_k, split=split)
    hidden = options.get("hidden", 16)
    peers = peer_buffers.PeerBuffers(
        group, max_tokens=MOST_TOKENS, hidden_size=hidden, top_k=top_k,
        slots_per_rank=plan.topology.slots_per_rank, num_experts=num_experts,
        payload=options["payload"], micro_batches=options.get("micro_batches", 1),
    )  # fmt: skip
    layer, experts = ep_ranks.build(group, plan, seed, peers=peers, **options)
    dtype = options.get("dtype", torch.float32)
    for step in range(2):
        own = np.random.default_rng([seed, step, group.process])
        num_tokens = int(own.choice([0, 1, 2, 7, MOST_TOKENS]))
        x, topk, weight = ep_ranks.batch(own, num_experts, hidden, top_k, num_tokens)
        layer.word = 10 * seed + group.process
        error = ep_ranks.check_batch(layer, experts, x.to(dtype), topk, weight)
        assert error < bound, (options, seed, step, error)
        assert layer.word_min == 10 * seed
        ep_ranks.assert_nothing_lost(layer, topk, group)
        # A fault on one process is told on all, and the next forward is served.
        spoilt = torch.ones(1, hidden, dtype=dtype)
        spoilt[0, 3] = torch.nan if group.process == 1 else 1.0
        one = topk.new_zeros(1, top_k), weight.new_ones(1, top_k)
        with pytest.raises(ServingFailed, match="process 1 are not finite"):
            _ = ep_ranks.check_batch(layer, experts, spoilt, *one), layer.word_min
        layer.routing.clear()
    peers.close()
