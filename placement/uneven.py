"""The ``greedy`` solver for ranks that differ in slots or speed.

Replicas are counted as on equal ranks, and go by falling load to the rank that then has the least
load / speed, the classic rule for machines of different speeds (longest processing time first;
Gonzalez, Ibarra and Sahni, SIAM J. Comput. 6, 1977).

Shape letters: L layers, E logical experts, S slots of all ranks, R ranks, K slots of a rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray
from eplb.placement.replication import replicate
from eplb.slots import EMPTY
from eplb.topology import Topology

__all__ = ["place_uneven"]


def place_uneven(
    load_LE: NDArray[np.float32], topology: Topology, *, distinct_ranks: bool = True
) -> IntArray:
    """Return the expert in each slot, shape [L, R * K], -1 where a rank has no such slot.

    A slot also stays empty where the ranks with room all hold what is left to place.

    Parameters
    ----------
    load_LE : array of float32
        Non-negative loads with finite sums.
    topology : Topology
        With all ranks in service and at least as many slots as experts.
    distinct_ranks : bool
        Never place two replicas of an expert on one rank.
    """
    has_slot_RK, speed_R = topology.has_slot_RK, topology.speed_R
    num_slots, num_ranks = int(has_slot_RK.sum()), topology.num_ranks
    expert_LS, _, replica_load_LE = replicate(
        load_LE, num_slots, num_ranks if distinct_ranks else num_slots
    )
    rows = []
    for expert_S, replica_load_E in zip(expert_LS, replica_load_LE.astype(np.float64), strict=True):
        order = np.argsort(-replica_load_E[expert_S], kind="stable")
        held: list[list[int]] = [[] for _ in range(num_ranks)]
        load_R = np.zeros(num_ranks)
        room_R = has_slot_RK.sum(axis=1)
        for expert in expert_S[order].tolist():
            _place(expert, held, load_R, room_R, speed_R, replica_load_E, distinct_ranks)
        rows.append(
            [experts + [EMPTY] * (topology.slots_per_rank - len(experts)) for experts in held]
        )
    return np.array(rows).reshape(len(rows), -1)


def _place(
    expert: int,
    held: list[list[int]],
    load_R: FloatArray,
    room_R: IntArray,
    speed_R: FloatArray,
    replica_load_E: FloatArray,
    distinct: bool,
) -> None:
    """Put a replica on the best rank, by way of an exchange where those with room hold it."""
    weight = replica_load_E[expert]
    holders = [distinct and expert in experts for experts in held]
    after_R = (load_R + weight) / speed_R
    for rank in np.argsort(after_R, kind="stable").tolist():
        if room_R[rank] and not holders[rank]:
            held[rank].append(expert)
            load_R[rank] += weight
            room_R[rank] -= 1
            return
    for full in np.argsort(after_R, kind="stable").tolist():
        if holders[full]:
            continue
        for rank in np.flatnonzero(room_R).tolist():
            for at, other in enumerate(held[full]):
                if other not in held[rank]:
                    held[full][at] = expert
                    held[rank].append(other)
                    load_R[full] += weight - replica_load_E[other]
                    load_R[rank] += replica_load_E[other]
                    room_R[rank] -= 1
                    return
