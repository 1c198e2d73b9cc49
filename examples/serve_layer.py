"""Serve a mixture-of-experts layer, record its loads, plan for them, and serve under the plan.

    torchrun --nproc-per-node 4 examples/serve_layer.py                  # CPU, gloo
    torchrun --nproc-per-node 8 examples/serve_layer.py --hidden 7168    # GPUs, NCCL

The router has favourites, as trained ones do. It starts on a placement without replicas, records
some steps with :class:`eplb.profiles.recorder.Recorder`, plans from the recording on the first
process, and serves on while :class:`eplb.runtime.manager.PlacementManager` puts the plan in force.
Outputs stay what they were.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from eplb.model import MoEModel
from eplb.placement.solve import solve
from eplb.plan import Plan
from eplb.problem import Problem
from eplb.profiles import read_profile
from eplb.profiles.recorder import Recorder
from eplb.runtime.ep.expert_slots import ExpertSlots
from eplb.runtime.ep.experts import gated_layout
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.layer import EPMoELayer
from eplb.runtime.ep.router import SigmoidRouter
from eplb.runtime.ep.tables import PlacementTables
from eplb.runtime.manager import PlacementManager
from eplb.slots import Placement
from eplb.topology import Topology

LAYER_ID = 3
NUM_EXPERTS, TOP_K = 64, 6
REDUNDANT = 8
STEPS = 10


def build(group: EPGroup, plan: Plan, hidden: int) -> EPMoELayer:
    """Return the layer under a first plan, with random experts that are alike everywhere."""
    device = group.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layout = gated_layout(hidden, hidden // 4, dtype)
    tables = PlacementTables.of_plan(plan, LAYER_ID, group)
    per_rank = plan.topology.slots_per_rank
    slots = ExpertSlots(layout, per_rank * group.ranks_per_process, device)
    for slot in range(slots.num_slots):
        expert = int(tables.phys_to_log_S[group.first_rank * per_rank + slot])
        if expert >= 0:
            random = torch.Generator().manual_seed(expert)
            slots.load(
                slot,
                {
                    name: torch.randn(shape, generator=random).to(kind) / shape[-1] ** 0.5
                    for name, (shape, kind) in layout.tensors.items()
                },
            )
    router = SigmoidRouter(hidden, NUM_EXPERTS, TOP_K, num_groups=8, groups_per_token=4)
    random = torch.Generator().manual_seed(0)
    router.weight.copy_(torch.randn(router.weight.shape, generator=random) / hidden**0.5)
    # Favourites: a bias that no training has balanced.
    router.bias.copy_(0.2 * torch.randn(router.bias.shape, generator=random))
    payload = "bf16" if device.type == "cuda" else "fp32"
    return EPMoELayer(group, tables, slots, router.to(device), hidden_size=hidden, payload=payload)


def first_plan(group: EPGroup) -> Plan:
    """Return experts in order over the ranks, and slots left empty for replicas."""
    spare = -(-(NUM_EXPERTS + REDUNDANT) // group.num_ranks)
    slots = np.full((group.num_ranks, spare), -1)
    for rank, experts in enumerate(np.array_split(np.arange(NUM_EXPERTS), group.num_ranks)):
        slots[rank, : len(experts)] = experts
    return Plan(
        model=MoEModel(name="example", num_experts=NUM_EXPERTS, layer_ids=(LAYER_ID,),
                       top_k=TOP_K, num_groups=8, groups_per_token=4),
        topology=Topology(num_nodes=group.num_nodes, ranks_per_node=group.ranks_per_node,
                          slots_per_rank=spare),
        placement=Placement(phys_to_log_LS=slots.reshape(1, -1), layer_ids=(LAYER_ID,),
                            num_experts=NUM_EXPERTS),
    )  # fmt: skip


def serve(layer: EPMoELayer, x: torch.Tensor, recorder: Recorder | None = None) -> float:
    """Run some steps and return the imbalance of rows, largest / mean rank."""
    layer.recorder = recorder
    rows = torch.zeros(layer.group.num_ranks)
    for _ in range(STEPS):
        layer(x)
        if recorder is not None:
            recorder.step()
        rows[layer.group.ranks.start : layer.group.ranks.stop] += torch.tensor(
            layer.received_pairs, dtype=torch.float32
        )
    dist.all_reduce(rows, group=layer.group.control)
    return float(rows.max() / rows.mean())


def swap(layer: EPMoELayer, old: Plan, new: Plan, x: torch.Tensor) -> int:
    """Serve until the new plan is in force; returns how many steps that took."""
    manager = PlacementManager(layer.group, spare_rows=layer.slots.num_slots)
    manager.attach([layer], old)
    manager.begin_swap(new)
    steps, result = 0, None
    while result is None:
        result = manager.step()
        layer(x)
        steps += 1
    manager.close()
    if result.error is not None:
        raise result.error
    return steps


def main() -> None:
    """Serve, record, plan, serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a process")
    arguments = parser.parse_args()
    group = EPGroup.from_environment()
    plan = first_plan(group)
    layer = build(group, plan, arguments.hidden)
    torch.manual_seed(group.process)
    dtype = layer.slots.tensor("w2").dtype
    x = torch.randn(arguments.tokens, arguments.hidden).to(group.device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loads.npz"
        with Recorder(
            path, num_experts=NUM_EXPERTS, layer_ids=[LAYER_ID], device=group.device,
            every_steps=STEPS, reduce=True,
        ) as recorder:  # fmt: skip
            before = serve(layer, x, recorder)
        expected = layer(x)
        found: list[Plan | None] = [None]
        if group.process == 0:
            problem = Problem(profile=read_profile(path), model=plan.model, topology=plan.topology)
            placement = solve(problem, "greedy").placement
            found = [Plan(model=plan.model, topology=plan.topology, placement=placement)]
        dist.broadcast_object_list(found, group_src=0, group=group.control)
    new = found[0]
    assert new is not None
    steps = swap(layer, plan, new, x)
    after = serve(layer, x)
    off = float((layer(x) - expected).abs().max() / expected.abs().max())
    if group.process == 0:
        print(f"imbalance of rows {before:.3f} -> {after:.3f}, swapped in {steps} steps, "
              f"outputs off by {off:.1e}")  # fmt: skip
    group.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
