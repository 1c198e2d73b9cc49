"""The exchange over peer memory without GPUs: Triton's interpreter, and files that all map.

It is a module of its own because spawned processes import it by name.
"""

from __future__ import annotations

from math import prod

import ep_ranks
import torch
import torch.distributed as dist

from eplb.runtime.ep import peer_buffers


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
            ep_ranks.check_over_peers(group, seed, layer_options, bound)
    dist.destroy_process_group()
