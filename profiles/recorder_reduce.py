"""Adds up windows over ranks, on the host, beside the run.

Windows that have been drained to the host are added over a gloo group from the writer's thread.
NCCL is left alone: its collectives from a second thread can deadlock with those of the model.
Ranks take part in one round a window, in order, whether they have counts for it or not, so a rank
that stepped less, or left a window out, contributes zeros and catches up later: sums over windows
are exact in any case. A rank that stays away ends the reduction, and everybody records on alone.
Shape letters: P phases, L layers, C columns, R ranks, N sources.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from eplb.errors import InvalidInput
from eplb.profiles.recorder_options import Settings

__all__ = ["Reducer", "Total"]


@dataclass(frozen=True, slots=True)
class Total:
    """The sum of one round.

    Parameters
    ----------
    counts_NPLC : array of int64
        By source; one source where they are not kept apart.
    steps : int
        The most steps that a rank had in this window.
    all_done : bool
        Whether every rank has said that it is closing.
    """

    counts_NPLC: NDArray[np.int64]
    steps: int
    all_done: bool


class Reducer:
    """One rank's part in the rounds. Making one is collective.

    Parameters
    ----------
    settings : Settings
        ``reduce`` is True or a gloo group.
    shape : tuple of int
        P, L, C.

    Raises
    ------
    InvalidInput
        There is no process group, or not of a kind that works on the host.
    """

    def __init__(self, settings: Settings, shape: tuple[int, int, int]) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise InvalidInput(
                "reduce needs torch.distributed; call torch.distributed.init_process_group first, "
                "or record this process alone"
            )
        # By the clock, a rank waits for the end of a window that others already left.
        wait_s = settings.every_s if settings.every_steps is None else 0.0
        timeout = timedelta(seconds=settings.reduce_timeout_s + wait_s)
        if isinstance(settings.reduce, bool):
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        else:
            self._group = settings.reduce
            if "gloo" not in str(dist.get_backend(self._group)):
                raise InvalidInput(
                    f"reduce over a gloo group, not {dist.get_backend(self._group)}: windows are "
                    "added on the host; reduce=True makes a group"
                )
        self._timeout = timeout
        self.rank = dist.get_rank(self._group)
        self.num_ranks = dist.get_world_size(self._group)
        self.num_sources, self.source = _sources(settings, self.rank, self.num_ranks)
        self._shape = shape
        # All ranks count windows from one moment.
        start = torch.tensor([time.time()], dtype=torch.float64)
        dist.broadcast(start, group=self._group, group_src=0)
        self.start_s = float(start)

    def add(self, counts_PLC: NDArray[np.int64] | None, *, steps: int, done: bool) -> Total:
        """Take part in a round.

        Raises
        ------
        RuntimeError
            A rank is gone, or did not come in time.
        """
        own = self.num_sources * int(np.prod(self._shape))
        # Behind the counts: how many ranks are done, and the steps of each.
        message = torch.zeros(own + 1 + self.num_ranks, dtype=torch.int64)
        if counts_PLC is not None:
            part = message[:own].view(self.num_sources, *self._shape)
            part[self.source] = torch.from_numpy(counts_PLC)
        message[own] = int(done)
        message[own + 1 + self.rank] = steps
        work = dist.all_reduce(message, group=self._group, async_op=True)
        if work is not None:
            work.wait(self._timeout)
        total = message.numpy()
        return Total(
            counts_NPLC=total[:own].reshape(self.num_sources, *self._shape),
            steps=int(total[own + 1 :].max()),
            all_done=bool(total[own] == self.num_ranks),
        )


def _sources(settings: Settings, rank: int, num_ranks: int) -> tuple[int, int]:
    if settings.sources == "rank":
        return num_ranks, rank
    if settings.sources == "node":
        per_node = settings.ranks_per_node
        return -(-num_ranks // per_node), rank // per_node
    return 1, 0
