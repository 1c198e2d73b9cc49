"""Digests of experts as they were loaded, which every row that moves is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from eplb.arrays import IntArray
from eplb.errors import InvalidInput
from eplb.plan import Plan
from eplb.runtime.batch_work import SwapLayer
from eplb.runtime.ep.expert_slots import ExpertSlots
from eplb.runtime.ep.group import EPGroup

__all__ = ["expert_checksums"]


def expert_checksums(group: EPGroup, layers: Sequence[SwapLayer], plan: Plan) -> IntArray:
    """Return the checksum of each expert of each layer, [L, E]. Collective.

    Raises
    ------
    InvalidInput
        Replicas of an expert differ.
    """
    own_LK = torch.stack([ExpertSlots.checksums(layer.slots.rows) for layer in layers])
    own_LK = own_LK.cpu()
    gathered = [torch.empty_like(own_LK) for _ in range(group.num_processes)]
    dist.all_gather(gathered, own_LK, group=group.control)
    sum_LS = torch.cat(gathered, dim=1).numpy()
    slots_LS = plan.placement.phys_to_log_LS
    checksum_LE = np.zeros((len(slots_LS), plan.model.num_experts), np.int64)
    row, slot = np.nonzero(slots_LS >= 0)
    checksum_LE[row, slots_LS[row, slot]] = sum_LS[row, slot]
    differs = checksum_LE[row, slots_LS[row, slot]] != sum_LS[row, slot]
    if differs.any():
        layer, where = int(row[differs][0]), int(slot[differs][0])
        raise InvalidInput(
            f"layer {plan.placement.layer_ids[layer]}: slot {where} holds other weights than "
            f"another replica of expert {int(slots_LS[layer, where])}; load the checkpoint "
            "anew"
        )
    return checksum_LE
