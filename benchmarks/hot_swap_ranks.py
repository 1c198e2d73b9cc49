"""What each process of ``hot_swap.py`` does: serve, move weights beside it, and time both."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, TCPStore

from eplb.model import MoEModel
from eplb.plan import Plan
from eplb.runtime.ep.expert_slots import ExpertLayout, ExpertSlots
from eplb.runtime.ep.experts import gated_layout
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.layer import EPMoELayer
from eplb.runtime.ep.peer_buffers import PeerBuffers
from eplb.runtime.ep.peer_memory import PeerMemory
from eplb.runtime.ep.reference import reference_output, relative_error
from eplb.runtime.ep.tables import PlacementTables
from eplb.runtime.lane import Pacer, SideLane
from eplb.runtime.liveness import Liveness, RanksLost
from eplb.runtime.manager import PlacementManager
from eplb.runtime.recovery import recover
from eplb.runtime.swap import Stage
from eplb.slots import Placement
from eplb.topology import Topology

# DeepSeek-V3: hidden size, intermediate size of an expert, and its bytes in FP8 without scales.
HIDDEN, INNER, EXPERT_BYTES = 7168, 2048, 3 * 7168 * 2048
BUDGET_BYTES_PER_S = 16e9
BUDGETS_BYTES_PER_S = (BUDGET_BYTES_PER_S, 20e9, None)
# Transfers timed together, so that what is timed is not their start.
BACK_TO_BACK = 8
STAGES = (None, Stage.AGREEING, Stage.MOVING, Stage.CHECKING, Stage.SWITCHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is served and moved."""

    hidden: int = HIDDEN
    inner: int = INNER
    expert_bytes: int = EXPERT_BYTES
    layers: int = 4
    slots_per_rank: int = 9
    tokens: tuple[int, ...] = (512, 4096)
    steps: int = 100
    random_swaps: int = 200
    random_tokens: int = 200
    rows: int = 16
    repeats: int = 8
    deaths: int = len(STAGES)


TINY = Sizes(
    hidden=64, inner=32, expert_bytes=6144, layers=2, slots_per_rank=4, tokens=(16,), steps=12,
    random_swaps=3, random_tokens=20, rows=3, repeats=2, deaths=1,
)  # fmt: skip


def make_group(process: int, processes: int, folder: str, name: str) -> EPGroup:
    """Start torch.distributed: NCCL on GPUs, otherwise gloo."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", process) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        # Processes share the cores.
        torch.set_num_threads(1)
    store = FileStore(f"{folder}/{name}", processes)
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=PrefixStore("world", store), rank=process,
        world_size=processes, timeout=timedelta(seconds=60), device_id=device if cuda else None,
    )  # fmt: skip
    world = dist.group.WORLD
    assert world is not None
    group = EPGroup(world, PrefixStore("calls", store), device=device, timeout_s=60.0)
    # As under torchrun, a server: files are asked anew at every step.
    server = None
    if process == 0:
        server = TCPStore("127.0.0.1", 0, processes, is_master=True, wait_for_workers=False)
    port = int(group.gather_text(str(server.port) if server else "")[0])
    group.store = server or TCPStore("127.0.0.1", port, processes, is_master=False)
    return group


def plan_of(rows_LS: Any, group: EPGroup, num_experts: int, top_k: int) -> Plan:
    """Return a plan of these slots."""
    rows_LS = np.asarray(rows_LS)
    layer_ids = tuple(range(3, 3 + len(rows_LS)))
    return Plan(
        model=MoEModel(name="bench", num_experts=num_experts, layer_ids=layer_ids, top_k=top_k),
        topology=Topology(
            num_nodes=1, ranks_per_node=group.num_ranks,
            slots_per_rank=rows_LS.shape[1] // group.num_ranks,
        ),
        placement=Placement(
            phys_to_log_LS=rows_LS, layer_ids=layer_ids, num_experts=num_experts
        ),
    )  # fmt: skip


class Serving:
    """Layers under a plan, with random weights that depend on layer and expert alone."""

    def __init__(
        self,
        group: EPGroup,
        plan: Plan,
        layout: ExpertLayout,
        *,
        hidden: int,
        payload: str,
        max_tokens: int,
    ) -> None:
        self.group, self.plan, self.hidden, self.layout = group, plan, hidden, layout
        self.route: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._stacked: dict[int, dict[str, torch.Tensor]] = {}
        self._peers: PeerBuffers | None = None
        if group.device.type == "cuda":
            assert plan.model.top_k is not None
            self._peers = PeerBuffers(
                group, max_tokens=max_tokens, hidden_size=hidden, top_k=plan.model.top_k,
                slots_per_rank=plan.topology.slots_per_rank, num_experts=plan.model.num_experts,
                payload=payload,
            )  # fmt: skip
        self.layers = [self._layer(layer_id, payload) for layer_id in plan.placement.layer_ids]

    def _layer(self, layer_id: int, payload: str) -> EPMoELayer:
        tables = PlacementTables.of_plan(self.plan, layer_id, self.group)
        slots = ExpertSlots(
            self.layout, tables.slots_per_rank * self.group.ranks_per_process, self.group.device
        )
        first = self.group.first_rank * tables.slots_per_rank
        for slot in range(slots.num_slots):
            if (held := int(tables.phys_to_log_S[first + slot])) >= 0:
                slots.load(slot, self.expert(layer_id, held))
        return EPMoELayer(
            self.group, tables, slots, lambda _: self.route[layer_id], hidden_size=self.hidden,
            payload=payload, peers=self._peers,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the memory that peers write to."""
        if self._peers is not None:
            self._peers.close()

    def expert(self, layer_id: int, expert: int) -> dict[str, torch.Tensor]:
        """Return an expert's tensors, on the device."""
        generator = torch.Generator(self.group.device).manual_seed(1000 * layer_id + expert)
        return {
            name: (
                torch.randn(shape, generator=generator, device=self.group.device) / shape[-1] ** 0.5
            ).to(dtype)
            for name, (shape, dtype) in self.layout.tensors.items()
        }

    def experts(self, layer_id: int) -> dict[str, torch.Tensor]:
        """Return the tensors of all experts of a small layer, each of shape [E, ...]."""
        if layer_id not in self._stacked:
            each = [self.expert(layer_id, e) for e in range(self.plan.model.num_experts)]
            self._stacked[layer_id] = {
                name: torch.stack([tensors[name] for tensors in each]) for name in each[0]
            }
        return self._stacked[layer_id]

    def tokens(self, num_tokens: int, top_k: int, seed: int) -> torch.Tensor:
        """Draw tokens and their experts, for all layers."""
        generator = torch.Generator(self.group.device).manual_seed(seed)
        device, experts = self.group.device, self.plan.model.num_experts
        for layer in self.layers:
            score = torch.rand(num_tokens, experts, generator=generator, device=device)
            weight = torch.rand(num_tokens, top_k, generator=generator, device=device)
            self.route[layer.layer_id] = score.topk(top_k, dim=1).indices, weight
        return torch.randn(
            num_tokens, self.hidden, generator=generator, device=device, dtype=torch.bfloat16
        )


def synchronize(group: EPGroup) -> None:
    """Wait for the device and all processes."""
    if group.device.type == "cuda":
        torch.cuda.synchronize()
    group.barrier()


def timed_steps(group: EPGroup, step: Callable[[int], None], indices: Iterable[int]) -> list[float]:
    """Return milliseconds of each of some steps on the device; nothing waits between them."""
    if group.device.type != "cuda":
        times = [time.perf_counter()]
        for index in indices:
            step(index)
            times.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(times)]
    events = [_event()]
    events[0].record()
    for index in indices:
        step(index)
        events.append(_event())
        events[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def transfers(group: EPGroup, sizes: Sizes) -> list[dict[str, Any]]:
    """Move rows of an expert in a ring, with nothing beside: the lane, and NCCL's sends."""
    results = []
    for rows in sorted({1, sizes.rows}):
        memory = PeerMemory(group)
        into = memory.allocate((rows, sizes.expert_bytes))
        source = torch.full_like(into, group.process + 1)
        peer = memory.rows_of((group.process + 1) % group.num_processes)
        movers: dict[str, Callable[[], None]] = {}
        if peer is not None:
            movers["copy engine, an expert a chunk"] = partial(push, group, source, peer)
        if group.device.type == "cuda":
            movers["NCCL, one message"] = partial(send, group, [source], [into])
            movers["NCCL, a message an expert"] = partial(send, group, list(source), list(into))
        for name, move in movers.items():
            seconds = []
            for _ in range(sizes.repeats + 2):
                synchronize(group)
                start = time.perf_counter()
                for _ in range(BACK_TO_BACK):
                    move()
                torch.cuda.synchronize()
                seconds.append((time.perf_counter() - start) / BACK_TO_BACK)
            synchronize(group)
            assert (
                int(into.min()) == int(into.max()) == (group.process - 1) % group.num_processes + 1
            )
            best = statistics.median(seconds[2:])
            results.append(
                {"way": name, "experts": rows, "gb_per_s": rows * sizes.expert_bytes / best / 1e9}
            )
            into.zero_()
        memory.close()
    return results


def push(group: EPGroup, source: torch.Tensor, peer: torch.Tensor) -> None:
    """Push all rows through a lane without a budget."""
    lane = SideLane(group.device, Pacer(None, source.shape[1]))
    for own, theirs in zip(source, peer, strict=True):
        lane.add(partial(theirs.copy_, own, non_blocking=True), own.numel())
    lane.pump()


def send(group: EPGroup, sources: list[torch.Tensor], into: list[torch.Tensor]) -> None:
    """Send messages around the ring in one batch, as engines do; on the present stream."""
    right = (group.process + 1) % group.num_processes
    left = (group.process - 1) % group.num_processes
    operations = [dist.P2POp(dist.isend, tensor, right) for tensor in sources]
    operations += [dist.P2POp(dist.irecv, tensor, left) for tensor in into]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def beside_serving(group: EPGroup, sizes: Sizes) -> list[dict[str, Any]]:
    """Time steps alone, and with rows moved every tenth step in each way."""
    num_slots = sizes.slots_per_rank * group.num_ranks
    plan = plan_of([np.arange(num_slots)] * sizes.layers, group, num_slots, 8)
    dtype = torch.bfloat16
    serving = Serving(
        group, plan, gated_layout(sizes.hidden, sizes.inner, dtype), hidden=sizes.hidden,
        payload="bf16", max_tokens=max(sizes.tokens),
    )  # fmt: skip
    memory = PeerMemory(group)
    into = memory.allocate((sizes.rows, sizes.expert_bytes))
    source = torch.full_like(into, 3)
    peer = memory.rows_of((group.process + 1) % group.num_processes)
    side = torch.cuda.Stream() if group.device.type == "cuda" else None  # type: ignore[no-untyped-call]
    results = []
    for num_tokens in sizes.tokens:
        x_TH = serving.tokens(num_tokens, 8, group.process)

        def forward(lane: SideLane | None = None, x_TH: torch.Tensor = x_TH) -> None:
            for layer in serving.layers:
                layer.after_dispatch = None if lane is None else lane.pump
                layer(x_TH)

        def beside(move: str, index: int, lane: SideLane, forward: Any = forward) -> None:
            if index % 10 == 0 and move == "copy":
                assert peer is not None
                for own, theirs in zip(source, peer, strict=True):
                    lane.add(partial(theirs.copy_, own, non_blocking=True), own.numel())
            elif index % 10 == 0 and move != "none":
                assert side is not None
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    whole = move == "whole"
                    send(
                        group, [source] if whole else list(source), [into] if whole else list(into)
                    )
            forward(lane)

        ways: dict[str, tuple[str, float | None]] = {}
        if peer is not None:
            ways["copy engine, no budget"] = ("copy", None)
            ways["copy engine, 16 GB/s"] = ("copy", BUDGET_BYTES_PER_S)
        if side is not None:
            ways |= {
                "NCCL, one message": ("whole", None),
                "NCCL, a message an expert": ("each", None),
            }
        idle = SideLane(group.device, Pacer(None, sizes.expert_bytes))
        for _ in range(20):
            forward()
        alone = timed_steps(group, partial(beside, "none", lane=idle), range(sizes.steps // 2))
        for name, (move, budget) in ways.items():
            alone += timed_steps(group, partial(beside, "none", lane=idle), range(sizes.steps // 2))
            lane = SideLane(group.device, Pacer(budget, sizes.expert_bytes))
            synchronize(group)
            times = timed_steps(group, partial(beside, move, lane=lane), range(sizes.steps))
            while not lane.is_idle:
                lane.pump()
            synchronize(group)
            moved = len(range(0, sizes.steps, 10)) * sizes.rows * sizes.expert_bytes / 1e9
            results.append(_summary(num_tokens, name, times, moved))
        results.append(_summary(num_tokens, "alone", alone, 0.0))
    memory.close()
    serving.close()
    return results


def _summary(tokens: int, way: str, times: list[float], moved_gb: float) -> dict[str, Any]:
    return {"tokens": tokens, "way": way, "steps": len(times), "mean_ms": statistics.mean(times),
            "median_ms": statistics.median(times), "max_ms": max(times),
            "moved_gb": moved_gb}  # fmt: skip


def swaps_under_load(group: EPGroup, sizes: Sizes) -> list[dict[str, Any]]:
    """Time each step before, during and after swaps in which every slot gets another expert."""
    results = []
    per_rank, num_slots = sizes.slots_per_rank, sizes.slots_per_rank * group.num_ranks
    here = np.arange(num_slots)
    plans = [
        plan_of([np.roll(here, k * per_rank)] * sizes.layers, group, num_slots, 8) for k in range(2)
    ]
    layout = gated_layout(sizes.hidden, sizes.inner, torch.bfloat16)
    serving = Serving(
        group, plans[0], layout, hidden=sizes.hidden, payload="bf16", max_tokens=max(sizes.tokens)
    )
    for budget in BUDGETS_BYTES_PER_S:
        # All layers change over together: long moves, of which a rate can be told.
        manager = PlacementManager(group, spare_rows=per_rank * sizes.layers, bytes_per_s=budget)
        manager.attach(serving.layers, plans[0])
        for num_tokens in sizes.tokens:
            x_TH = serving.tokens(num_tokens, 8, group.process)
            for layer in 20 * serving.layers:
                layer(x_TH)
            before_bytes = manager.status().moved_bytes
            synchronize(group)
            stages, times = timed_swaps(serving, manager, plans, x_TH, sizes.steps)
            moved = manager.status().moved_bytes - before_bytes
            results.append(
                {"tokens": num_tokens, "budget_gb_per_s": budget and budget / 1e9,
                 "moved_gb": moved / 1e9, "stages": stages, "times_ms": times}
            )  # fmt: skip
            assert manager.plan.digest() == plans[0].digest()
        manager.close()
        synchronize(group)
    serving.close()
    return results


def timed_swaps(
    serving: Serving, manager: PlacementManager, plans: list[Plan], x_TH: torch.Tensor, steps: int
) -> tuple[list[str], list[float]]:
    """Swap to the second plan; return each step's stage and milliseconds.

    A second swap goes back. How many steps a swap takes depends on the machine: the second waits
    for the end of the first, and the timing for the end of both.
    """
    begins = deque([steps // 2, 3 * steps // 2])
    stages: list[str] = []

    def is_idle() -> bool:
        return manager.status().stage is Stage.IDLE

    def step(index: int) -> None:
        if begins and index >= begins[0] and is_idle():
            begins.popleft()
            manager.begin_swap(plans[1])
            plans.reverse()
        result = manager.step()
        assert result is None or result.error is None, result
        stages.append(manager.status().stage.value)
        for layer in serving.layers:
            layer(x_TH)

    indices = itertools.takewhile(
        lambda index: index < 5 * steps // 2 or begins or not is_idle(), itertools.count()
    )
    return stages, timed_steps(serving.group, step, indices)


def random_swaps(group: EPGroup, sizes: Sizes) -> dict[str, Any]:
    """Swap between random plans under load, beside the reference; count tokens and memory."""
    rng, experts, top_k = np.random.default_rng(0), 12, 4
    hidden, per_rank = 256, 9

    def plan() -> Plan:
        num_slots = per_rank * group.num_ranks
        rows = rng.integers(-1, experts, (2, num_slots))
        for row in rows:
            row[rng.permutation(num_slots)[:experts]] = rng.permutation(experts)
        return plan_of(rows, group, experts, top_k)

    serving = Serving(
        group, plan(), gated_layout(hidden, 128, torch.bfloat16), hidden=hidden, payload="bf16",
        max_tokens=sizes.random_tokens,
    )  # fmt: skip
    manager = PlacementManager(group, spare_rows=per_rank)
    manager.attach(serving.layers, serving.plan)
    worst, lost, steps, held = 0.0, 0, 0, []
    for number in range(sizes.random_swaps):
        manager.begin_swap(plan())
        result = None
        while result is None:
            result = manager.step()
            x_TH = serving.tokens(
                int(rng.integers(0, sizes.random_tokens)), top_k, steps * 7 + group.process
            )
            for layer in serving.layers:
                y_TH = layer(x_TH)
                routed = serving.route[layer.layer_id]
                tensors = serving.experts(layer.layer_id)
                if len(x_TH):
                    worst = max(
                        worst, relative_error(y_TH, reference_output(x_TH, *routed, tensors))
                    )
                pairs = torch.tensor([len(x_TH) * top_k, sum(layer.received_pairs)])
                dist.all_reduce(pairs, group=group.control)
                lost += abs(int(pairs[0] - pairs[1]))
            steps += 1
        assert result.error is None, result.error
        if group.device.type == "cuda" and number % 50 == 9:
            torch.cuda.synchronize()
            held.append([torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]])
    moved = manager.status().moved_bytes
    manager.close()
    serving.close()
    return {"swaps": sizes.random_swaps, "steps": steps, "max_relative_error": worst,
            "tokens_lost": lost, "moved_gb": moved / 1e9,
            "allocated_bytes_every_50_swaps": [a for a, _ in held],
            "free_bytes_every_50_swaps": [f for _, f in held]}  # fmt: skip


def measure(process: int, processes: int, folder: str, sizes: Sizes) -> None:
    """Run everything but deaths; the first process writes the results."""
    group = make_group(process, processes, folder, "measure")
    results: dict[str, Any] = {}
    parts: dict[str, Callable[[EPGroup, Sizes], Any]] = {
        "transfers": transfers, "random_swaps": random_swaps, "swaps": swaps_under_load,
        "beside_serving": beside_serving,
    }  # fmt: skip
    with torch.no_grad():
        for name, part in parts.items():
            start = time.perf_counter()
            results[name] = part(group, sizes)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if process == 0:
                print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
                Path(f"{folder}/results.json").write_text(json.dumps(results))
    synchronize(group)
    dist.destroy_process_group()


def die(process: int, processes: int, folder: str, number: int) -> None:
    """Lose the last process at a stage of a swap; note what the others say, and go on."""
    group = make_group(process, processes, folder, f"die{number}")
    liveness = Liveness(group)
    rng, experts, hidden, per_rank = np.random.default_rng(0), 8, 256, 9

    def plan(num_ranks: int) -> Any:
        num_slots = per_rank * num_ranks
        rows = rng.integers(0, experts, (2, num_slots))
        rows[:, :experts] = np.arange(experts)
        return rng.permuted(rows, axis=1)

    first = plan_of(plan(group.num_ranks), group, experts, 2)
    serving = Serving(
        group, first, gated_layout(hidden, 128, torch.bfloat16), hidden=hidden, payload="bf16",
        max_tokens=64,
    )  # fmt: skip
    manager = PlacementManager(group, spare_rows=per_rank, liveness=liveness)
    manager.attach(serving.layers, first)
    stage, killed_s = STAGES[number], 0.0

    def serve() -> float:
        x_TH = serving.tokens(64, 2, process)
        worst = 0.0
        for layer in serving.layers:
            y_TH = layer(x_TH)
            tensors = serving.experts(layer.layer_id)
            routed = serving.route[layer.layer_id]
            worst = max(worst, relative_error(y_TH, reference_output(x_TH, *routed, tensors)))
        return worst

    try:
        if stage is not None:
            manager.begin_swap(plan_of(plan(group.num_ranks), group, experts, 2))
            while manager.status().stage is not stage:
                manager.step()
                serve()
        # The survivors may run on for some steps; the one that dies says when.
        if process == processes - 1:
            time.sleep(0.05)
            Path(f"{folder}/killed{number}").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            manager.step()
            serve()
    except RanksLost as lost:
        stopped_s = time.time()
        killed_s = float(Path(f"{folder}/killed{number}").read_text())
        start = time.perf_counter()
        recovered = recover(manager, liveness, serving.expert)
        recovery_s = time.perf_counter() - start
        serving.group = recovered.group
        error = serve()
        report = {
            "stage": "no swap" if stage is None else stage.value, "dead": lost.loss.dead,
            "digest": lost.loss.digest, "stopped_after_s": stopped_s - killed_s,
            "recovered_after_s": recovery_s, "loaded": recovered.num_loaded,
            "max_relative_error": error, "threads": threading.active_count(),
        }  # fmt: skip
        Path(f"{folder}/death{number}-{process}").write_text(json.dumps(report))
        recovered.manager.close()
        recovered.group.barrier()
        recovered.liveness.close()
        dist.destroy_process_group()
