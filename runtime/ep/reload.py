"""Bringing all rows of a layer to another placement at once, with serving stopped.

The plain way, for tests and start-up: one all-to-all of whole experts through a second buffer.
Shape letters: S slots, M rows.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from eplb.arrays import IntArray
from eplb.runtime.ep.expert_slots import ExpertSlots
from eplb.runtime.ep.group import EPGroup

__all__ = ["exchange_rows"]


def exchange_rows(
    slots: ExpertSlots, old_S: IntArray, new_S: IntArray, slots_per_rank: int, group: EPGroup
) -> int:
    """Give every slot the row of its new expert; returns how many rows crossed. Collective.

    A slot takes it from a slot of its own process where there is one, otherwise from the first.

    Parameters
    ----------
    slots : ExpertSlots
        Filled as ``old_S`` says.
    old_S, new_S : array of int
        Logical expert in each slot of the layer, over all ranks; -1 for none.
    slots_per_rank : int
    group : EPGroup
    """
    per_process = slots_per_rank * group.ranks_per_process
    target_M = np.flatnonzero((new_S >= 0) & (new_S != old_S))
    source_M = np.array(
        [_source(old_S, int(new_S[slot]), int(slot) // per_process, per_process)
         for slot in target_M], dtype=np.int64,
    )  # fmt: skip
    to_M, from_M = target_M // per_process, source_M // per_process
    # In order of the target's slot on both sides.
    sent_M, received_M = from_M == group.process, to_M == group.process
    by_target = np.argsort(to_M[sent_M], kind="stable")
    by_source = np.argsort(from_M[received_M], kind="stable")
    sent = source_M[sent_M][by_target] % per_process
    received = target_M[received_M][by_source] % per_process
    counts = np.arange(group.num_processes)
    rows = slots.rows.new_empty(len(received), slots.rows.shape[1])
    with group.watched("exchange of experts"):
        dist.all_to_all_single(
            rows,
            slots.rows[torch.from_numpy(sent).to(slots.rows.device)],
            [int((from_M[received_M] == p).sum()) for p in counts],
            [int((to_M[sent_M] == p).sum()) for p in counts],
            group=group.process_group,
        )
    slots.rows[torch.from_numpy(received).to(slots.rows.device)] = rows
    return int((to_M != from_M).sum())


def _source(old_S: IntArray, expert: int, process: int, per_process: int) -> int:
    """Return the slot an expert is taken from: on the process that needs it, or the first."""
    held = np.flatnonzero(old_S == expert)
    own = held[held // per_process == process]
    return int(own[0] if len(own) else held[0])
