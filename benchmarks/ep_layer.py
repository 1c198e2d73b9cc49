"""Measure the expert-parallel layer under real loads: ``python benchmarks/ep_layer.py``.

In two parts, because the machine with the GPUs need not have the recorded loads::

    python benchmarks/ep_layer.py prepare ../shared/data -o build/ep-layer.npz
    torchrun --nproc-per-node 2 benchmarks/ep_layer.py run build/ep-layer.npz -o FILE

``prepare`` solves the plans and draws the routings, ``run`` serves them at DeepSeek-V3's dimensions
(256 experts of 7168 x 2048 in BF16, top-8) with random weights. EP4x66: four ranks of 66 slots, on
two GPUs two ranks each. Choices come from the prepared routings; the router is computed and its own
choices dropped. The layers of a step take turns on one set of weights, which each would have its
own of. Plans take turns in every repetition; times are medians over repetitions of the slowest
process. ``--tiny`` is for machines without GPUs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ep_layer_inputs
import numpy as np
import torch
import torch.distributed as dist
from ep_layer_inputs import Variant
from run import environment

from eplb.runtime.ep.exchange import NO_FAULT, Crossing, Hop, sort_by_slot
from eplb.runtime.ep.expert_slots import ExpertSlots
from eplb.runtime.ep.experts import compute_experts, gated_layout, gated_silu
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.layer import EPMoELayer
from eplb.runtime.ep.peer_buffers import PeerBuffers
from eplb.runtime.ep.router import SigmoidRouter
from eplb.runtime.ep.rows import sum_rows
from eplb.runtime.ep.tables import PlacementTables

if TYPE_CHECKING:
    from eplb.runtime.ep.peer_exchange import PeerCrossing

SIZES = {"prefill": 8192, "decode": 128}
# Some 2 ms on an H100.
_AHEAD_CYCLES = 4_000_000
WARM_UPS, REPEATS = 1, 15


class Bench:
    """One process: weights, and layers made as they are needed."""

    def __init__(self, group: EPGroup, *, tiny: bool) -> None:
        self.group, self.tiny = group, tiny
        self.warm_ups, self.repeats = (0, 1) if tiny else (WARM_UPS, REPEATS)
        self.hidden, inner = (64, 32) if tiny else (7168, 2048)
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.layout = gated_layout(self.hidden, inner, self.dtype)
        num_slots = ep_layer_inputs.SLOTS_PER_RANK * group.ranks_per_process
        self.slots = ExpertSlots(self.layout, num_slots, group.device)
        torch.manual_seed(group.process)
        for row in self.slots.rows:
            row.view(self.dtype).normal_(0, 0.02)
        self.router = SigmoidRouter(
            self.hidden, ep_layer_inputs.NUM_EXPERTS, ep_layer_inputs.TOP_K, num_groups=8,
            groups_per_token=4,
        ).to(group.device)  # fmt: skip
        self.router.weight.normal_(0, 0.02)
        self._peers: dict[tuple[str, int, int], PeerBuffers] = {}

    def layer(
        self, variant: Variant, layer_id: int, topk_TK: torch.Tensor, max_tokens: int
    ) -> EPMoELayer:
        """Return a layer of a plan that routes as it is told."""
        pieces = 2 if variant.halves else variant.micro_batches
        halves = list(topk_TK.chunk(pieces))
        turn = -1

        def route(x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal turn
            _, weight_TK = self.router(x_TH)
            turn += 1
            return halves[turn % len(halves)], weight_TK

        tables = PlacementTables.of_plan(variant.plan, layer_id, self.group, split=variant.split)
        payload = "fp32" if self.tiny else variant.payload
        peers = None
        if variant.peers and self.group.device.type == "cuda":
            peers = self.peers(payload, variant.micro_batches, max_tokens)
        return EPMoELayer(
            self.group, tables, self.slots, route, hidden_size=self.hidden, payload=payload,
            micro_batches=variant.micro_batches, peers=peers,
            padded=variant.captured and peers is not None,
        )  # fmt: skip

    def peers(self, payload: str, micro_batches: int, max_tokens: int) -> PeerBuffers:
        """Return buffers, one for all layers that can share them."""
        key = payload, micro_batches, max_tokens
        if key not in self._peers:
            self._peers[key] = PeerBuffers(
                self.group, max_tokens=max_tokens, hidden_size=self.hidden,
                top_k=ep_layer_inputs.TOP_K, slots_per_rank=ep_layer_inputs.SLOTS_PER_RANK,
                num_experts=ep_layer_inputs.NUM_EXPERTS, payload=payload,
                micro_batches=micro_batches,
            )  # fmt: skip
        return self._peers[key]

    def close(self) -> None:
        """Let go of all buffers."""
        for buffers in self._peers.values():
            buffers.close()
        self._peers.clear()

    def milliseconds(self, run: Callable[[], Any], *, ahead: bool = False) -> float:
        """Return the time of a call on the slowest process, all beginning together.

        ``ahead``: the GPU sleeps until the host has launched the call, so that launches are hidden,
        as they are behind other work.
        """
        self.group.barrier()
        if self.group.device.type == "cuda":
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            # The first collective holds all processes until the last one is there.
            dist.all_reduce(torch.zeros(1, device=self.group.device))
            if ahead:
                torch.cuda._sleep(_AHEAD_CYCLES)  # type: ignore[no-untyped-call]
            begin.record()
            run()
            end.record()
            end.synchronize()
            spent = begin.elapsed_time(end)
        else:
            import time  # noqa: PLC0415

            start = time.perf_counter()
            run()
            spent = 1e3 * (time.perf_counter() - start)
        return self.most(spent)

    def most(self, value: float) -> float:
        """Return the largest value over processes."""
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group.control)
        return float(tensor)


def throughput(
    bench: Bench, inputs: ep_layer_inputs.Inputs, phase: str, tokens: int
) -> dict[str, Any]:
    """Return milliseconds of a layer and the rows of the ranks, by plan, plans taking turns."""
    group = bench.group
    own = tokens * group.ranks_per_process
    x_TH = torch.randn(own, bench.hidden, device=group.device).to(bench.dtype)

    def topk(name: str, layer: int) -> torch.Tensor:
        routed_TK = inputs.routing(name, layer, tokens, group)
        return torch.from_numpy(routed_TK.astype(np.int64)).to(group.device)

    layers: dict[str, list[EPMoELayer]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for variant in inputs.variants(phase):
        of_plan = [
            bench.layer(variant, layer_id, topk(variant.routing, i), own)
            for i, layer_id in enumerate(variant.plan.placement.layer_ids)
        ]
        layers[variant.name] = of_plan
        parts = x_TH.chunk(2) if variant.halves else (x_TH,)
        runs[variant.name] = partial(_forward, of_plan, parts)
        if variant.captured and group.device.type == "cuda":
            runs[variant.name] = captured(group, runs[variant.name])
    spent: dict[str, list[float]] = {name: [] for name in layers}
    names = list(runs)
    for repetition in range(bench.warm_ups + bench.repeats):
        # Clocks drift within a repetition: each plan comes first, and last, in its turn.
        for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
            run = runs[name]
            milliseconds = bench.milliseconds(run)
            if repetition >= bench.warm_ups:
                spent[name].append(milliseconds / len(layers[name]))
    ceiling = statistics.median(spent["even router"])
    results: dict[str, Any] = {}
    for name, of_plan in layers.items():
        rows_LR = gathered([layer.received_pairs for layer in of_plan], group)
        tokens_LR = gathered([layer.received_rows for layer in of_plan], group)
        median = statistics.median(spent[name])
        results[name] = {
            "ms": median,
            "least_ms": min(spent[name]),
            "tokens_per_s": tokens * group.num_ranks / median * 1e3,
            "of_even_router": ceiling / median,
            "imbalance_rows": float((rows_LR.max(1) / rows_LR.mean(1)).mean()),
            "imbalance_tokens": float((tokens_LR.max(1) / tokens_LR.mean(1)).mean()),
        }
    return results


def _forward(layers: list[EPMoELayer], parts: Sequence[torch.Tensor]) -> None:
    for layer in layers:
        for x_TH in parts:
            layer(x_TH)


def captured(group: EPGroup, run: Callable[[], Any]) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of a call."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        group.barrier()
        # Other threads, such as NCCL's, may ask for events.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
    group.barrier()
    return graph.replay


def gathered(of_ranks: list[list[Any]], group: EPGroup) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return figures of this process' ranks for all ranks, shape [L, R]."""
    found: list[Any] = [None] * group.num_processes
    dist.all_gather_object(found, of_ranks, group=group.control)
    return np.concatenate([np.array(part, dtype=np.float64) for part in found], axis=1)


def rank_by_rank(bench: Bench, inputs: ep_layer_inputs.Inputs, tokens: int) -> dict[str, Any]:
    """Return the time of the experts of each rank by itself, as a GPU of its own would take.

    Two ranks on a GPU hide part of their imbalance from :func:`throughput`.
    """
    group, spr = bench.group, ep_layer_inputs.SLOTS_PER_RANK
    results: dict[str, Any] = {}
    for variant in inputs.variants("prefill"):
        options = variant.payload, variant.micro_batches, variant.halves, variant.peers
        if options != ("bf16", 1, False, True):
            continue
        times_LR: list[list[float]] = []
        for i, layer_id in enumerate(variant.plan.placement.layer_ids):
            rows_S = inputs.slot_rows(variant, i, layer_id, tokens)
            of_layer = []
            for rank in group.ranks:
                counts = torch.from_numpy(rows_S[rank * spr : (rank + 1) * spr])
                end_S = counts.cumsum(0).int().to(group.device)
                x_PH = torch.randn(int(counts.sum()), bench.hidden, device=group.device).to(
                    bench.dtype
                )
                one_rank = bench.slots.part((rank - group.first_rank) * spr, spr)
                run = partial(compute_experts, x_PH, end_S, one_rank, gated_silu)
                run()
                of_layer.append(statistics.median(_alone(bench, run) for _ in range(3)))
            times_LR.append(of_layer)
        found = gathered(times_LR, group)
        results[variant.name] = {
            "slowest_ms": float(found.max(1).mean()),
            "mean_ms": float(found.mean()),
        }
    ceiling = results["even router"]["slowest_ms"]
    for figures in results.values():
        figures["of_even_router"] = ceiling / figures["slowest_ms"]
    return results


def _alone(bench: Bench, run: Callable[[], Any]) -> float:
    if bench.group.device.type != "cuda":
        return bench.milliseconds(run)
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def exchanges(
    bench: Bench, inputs: ep_layer_inputs.Inputs, phase: str, tokens: int
) -> dict[str, Any]:
    """Return the times of dispatch and combine, and of all_to_all_single for their bytes.

    Launches are hidden. ``dispatch`` is from tokens and their slots to rows that have arrived (by
    collectives without the exchange of counts, which is ``counts``, the host's wait included);
    ``combine`` from outputs of pairs to outputs of tokens: weighted sums, the way back, and sums.
    ``return`` is combine of rows that have been added up before.
    """
    group = bench.group
    variant = inputs.variants(phase)[0]
    layer_id = variant.plan.placement.layer_ids[0]
    topk_TK = torch.from_numpy(
        inputs.routing(variant.routing, 0, tokens, group).astype(np.int64)
    ).to(group.device)
    layer = bench.layer(variant, layer_id, topk_TK, len(topk_TK))
    hop = Hop(group.process_group, 0, ep_layer_inputs.SLOTS_PER_RANK, group.num_ranks)
    x_TH = torch.randn(len(topk_TK), bench.hidden, device=group.device).to(bench.dtype)
    weight_TK = torch.rand(topk_TK.shape, device=group.device)
    slot_TK = layer.tables.choose_slots(topk_TK)
    words = torch.tensor([0, NO_FAULT], device=group.device)
    bytes_TB, dtype = layer.payload.encode(x_TH), layer.payload.dtype
    parts: dict[str, list[float]] = {}

    def note(name: str, run: Callable[[], Any]) -> None:
        ahead = name != "counts"
        parts.setdefault(name, []).append(bench.milliseconds(run, ahead=ahead))

    for _ in range(bench.warm_ups + bench.repeats):
        crossing = Crossing(group, hop, "benchmark")
        counts = partial(_count, crossing, slot_TK, weight_TK, words)
        note("counts", counts)
        note("dispatch, collectives", partial(_dispatch, crossing, bytes_TB))
        sent, got = crossing.send_rows, crossing.receive_rows
        rows = torch.empty(sum(got), bench.hidden, dtype=dtype, device=group.device)
        note("return, collectives", partial(_return, crossing, rows, dtype))
        there = torch.empty_like(crossing.received_NB)
        packed = torch.empty(sum(sent), there.shape[1], dtype=torch.uint8, device=group.device)
        back = torch.empty(sum(sent), bench.hidden, dtype=rows.dtype, device=group.device)
        plain = partial(dist.all_to_all_single, group=group.process_group)
        note("dispatch, all_to_all_single", partial(plain, there, packed, got, sent))
        note("return, all_to_all_single", partial(plain, back, rows, sent, got))
        counts()
        out_PH, index_NK, weight_NK = _outputs(crossing, layer, bytes_TB)
        note(
            "combine, collectives",
            partial(_combine, crossing, out_PH, index_NK, weight_NK, dtype),
        )
        if group.device.type == "cuda":
            buffers = bench.peers(layer.payload.kind, 1, len(topk_TK))
            told = buffers.new_told()
            over = buffers.crossing(0, told, 0, beside=False, padded=False)
            note("dispatch", partial(over.start, bytes_TB, slot_TK, weight_TK, words))
            over.learn("benchmark")
            outputs_PH, _ = over.pairs()
            note("combine", partial(_over_peers, over, outputs_PH, dtype))
            over.start(bytes_TB, slot_TK, weight_TK, words)
            over.learn("benchmark")
            # As if each row had one output.
            index = buffers.mailboxes[0].index
            index.fill_(-1)
            index[:, 0] = torch.arange(len(index), device=group.device)
            added_NH = torch.empty(len(index), bench.hidden, dtype=dtype, device=group.device)
            note("return", partial(_over_peers, over, added_NH, dtype))
    found: dict[str, Any] = {
        name: statistics.median(times[bench.warm_ups :]) for name, times in parts.items()
    }
    found["rows_sent"], found["rows_to_others"] = sum(sent), sum(sent) - sent[group.process]
    found["bytes_per_row"] = int(there.shape[1])
    return found


def _count(
    crossing: Crossing, slot_TK: torch.Tensor, weight_TK: torch.Tensor, words: torch.Tensor
) -> None:
    crossing.count(slot_TK, weight_TK, words)
    crossing.learn()


def _dispatch(crossing: Crossing, bytes_TB: torch.Tensor) -> None:
    crossing.post(bytes_TB)
    crossing.receive()


def _return(crossing: Crossing, rows_NH: torch.Tensor, dtype: torch.dtype) -> None:
    crossing.post_back(rows_NH)
    crossing.finish(dtype)


def _outputs(
    crossing: Crossing, layer: EPMoELayer, bytes_TB: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return something in place of the experts' outputs, and which of them belong to a row."""
    crossing.post(bytes_TB)
    received = crossing.receive()
    bytes_PB, _, index_NK = sort_by_slot(
        received, layer.group.first_rank * layer.tables.slots_per_rank, layer.slots.num_slots
    )
    return layer.payload.decode(bytes_PB), index_NK, received.weight_NK


def _combine(
    crossing: Crossing,
    out_PH: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    _return(crossing, sum_rows(out_PH, index_NK, weight_NK, dtype), dtype)


def _over_peers(crossing: PeerCrossing, out_PH: torch.Tensor, dtype: torch.dtype) -> None:
    crossing.give_back(out_PH)
    crossing.finish(dtype)


def run(arguments: argparse.Namespace) -> None:
    """Measure everything and write it."""
    group = EPGroup.from_environment(num_ranks=ep_layer_inputs.NUM_RANKS)
    bench = Bench(group, tiny=arguments.tiny)
    results: dict[str, Any] = {}
    with np.load(arguments.inputs) as file:
        names = sorted({key.split("/")[0] for key in file.files})
        for name in names:
            inputs = ep_layer_inputs.Inputs(file, name)
            for phase, tokens in SIZES.items():
                if arguments.tiny:
                    tokens = 16  # noqa: PLW2901
                results[f"{name}, {phase}"] = {
                    "tokens_per_rank": tokens,
                    "layer": throughput(bench, inputs, phase, tokens),
                    "experts": rank_by_rank(bench, inputs, tokens),
                }
                if name == names[0]:
                    results[f"exchange, {phase}"] = exchanges(bench, inputs, phase, tokens)
                bench.close()
                if group.process == 0:
                    print(json.dumps({f"{name}, {phase}": results[f"{name}, {phase}"]}), flush=True)
    if group.process == 0:
        report = {
            "environment": environment("recorded loads, random weights")
            | {
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
                "processes": group.num_processes,
                "ranks": group.num_ranks,
            },
            "results": results,
        }
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps({k: v for k, v in results.items() if k.startswith("exchange")}))
    group.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Prepare the inputs, or run on them."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    prepare = commands.add_parser("prepare")
    prepare.add_argument("data", type=Path, help="the folder of recorded loads")
    prepare.add_argument("-o", "--output", type=Path, required=True)
    prepare.set_defaults(
        do=lambda arguments: ep_layer_inputs.prepare(arguments.data, arguments.output)
    )
    measure = commands.add_parser("run")
    measure.add_argument("inputs", type=Path)
    measure.add_argument("-o", "--output", type=Path)
    measure.add_argument("--tiny", action="store_true", help="small sizes that show nothing")
    measure.set_defaults(do=run)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
