"""Placements that a search starts from, made for a split rule and for how many slots ranks have.

Importing this module costs numba. Shape letters: L layers, E logical experts, S slots.
"""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.placement.components import place_in_components
from eplb.placement.node_spread import spread_over_nodes
from eplb.placement.pairs import search_pairs
from eplb.placement.windows import scaled_windows
from eplb.problem import Problem

__all__ = ["component_slots", "is_pairs", "node_slots", "pair_slots"]

# The search of pairs looks at counts in rounds (10 ms a layer) as long as time allows. Most of a
# time limit is theirs, since annealing does not improve on pairs.
_PAIR_EVALUATIONS, _PAIR_ROUNDS, _PAIR_PART = 4_000, 16, 0.8
# Steps of the search of components for each layer, the time of one, and their part of a limit.
_COMPONENT_STEPS, _COMPONENT_STEP_S, _COMPONENT_PART = 3_000, 2e-5, 0.5


def is_pairs(problem: Problem) -> bool:
    """Tell whether every rank holds two slots of one window, which :func:`pair_slots` is for."""
    return (
        problem.topology.slots_per_rank == 2
        and problem.split in ("even", "nearest")
        and problem.profile.num_windows == 1
    )


def pair_slots(problem: Problem, seed: int, time_limit_s: float | None) -> IntArray:
    """Search the replica counts of each layer's pairs; return slots, shape [L, S]."""
    num_ranks = problem.topology.num_ranks
    load_LE = scaled_windows(problem.profile, num_ranks)[0]
    num_threads = len(os.sched_getaffinity(0))
    layer_s = math.inf
    if time_limit_s is not None:
        layer_s = _PAIR_PART * time_limit_s / -(-len(load_LE) // num_threads)

    def one(load_E: FloatArray) -> IntArray:
        end_s = time.perf_counter() + layer_s
        row_S = search_pairs(load_E, num_ranks, evaluations=_PAIR_EVALUATIONS, seed=seed)
        for number in range(1, _PAIR_ROUNDS):
            if time.perf_counter() >= end_s:
                break
            row_S = search_pairs(
                load_E,
                num_ranks,
                start_E=np.bincount(row_S[row_S >= 0]),
                evaluations=_PAIR_EVALUATIONS,
                seed=seed + number,
            )
        return row_S

    with ThreadPoolExecutor(num_threads) as threads:
        return np.stack(list(threads.map(one, load_LE)))


def component_slots(
    problem: Problem, seed: int, time_limit_s: float | None
) -> tuple[IntArray, FloatArray]:
    """Return slots and fractions that are best, or nearly, for the mean load, shape [L, S]."""
    topology = problem.topology
    load_LE = problem.profile.mean_load_LE()
    num_threads = len(os.sched_getaffinity(0))
    steps = _COMPONENT_STEPS
    if time_limit_s is not None:
        spent_s = _COMPONENT_STEP_S * -(-len(load_LE) // num_threads)
        steps = min(steps, int(_COMPONENT_PART * time_limit_s / spent_s))

    def one(load_E: FloatArray) -> tuple[IntArray, FloatArray]:
        ranks, slots = topology.num_ranks, topology.slots_per_rank
        return place_in_components(load_E, ranks, slots, steps=steps, seed=seed)

    with ThreadPoolExecutor(num_threads) as threads:
        rows, fractions = zip(*threads.map(one, load_LE), strict=True)
    return np.stack(rows), np.stack(fractions)


def node_slots(problem: Problem, phys_to_log_LS: IntArray) -> IntArray:
    """Return the same ranks in nodes that suit ``nearest``, shape [L, S]."""
    rows = [
        spread_over_nodes(row_S, load_E, problem.topology)
        for row_S, load_E in zip(phys_to_log_LS, problem.profile.mean_load_LE(), strict=True)
    ]
    return np.stack(rows)
