"""Give every expert a slot again on the ranks that stay, and fill slots that are empty.

What :mod:`eplb.placement.repair` and :mod:`eplb.placement.resize` have in common; layer by layer,
in threads.

Shape letters: W windows, L layers, E logical experts, R ranks, K slots of a rank.
"""

from __future__ import annotations

import heapq
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from eplb.arrays import FloatArray, IntArray, frozen_array
from eplb.load_profile import LoadProfile
from eplb.placement.windows import scaled_windows, window_weights
from eplb.plan import Plan
from eplb.slots import EMPTY
from eplb.topology import Topology

__all__ = ["Refill", "layer_loads", "refill"]

# 2 ** 4 = 16, the power that stands for the largest load; the ranks that fills relieve; how often
# a restored expert looks for a better slot.
DOUBLINGS, HOT_RANKS, SWEEPS = 4, 4, 3
NO_SLOT = -2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refill:
    """Slots that hold every expert.

    Parameters
    ----------
    restored_LRK : array of int64
        Every expert that had no slot has one, in an empty slot or that of a redundant replica.
    filled_LRK : array of int64
        Then empty slots were filled, as far as that gains and is allowed.
    num_lost, num_filled : int
        Experts restored, and slots filled.
    """

    restored_LRK: IntArray
    filled_LRK: IntArray
    num_lost: int
    num_filled: int

    def __post_init__(self) -> None:
        for name in ("restored_LRK", "filled_LRK"):
            object.__setattr__(self, name, frozen_array(getattr(self, name), np.int64))


def layer_loads(plan: Plan, profile: LoadProfile | None, topology: Topology) -> FloatArray:
    """Return the loads of a plan's layers at a mean load / speed of 1, shape [W, L, E].

    Layers without load in the profile, and all without a profile, load each expert alike.
    """
    model, placement = plan.model, plan.placement
    capacity = float(topology.speed_R.sum())
    num_windows = 1 if profile is None else profile.num_windows
    load_WLE = np.full(
        (num_windows, placement.num_layers, model.num_experts), capacity / model.num_experts
    )
    if profile is not None:
        scaled_WLE = scaled_windows(profile, topology.num_ranks) * (capacity / topology.num_ranks)
        load_WLE[:, placement.rows(profile.layer_ids)] = scaled_WLE
    return load_WLE


def refill(
    load_WLE: FloatArray, slots_LRK: IntArray, topology: Topology, *, max_fills: int = 0
) -> Refill:
    """Restore the experts that no slot holds, each with one fetch, and fill empty slots.

    Parameters
    ----------
    load_WLE : array of float64
        As :func:`layer_loads` gives them.
    slots_LRK : array of int64
        What the ranks of the topology hold; -1 where a slot is empty or a rank has none.
    topology : Topology
        With at least as many usable slots as experts; its ranks out of service hold nothing.
    max_fills : int
        Empty slots that may be filled beyond what restoring takes, over all layers; those go first
        that gain most.
    """
    from eplb.placement.refill_kernel import refill_layer  # noqa: PLC0415  (numba)

    ranks = topology.ranks_in_service
    inner_LRK = np.where(topology.has_slot_RK, slots_LRK, NO_SLOT)[:, ranks]
    weight_WL = window_weights(load_WLE)
    weight_WL /= np.maximum(weight_WL.sum(axis=0), np.finfo(float).tiny)
    order_LE = np.argsort(-load_WLE.sum(axis=0), axis=1, kind="stable")
    speed_R = topology.speed_R[ranks]

    def one(layer: int) -> tuple[IntArray, IntArray, IntArray, FloatArray]:
        lost_X = order_LE[layer][~np.isin(order_LE[layer], inner_LRK[layer])]
        empty = int((inner_LRK[layer] == EMPTY).sum())
        slots, place, fills, objective = refill_layer(
            np.ascontiguousarray(load_WLE[:, layer].T),
            np.ascontiguousarray(weight_WL[:, layer]),
            speed_R,
            np.ascontiguousarray(inner_LRK[layer]),
            lost_X,
            min(max_fills, empty),
            DOUBLINGS,
            HOT_RANKS,
            SWEEPS,
        )
        return slots, place, fills, objective

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        found = list(threads.map(one, range(len(slots_LRK))))
    taken_L = _divide([objective for *_, objective in found], max_fills)
    restored_LRK, filled_LRK = (np.full(slots_LRK.shape, EMPTY) for _ in range(2))
    for layer, ((slots, _, fills, _), taken) in enumerate(zip(found, taken_L, strict=True)):
        kept_RK = np.maximum(slots, EMPTY)
        kept_RK[tuple(fills[taken:].T)] = EMPTY
        filled_LRK[layer, ranks] = kept_RK
        kept_RK[tuple(fills[:taken].T)] = EMPTY
        restored_LRK[layer, ranks] = kept_RK
    return Refill(
        restored_LRK=restored_LRK,
        filled_LRK=filled_LRK,
        num_lost=sum(len(place) for _, place, *_ in found),
        num_filled=sum(taken_L),
    )


def _divide(objective_LF: list[FloatArray], max_fills: int) -> list[int]:
    """Return how many of its fills each layer makes: always the next one that gains most."""
    taken_L = [0] * len(objective_LF)
    heap = [(-float(o[0] - o[1]), layer) for layer, o in enumerate(objective_LF) if len(o) > 1]
    heapq.heapify(heap)
    for _ in range(max_fills):
        if not heap:
            break
        _, layer = heapq.heappop(heap)
        taken_L[layer] += 1
        ahead = objective_LF[layer][taken_L[layer] :]
        if len(ahead) > 1:
            heapq.heappush(heap, (-float(ahead[0] - ahead[1]), layer))
    return taken_L
