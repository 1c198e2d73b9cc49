"""Placements for the ``batch`` rule whose replicas connect all ranks alike.

When every batch is split at its best, an expert on two ranks is a connection through which load
flows from the one to the other, and what a rank can get rid of depends on how many ranks it can
reach through how much. A ring, and with more replicas a circulant graph, gives every rank the same
number of connections and cuts no part off; that also holds for loads that were never seen.

Shape letters: E logical experts, R ranks, K slots of a rank.
"""

from __future__ import annotations

import numpy as np

from eplb.arrays import FloatArray, IntArray

__all__ = ["ring_placement"]

# Steps after the first follow the golden ratio, which spreads the further connections widely.
_GOLDEN = 0.6180339887498949


def ring_placement(load_E: FloatArray, num_ranks: int, slots_per_rank: int) -> IntArray | None:
    """Return slots [R, K] in which the hottest experts connect each rank with others, or None.

    Each redundant slot makes a connection: the S - E hottest experts have two replicas, the first
    R of them on neighbouring ranks, the next R a step further apart, and so on. The others go, by
    falling load, to the emptiest rank with room. None if there are not enough redundant slots to
    close a ring, or more than experts.
    """
    num_experts = len(load_E)
    num_edges = num_ranks * slots_per_rank - num_experts
    if not num_ranks <= num_edges <= num_experts or num_ranks < 3:
        return None
    slot_RK = np.full((num_ranks, slots_per_rank), -1)
    filled_R = np.zeros(num_ranks, np.int64)
    load_R = np.zeros(num_ranks)

    def place(expert: int, rank: int, load: float) -> None:
        slot_RK[rank, filled_R[rank]] = expert
        filled_R[rank] += 1
        load_R[rank] += load

    order = np.argsort(-load_E, kind="stable").tolist()
    steps = _steps(num_ranks, -(-num_edges // num_ranks))
    for number, expert in enumerate(order[:num_edges]):
        rank = number % num_ranks
        other = (rank + steps[number // num_ranks]) % num_ranks
        if max(filled_R[rank], filled_R[other]) >= slots_per_rank:
            # The last, incomplete round may meet ranks that are full.
            room = np.flatnonzero(filled_R < slots_per_rank)
            if len(room) < 2:
                return None
            rank, other = room[np.argsort(filled_R[room], kind="stable")[:2]].tolist()
        for end in (rank, other):
            place(expert, end, load_E[expert] / 2)
    for expert in order[num_edges:]:
        room = np.flatnonzero(filled_R < slots_per_rank)
        place(expert, int(room[load_R[room].argmin()]), load_E[expert])
    return slot_RK


def _steps(num_ranks: int, count: int) -> list[int]:
    steps = [1]
    number = 1
    while len(steps) < count:
        number += 1
        # From 2 to half way round, where a step and its opposite are the same.
        step = 2 + int(number * _GOLDEN % 1.0 * max(num_ranks // 2 - 1, 1))
        if step not in steps or number > 4 * num_ranks:
            steps.append(min(step, num_ranks - 1))
    return steps
