"""Follow the traffic from the placement in force: the best balance for each number of moves.

Each layer is repaired on its own (:mod:`eplb.placement.repair_kernel`), and moves go to the layers
in which they gain most. Recent windows count more than old ones: traffic drifts.

Shape letters: W windows, L layers, E logical experts, S slots, R ranks, K slots of a rank, M moves.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput, PlacementInvalid
from eplb.load_profile import LoadProfile
from eplb.placement.keep_slots import count_moves, keep_slots
from eplb.placement.windows import scaled_windows, window_weights
from eplb.topology import Topology

__all__ = ["Replan", "break_even", "replan"]

# A window this many steps old counts 1/e of the last one.
MEMORY_STEPS = 50
# 2 ** 4 = 16, the power that stands for the largest load, and the ranks that moves relieve.
DOUBLINGS, HOT_RANKS = 4, 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replan:
    """Placements of few moves.

    Parameters
    ----------
    phys_to_log_LS : array of int64
        The placement that uses the moves allowed as far as they gain.
    num_moves : int
        Experts that ranks have to fetch for it.
    curve : list of (int, float)
        Pareto curve: moves, and the mean over layers of the weighted imbalance then reached.
    """

    phys_to_log_LS: IntArray
    num_moves: int
    curve: list[tuple[int, float]]


def replan(
    profile: LoadProfile,
    phys_to_log_LS: IntArray,
    topology: Topology,
    *,
    max_moves: int,
    max_moves_per_layer: int | None = None,
) -> Replan:
    """Search from a placement under a limit on moves, for the split rule ``even``.

    Parameters
    ----------
    profile : LoadProfile
        The past, oldest window first.
    phys_to_log_LS : array of int64
        The placement in force, of the profile's layers.
    topology : Topology
    max_moves : int
        Over all layers.
    max_moves_per_layer : int, optional
        Where left out, a layer takes up to half as much again as its part.

    Raises
    ------
    InvalidInput
        A limit is negative.
    PlacementInvalid
        An expert is twice on a rank, which the search does not keep.
    """
    if max_moves < 0 or (max_moves_per_layer is not None and max_moves_per_layer < 0):
        raise InvalidInput("the limit on moves must be at least 0")
    num_layers, num_slots = phys_to_log_LS.shape
    old_LRK = phys_to_log_LS.reshape(num_layers, topology.num_ranks, -1)
    ordered = np.sort(old_LRK, axis=2)
    if ((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any():
        raise PlacementInvalid(
            "the plan has replicas of an expert on one rank, which replan does not keep; plan "
            "anew without --shared-ranks"
        )
    per_layer = max_moves_per_layer
    if per_layer is None:
        per_layer = -(-3 * max_moves // (2 * num_layers))
    per_layer = min(per_layer, max_moves, num_slots)
    load_WLE = scaled_windows(profile, topology.num_ranks)
    age_W = np.arange(len(load_WLE))[::-1]
    weight_WL = window_weights(load_WLE) * np.exp(-age_W / MEMORY_STEPS)[:, np.newaxis]
    weight_WL /= np.maximum(weight_WL.sum(axis=0), np.finfo(float).tiny)
    best_LMRK, objective_LM = _layers(load_WLE, weight_WL, old_LRK, per_layer)
    moves_L, curve = _divide(objective_LM, max_moves)
    new_LS = np.stack(
        [best[moves].reshape(-1) for best, moves in zip(best_LMRK, moves_L, strict=True)]
    )
    # Swaps change slots of a rank too; experts that stay go back to theirs.
    new_LS = _same_slots(new_LS, phys_to_log_LS, topology.num_ranks)
    return Replan(
        phys_to_log_LS=new_LS,
        num_moves=count_moves(phys_to_log_LS, new_LS, topology.num_ranks),
        curve=curve,
    )


def break_even(
    curve: list[tuple[int, float]], *, step_s: float, horizon_steps: int, move_s: float
) -> tuple[int, float]:
    """Return the number of moves that saves the most time, and the seconds it saves.

    Steps are taken to last as long as their imbalance says: a step of imbalance 1 takes
    ``step_s``, of which only the expert layers may be meant.
    """
    before = curve[0][1]
    worth = [
        ((before - imbalance) * step_s * horizon_steps - moves * move_s, moves)
        for moves, imbalance in curve
    ]
    saved, moves = max(worth, key=lambda pair: (pair[0], -pair[1]))
    return moves, saved


def _layers(
    load_WLE: FloatArray, weight_WL: FloatArray, old_LRK: IntArray, max_moves: int
) -> tuple[list[IntArray], FloatArray]:
    from eplb.placement.repair_kernel import repair_layer  # noqa: PLC0415  (numba)

    def one(layer: int) -> tuple[IntArray, FloatArray]:
        best, objective = repair_layer(
            np.ascontiguousarray(load_WLE[:, layer].T),
            np.ascontiguousarray(weight_WL[:, layer]),
            np.ascontiguousarray(old_LRK[layer]),
            max_moves,
            DOUBLINGS,
            HOT_RANKS,
        )
        return best, objective

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        found = list(threads.map(one, range(len(old_LRK))))
    return [best for best, _ in found], np.stack([objective for _, objective in found])


def _divide(objective_LM: FloatArray, max_moves: int) -> tuple[IntArray, list[tuple[int, float]]]:
    """Divide moves over layers: always the step of a layer that gains most for each move."""
    moves_L = np.zeros(len(objective_LM), np.int64)
    curve = [(0, float(objective_LM[:, 0].mean()))]
    while True:
        best = (0.0, 0, 0)
        for layer, objective_M in enumerate(objective_LM):
            now = moves_L[layer]
            left = max_moves - int(moves_L.sum())
            ahead = objective_M[now + 1 : now + 1 + left]
            if len(ahead):
                gain_M = (objective_M[now] - ahead) / np.arange(1, len(ahead) + 1)
                best = max(best, (float(gain_M.max()), layer, int(gain_M.argmax()) + 1))
        if best[0] <= 0:
            return moves_L, curve
        moves_L[best[1]] += best[2]
        reached = objective_LM[np.arange(len(moves_L)), moves_L].mean()
        curve.append((int(moves_L.sum()), float(reached)))


def _same_slots(new_LS: IntArray, old_LS: IntArray, num_ranks: int) -> IntArray:
    """Return the same experts on the same ranks, those that stay in their old slots."""
    # One rank at a time cannot be exchanged with another.
    shape = new_LS.shape
    rows = keep_slots(
        new_LS.reshape(shape[0] * num_ranks, -1), old_LS.reshape(shape[0] * num_ranks, -1), 1
    )
    return rows.reshape(shape)
