"""``eplb selftest``: does this machine run the expert-parallel layer."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from eplb.cli.options import Name, as_json
from eplb.errors import InvalidInput

if TYPE_CHECKING:
    from eplb.runtime.ep.group import EPGroup

__all__ = ["command"]

PAYLOADS = ("fp32", "bf16", "fp8")


@click.command("selftest")
@click.option(
    "--ranks",
    type=click.IntRange(min=1, max=1024),
    metavar="N",
    help="Ranks of the plans. Where there are fewer GPUs, processes hold several ranks. "
    "Default: the GPUs, or 4; under torchrun its processes.",
)
@click.option(
    "--nodes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Nodes that the ranks are divided into; with several, tokens cross by node. Under "
    "torchrun the nodes are its own.",
)
@click.option(
    "--backend",
    type=Name("backend", ("gloo", "nccl")),
    help="Default: nccl where there is a GPU.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=60, show_default=True, help="Steps served."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--payload",
    type=Name("payload", PAYLOADS),
    help="What tokens travel as. Default: fp32 on gloo, bf16 on nccl.",
)
@click.option(
    "--exchange",
    type=Name("exchange", ("peers", "collectives")),
    help="How tokens travel within a node: over peer memory, or by collectives. Default: peers on "
    "nccl.",
)
@click.option(
    "--padded",
    is_flag=True,
    help="With peers: sizes that the host need not know, as for a CUDA graph.",
)
@click.option(
    "--micro-batches",
    type=click.IntRange(1, 2),
    default=1,
    show_default=True,
    metavar="N",
    help="Batches that a step is divided into.",
)
@click.option(
    "--write-topology",
    type=click.Path(),
    metavar="FILE",
    help="Measure the bandwidths between ranks, and write them for --topology FILE.",
)
@as_json
def command(
    ranks: int | None,
    nodes: int,
    backend: str | None,
    steps: int,
    seed: int,
    payload: str | None,
    exchange: str | None,
    padded: bool,
    micro_batches: int,
    write_topology: str | None,
    json_: bool,
) -> None:
    """Serve random tokens under random plans and swaps, and compare with an unsharded layer.

    \b
    eplb selftest
    eplb selftest --ranks 32 --backend gloo --steps 200
    torchrun --nnodes 2 --nproc-per-node 8 ... --no-python eplb selftest
    """
    try:
        import torch
    except ImportError:
        raise InvalidInput('the runtime needs torch; pip install "eplb-toolkit[runtime]"') from None
    from eplb.files import check_writable

    if write_topology is not None:
        check_writable(write_topology)
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    exchange = exchange or ("peers" if backend == "nccl" else "collectives")
    if padded and exchange != "peers":
        raise InvalidInput("--padded needs --exchange peers; leave it out, or use nccl on one node")
    options = {
        "steps": steps,
        "seed": seed,
        "payload": payload or ("bf16" if backend == "nccl" else "fp32"),
        "exchange": exchange,
        "padded": padded,
        "micro_batches": micro_batches,
        "links": write_topology is not None,
    }
    if "TORCHELASTIC_RUN_ID" in os.environ:
        result, leads = _under_torchrun(ranks, backend, options)
    else:
        result, leads = _started_here(ranks, nodes, backend, options), True
    if not leads:
        return
    links = result.pop("links", None)
    if write_topology is not None:
        _write_topology(write_topology, links)
        result["topology"] = {"path": write_topology} | links
    if json_:
        click.echo(json.dumps(result))
    else:
        _show(result)


def serve(group: EPGroup, options: dict[str, Any]) -> dict[str, Any]:
    """Run the self-test, and the measurement if asked for, in each process."""
    from eplb.runtime.links import measure_links
    from eplb.runtime.selftest import Settings, run

    links = options.pop("links")
    settings = Settings(
        **options,
        by_node=group.node_group is not None,
    )
    result: dict[str, Any] = run(group, settings).to_dict()
    result |= {
        "ranks": group.num_ranks,
        "nodes": group.num_nodes,
        "processes": group.num_processes,
        "device": group.device.type,
        "payload": settings.payload,
        "exchange": settings.exchange,
    }
    if links:
        result["links"] = measure_links(group)
    return result


def _started_here(
    ranks: int | None, nodes: int, backend: str, options: dict[str, Any]
) -> dict[str, Any]:
    import torch

    from eplb.runtime.launch import num_processes, run_on_ranks

    if ranks is None:
        ranks = max(torch.cuda.device_count(), 1) if backend == "nccl" else 4
    if ranks % nodes:
        raise InvalidInput(f"--ranks ({ranks}) must be divisible by --nodes ({nodes})")
    # By node only where a node is whole processes.
    whole = (ranks // nodes) % (ranks // num_processes(ranks, backend)) == 0
    return run_on_ranks(
        serve, options, num_ranks=ranks, backend=backend, ranks_per_node=ranks // nodes,
        nodes=nodes > 1 and whole,
    )  # fmt: skip


def _under_torchrun(
    ranks: int | None, backend: str, options: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Take part as one of torchrun's processes; the first one reports."""
    import torch.distributed as dist

    from eplb.runtime.ep.group import EPGroup

    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    group = EPGroup.from_environment(num_ranks=ranks, backend=backend, nodes=several)
    result = serve(group, options)
    group.barrier()
    dist.destroy_process_group()
    return result, group.process == 0


def _write_topology(path: str, links: dict[str, Any]) -> None:
    import yaml

    from eplb.files import write_atomic

    write_atomic(path, yaml.safe_dump(links, sort_keys=False).encode("ascii"))


def _show(result: dict[str, Any]) -> None:
    from eplb.cli import show

    grid = show.table("", "")
    grid.add_row("ranks, processes", f"{result['ranks']}, {result['processes']}")
    grid.add_row("device, payload", f"{result['device']}, {result['payload']}")
    grid.add_row("exchange", result["exchange"])
    grid.add_row("steps, swaps", f"{result['steps']}, {result['swaps']}")
    grid.add_row("tokens, lost", f"{result['tokens']}, {result['tokens_lost']}")
    grid.add_row("largest relative error", f"{result['max_relative_error']:.2g}")
    for name, value in result.get("topology", {}).items():
        shown = f"{value / 1e9:.1f} GB/s" if name.endswith("per_s") else str(value)
        grid.add_row(name.removesuffix("_bytes_per_s"), shown)
    out = show.console()
    out.print(grid)
    out.print("This machine runs the expert-parallel layer.")
