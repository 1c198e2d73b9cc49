"""Starts the processes of a group on this machine, where torchrun has not started them.

Their results come back through a folder; the first error of theirs is ours.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    spawn,
)

from eplb.errors import EplbError, InvalidInput, ServingFailed
from eplb.runtime.ep.group import EPGroup

__all__ = ["num_processes", "run_on_ranks"]

Work = Callable[[EPGroup, Any], dict[str, Any]]

# More processes than this on one host take long to start and share its cores.
_MOST_CPU_PROCESSES = 8


def num_processes(num_ranks: int, backend: str) -> int:
    """Return how many processes are started for ranks: one each, or the largest divisor there is.

    Raises
    ------
    InvalidInput
        NCCL is asked for and there is no GPU.
    """
    most = torch.cuda.device_count() if backend == "nccl" else _MOST_CPU_PROCESSES
    if most < 1:
        raise InvalidInput("backend nccl needs a GPU, and torch sees none; use --backend gloo")
    return max(n for n in range(1, min(num_ranks, most) + 1) if num_ranks % n == 0)


def run_on_ranks(
    work: Work,
    argument: Any,
    *,
    num_ranks: int,
    backend: str,
    ranks_per_node: int | None = None,
    nodes: bool = False,
    timeout_s: float = 60.0,
) -> dict[str, Any]:
    """Run ``work(group, argument)`` in new processes and return what the first of them returns.

    ``work`` is a function at the top of a module, its result JSON values.

    Raises
    ------
    EplbError
        What a process raised.
    """
    processes = num_processes(num_ranks, backend)
    with tempfile.TemporaryDirectory(prefix="eplb-") as folder:
        options = {"num_ranks": num_ranks, "ranks_per_node": ranks_per_node, "nodes": nodes,
                   "timeout_s": timeout_s}  # fmt: skip
        try:
            spawn(  # type: ignore[no-untyped-call]
                _process, (processes, folder, backend, options, work, argument), nprocs=processes
            )
        except (
            ProcessRaisedException,
            ProcessExitedException,
        ) as error:
            raise _first_error(Path(folder), error) from error
        result: dict[str, Any] = json.loads((Path(folder) / "result").read_text())
        return result


def _process(
    process: int,
    processes: int,
    folder: str,
    backend: str,
    options: dict[str, Any],
    work: Work,
    argument: Any,
) -> None:
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", process)
        torch.cuda.set_device(device)
    else:
        # Processes share the cores.
        torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", processes)  # type: ignore[attr-defined]
    try:
        dist.init_process_group(
            backend, store=PrefixStore("world", store), rank=process, world_size=processes,
            timeout=timedelta(seconds=options["timeout_s"]),
            device_id=device if backend == "nccl" else None,
        )  # fmt: skip
        world = dist.group.WORLD
        assert world is not None
        group = EPGroup(world, PrefixStore("calls", store), device=device, **options)
        result = work(group, argument)
        if process == 0:
            (Path(folder) / "result").write_text(json.dumps(result))
        group.barrier()
    except EplbError as error:
        _leave_error(folder, process, error)
        raise
    dist.destroy_process_group()


def _leave_error(folder: str, process: int, error: EplbError) -> None:
    """Write an error where the parent finds it, whole."""
    path = Path(folder) / f"error{process}"
    path.with_suffix(".part").write_text(json.dumps([type(error).__name__, str(error)]))
    path.with_suffix(".part").rename(path)


def _first_error(folder: Path, error: Exception) -> EplbError:
    from eplb import errors  # noqa: PLC0415

    left = sorted(folder.glob("error*[0-9]"), key=os.path.getmtime)
    if left:
        kind, message = json.loads(left[0].read_text())
        found: EplbError = getattr(errors, kind, ServingFailed)(message)
        return found
    last = str(error).strip().splitlines()[-1]
    return ServingFailed(f"a process ended unexpectedly: {last}; see its output above")
