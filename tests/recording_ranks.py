"""What each of four processes does in the tests of the reduction over ranks.

It is a module of its own because spawned processes import it by name.
"""

from __future__ import annotations

import importlib.util
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from eplb.profiles.recorder import Recorder

IDS = torch.tensor([[0, 1], [1, 2], [3, 1]])


def steps(recorder, number, times=1):
    for _ in range(number):
        for _ in range(times):
            recorder.observe(3, IDS, phase="decode")
        recorder.step()


def make(folder, name, **more):
    return Recorder(f"{folder}/{name}.npz", num_experts=4, layer_ids=[3], reduce=True, **more)


def work(rank: int, num_ranks: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    torch.set_num_threads(1)
    # Ranks with different loads, that close after different numbers of windows.
    with make(folder, "steps", every_steps=2, sources="node", ranks_per_node=2) as recorder:
        steps(recorder, 6 if rank else 5, times=rank + 1)
    # By the clock; the last rank makes no step at all.
    with make(folder, "clock", every_s=0.4) as recorder:
        while rank < 3 and time.time() < recorder._start_s + 1.4:
            steps(recorder, 1)
            time.sleep(0.02)
        torch.save(recorder._steps, f"{folder}/steps{rank}")
    if importlib.util.find_spec("transformers"):
        from check_family import check_on_ranks

        check_on_ranks(["deepseek_v3", "mixtral", "llama4_text"], Path(folder), "cpu")
    dist.barrier()
    # The last rank leaves without a word.
    recorder = make(folder, "away", every_steps=1, reduce_timeout_s=1.0, sources="rank")
    steps(recorder, 1)
    if rank == 3:
        os._exit(0)
    steps(recorder, 2)
    recorder.close()
