"""How many slots each expert gets: replicas go, one by one, to the largest load per replica.

This is the replication step of DeepSeek's EPLB and minimises the largest replica, in float32 as
there. Shape letters: X rows, E experts, S slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import IntArray

__all__ = ["replicate"]


def replicate(
    load_XE: NDArray[np.float32], num_slots: int, max_replicas: int
) -> tuple[IntArray, IntArray, NDArray[np.float32]]:
    """Fill slots 0 to E-1 with the experts in order and each further one with a replica.

    Parameters
    ----------
    load_XE : array of float32
        Non-negative.
    num_slots : int
        S, at least E.
    max_replicas : int
        Most slots of one expert; at least S / E.

    Returns
    -------
    expert_XS : array of int64
        The expert in each slot.
    replica_XS : array of int64
        Which replica of its expert a slot holds, from 0.
    replica_load_XE : array of float32
        Load of one replica of each expert.
    """
    num_rows, num_experts = load_XE.shape
    expert_XS = np.empty((num_rows, num_slots), np.int64)
    expert_XS[:, :num_experts] = np.arange(num_experts)
    replica_XS = np.zeros((num_rows, num_slots), np.int64)
    replica_load_XE = load_XE.copy()
    count_XE = np.ones((num_rows, num_experts), np.float32)
    first_X = np.arange(num_rows) * num_experts
    load, replica_load, count = (a.reshape(-1) for a in (load_XE, replica_load_XE, count_XE))
    capped: list[tuple[IntArray, NDArray[np.float32]]] = []
    for slot in range(num_experts, num_slots):
        expert_X = replica_load_XE.argmax(axis=1)
        cell_X = first_X + expert_X
        expert_XS[:, slot] = expert_X
        num_replicas_X = count[cell_X]
        replica_XS[:, slot] = num_replicas_X
        num_replicas_X += 1
        count[cell_X] = num_replicas_X
        replica_load[cell_X] = load[cell_X] / num_replicas_X
        if slot - num_experts + 2 >= max_replicas:
            # An expert at its cap is kept out of the race by a load below all others.
            full_X = cell_X[num_replicas_X >= max_replicas]
            capped.append((full_X, replica_load[full_X]))
            replica_load[full_X] = -1.0
    for cells, loads in capped:
        replica_load[cells] = loads
    return expert_XS, replica_XS, replica_load_XE
