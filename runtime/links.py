"""Measures what one rank can send to its peers, inside its node and to other nodes."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from eplb.runtime.ep.group import EPGroup

__all__ = ["measure_links"]

# Large enough that starting a collective does not count; gloo copies through the host and is slow.
_GPU_BYTES, _CPU_BYTES = 512 << 20, 4 << 20
_REPEATS = 10


def measure_links(group: EPGroup) -> dict[str, int | float]:
    """Return the cluster's counts and bandwidths, as a topology file has them. Collective.

    A rank is a process here. Each sends to the next one of its node, all at once, and then to the
    process at its place in the next node; what counts is the slowest. A bandwidth without two
    processes to measure it is left out.
    """
    per_node = max(group.ranks_per_node // group.ranks_per_process, 1)
    nodes = group.num_processes // per_node
    found: dict[str, int | float] = {"num_nodes": nodes, "ranks_per_node": per_node}
    node, place = divmod(group.process, per_node)
    if per_node > 1:
        there = node * per_node + (place + 1) % per_node
        back = node * per_node + (place - 1) % per_node
        found["intra_node_bytes_per_s"] = _ring(group, there, back)
    if nodes > 1:
        there = (node + 1) % nodes * per_node + place
        back = (node - 1) % nodes * per_node + place
        found["inter_node_bytes_per_s"] = _ring(group, there, back)
    if group.device.type == "cuda":
        found["rank_memory_bytes"] = torch.cuda.get_device_properties(group.device).total_memory
    return found


def _ring(group: EPGroup, there: int, back: int) -> float:
    """Return bytes per second of the slowest process, each sending to ``there``."""
    size = _GPU_BYTES if group.device.type == "cuda" else _CPU_BYTES
    sent = torch.zeros(size, dtype=torch.uint8, device=group.device)
    received = torch.empty_like(sent)
    send_rows = [size if p == there else 0 for p in range(group.num_processes)]
    receive_rows = [size if p == back else 0 for p in range(group.num_processes)]
    spent: list[float] = []
    for _ in range(_REPEATS + 2):
        group.barrier()
        start = time.perf_counter()
        with group.watched("measuring links"):
            dist.all_to_all_single(
                received, sent, receive_rows, send_rows, group=group.process_group
            )
        if group.device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    # The first ones set up connections.
    slowest = torch.tensor(statistics.median(spent[2:]), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group.control)
    return size / float(slowest)
