"""A bound for every split rule from how few slots join ranks together.

Experts and ranks with an edge for each replica make a graph. However the tokens are split, those of
a connected component stay on its ranks, and a component of n experts and r ranks needs n + r - 1
replicas. So experts fall into groups, a group of total load w has ``r >= w / T`` ranks, and
``n + r - 1 <= K r``; a target T for the largest rank load that no grouping reaches within R ranks
is out of reach. All groupings are looked at, by dynamic programming over sets of experts.
Importing this module costs numba. Shape letters: E logical experts, K slots of a rank, R ranks.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from eplb.arrays import FloatArray, IntArray

__all__ = ["component_bound"]

# The bound is this near to the best there is of its kind.
_PRECISION = 2e-7
# Against rounding, in favour of "T can be reached".
_SLACK = 1e-9


def component_bound(
    load_E: FloatArray, num_ranks: int, slots_per_rank: int, low: float, high: float
) -> float:
    """Return a bound on the largest rank load, at least ``low`` and at most ``high``.

    Parameters
    ----------
    load_E : array of float64
        Non-negative. Each of some 20 targets costs 3^E / 2 steps.
    num_ranks, slots_per_rank : int
    low, high : float
        A bound known before, and the objective of a placement.
    """
    if len(load_E) - 1 <= num_ranks * (slots_per_rank - 1):
        # All in one component is possible, and that says no more than the mean.
        return low
    target = high * (1 - _PRECISION)
    while high > low * (1 + _PRECISION):
        if _ranks_needed(load_E, slots_per_rank, target) > num_ranks:
            low = target
        else:
            high = target
        target = (low + high) / 2
    return low


@njit(cache=True, nogil=True)
def _ranks_needed(load_E: FloatArray, slots_per_rank: int, target: float) -> int:
    """Return the fewest ranks over all groupings of the experts."""
    num_sets = 1 << len(load_E)
    own: IntArray = np.zeros(num_sets, np.int64)
    load = np.zeros(num_sets)
    size = np.zeros(num_sets, np.int64)
    for held in range(1, num_sets):
        e = 0
        while not held >> e & 1:
            e += 1
        rest = held & (held - 1)
        load[held] = load[rest] + load_E[e]
        size[held] = size[rest] + 1
        own[held] = max(1, int(np.ceil(load[held] / target * (1.0 - _SLACK))))
        if size[held] > 1 and slots_per_rank == 1:
            own[held] = num_sets
        elif size[held] > 1:
            joints = slots_per_rank - 1
            own[held] = max(own[held], (size[held] - 1 + joints - 1) // joints)
    fewest: IntArray = np.zeros(num_sets, np.int64)
    for held in range(1, num_sets):
        lowest = held & -held
        others = held ^ lowest
        # The group of the lowest expert: every set of the others, none of them last.
        least, part = own[held], others
        while part > 0:
            part = (part - 1) & others
            least = min(least, own[part | lowest] + fewest[others ^ part])
        fewest[held] = least
    return int(fewest[-1])
