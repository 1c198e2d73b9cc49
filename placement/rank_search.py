"""Branch and bound over what each rank holds, for rules that fix shares: even and nearest.

A target for the objective leaves each rank a narrow range of loads as long as it is near the mean:
what the ranks so far are below the target is missing for good, as no rank may be above it. So few
contents of a rank come into question, and a target that is out of reach is refuted at once. Targets
rise until one is reached; those before are bounds. The inner loop is compiled
(:mod:`eplb.placement.rank_kernel`).
Shape letters: W windows, E logical experts, S slots, R ranks, C classes.
"""

from __future__ import annotations

import time

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.placement.exact_shares import expert_classes
from eplb.slots import EMPTY
from eplb.topology import Topology

__all__ = ["place_by_ranks"]

# The first target, this much above the bound known before, and how the distance grows.
_FIRST_STEP, _GROWTH = 1e-5, 2.0
# Better placements are looked for that are better by this.
_MARGIN = 5e-7
# Steps of a first try, and how many more a next try of the same target has.
_STEPS, _MORE_STEPS = 4_000_000, 4
# Steps in a second, until they have been timed over this many: tries are cut to the time there is.
_STEPS_PER_S, _TIMED_STEPS = 3e6, 500_000


def place_by_ranks(
    load_WE: FloatArray,
    weight_W: FloatArray,
    topology: Topology,
    start: float,
    low: float,
    time_limit_s: float | None,
) -> tuple[list[IntArray], float]:
    """Return the placements found that are better than the start, and a bound on the objective.

    Parameters
    ----------
    load_WE, weight_W : arrays of float64
    topology : Topology
        One node for ``even``.
    start : float
        Objective of a placement that is known.
    low : float
        A bound known before.
    time_limit_s : float, optional
        Without it the optimum is found, however long it takes.
    """
    # Numba takes a second to import, and only this search needs it.
    from eplb.placement.rank_kernel import fill_ranks  # noqa: PLC0415

    end_s = None if time_limit_s is None else time.perf_counter() + time_limit_s
    num_ranks, per_node = topology.num_ranks, topology.ranks_per_node
    order_E = np.argsort(-(weight_W @ load_WE), kind="stable")
    load_WE = load_WE[:, order_E]
    class_C3 = np.array(list(expert_classes(topology, load_WE.shape[1])), np.int64)
    here_C, nodes_C, all_C = class_C3.T
    share_C = (per_node / here_C + (num_ranks - per_node * nodes_C) / all_C) / num_ranks
    load_ECW = np.ascontiguousarray(load_WE.T[:, np.newaxis] * share_C[:, np.newaxis])
    total_W = load_WE.sum(axis=1)
    # A rank with such a replica has at least its load, and some rank at least the mean.
    least_EC = np.maximum(load_ECW, total_W / num_ranks) @ weight_W
    rows: list[IntArray] = []
    distance, steps, rate = _FIRST_STEP, _STEPS, _STEPS_PER_S
    first_low = low
    while low < start * (1 - _MARGIN):
        target = min(first_low * (1 + distance), start * (1 - _MARGIN))
        if end_s is not None:
            left_s = end_s - time.perf_counter()
            if left_s <= 0:
                break
            steps = min(steps, max(1, int(left_s * rate)))
        allowed_EC = least_EC <= target
        began_s = time.perf_counter()
        if allowed_EC.any(axis=1).all():
            best_S, value, left = fill_ranks(
                load_ECW, class_C3, allowed_EC, weight_W, total_W,
                topology.num_nodes, num_ranks, topology.num_slots, target, _MARGIN, steps,
            )  # fmt: skip
        else:
            value, left = np.inf, 1
        if steps - left >= _TIMED_STEPS:
            rate = (steps - left) / (time.perf_counter() - began_s)
        if value < np.inf:
            start = value
            rows.append(np.append(order_E, EMPTY)[best_S])
        if left == 0:
            steps *= _MORE_STEPS
        else:
            # The search has ended: nothing is below what it found, or below the target.
            low = max(low, min(target, start * (1 - _MARGIN)))
            distance *= _GROWTH
    return rows, min(low, start)
