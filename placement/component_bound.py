"""A bound for every split rule from how few slots join ranks together.

Experts and ranks with an edge for each replica make a graph. However the tokens are split, those of
a connected component stay on its ranks, and a component of n experts and r ranks needs n + r - 1
replicas. So experts fall into groups, a group of total load w has ``r >= w / T`` ranks, and
``n + r - 1 <= K r``; a target T for the largest rank load that no grouping reaches within R ranks
is out of reach. All groupings are looked at, by dynamic programming over sets of experts. With one
window the best of them is a placement as well (:mod:`eplb.placement.components`), and an optimum.
Importing this module costs numba. Shape letters: E logical experts, K slots of a rank, R ranks.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from eplb.arrays import FloatArray, IntArray

__all__ = ["component_bound"]

# The bound is this near to the best there is of its kind.
_PRECISION = 2e-7
# Ranks of a group that no ranks can hold.
_NEVER = 1 << 40
# Against rounding, in favour of "T can be reached".
_SLACK = 1e-9


def component_bound(
    load_E: FloatArray, num_ranks: int, slots_per_rank: int, low: float, high: float
) -> tuple[float, IntArray | None]:
    """Return a bound on the largest rank load, and the components that come near to it.

    Parameters
    ----------
    load_E : array of float64
        Non-negative. Each of some 20 targets costs 3^E / 2 steps.
    num_ranks, slots_per_rank : int
    low, high : float
        A bound known before, and the objective of a placement: the bound is between them.

    Returns
    -------
    bound : float
    group_E : array of int64 or None
        The component of each expert, whose largest mean rank load is within 2e-7 of the bound; None
        where nothing is below ``high``.
    """
    group_E = None
    target = high * (1 - _PRECISION)
    while high > low * (1 + _PRECISION):
        fewest, groups_E = _best_groups(load_E, slots_per_rank, target)
        if fewest > num_ranks:
            low = target
        else:
            high, group_E = target, groups_E
        target = (low + high) / 2
    return low, group_E


@njit(cache=True, nogil=True)
def _best_groups(load_E: FloatArray, slots_per_rank: int, target: float) -> tuple[int, IntArray]:
    """Return the fewest ranks over all groupings of the experts, and each expert's group."""
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
            own[held] = _NEVER
        elif size[held] > 1:
            joints = slots_per_rank - 1
            own[held] = max(own[held], (size[held] - 1 + joints - 1) // joints)
    fewest: IntArray = np.zeros(num_sets, np.int64)
    best_group: IntArray = np.zeros(num_sets, np.int64)
    for held in range(1, num_sets):
        lowest = held & -held
        others = held ^ lowest
        # The group of the lowest expert: every set of the others, none of them last.
        least, group, part = own[held], held, others
        while part > 0:
            part = (part - 1) & others
            needed = own[part | lowest] + fewest[others ^ part]
            if needed < least:
                least, group = needed, part | lowest
        fewest[held], best_group[held] = least, group
    group_E: IntArray = np.zeros(len(load_E), np.int64)
    held, number = num_sets - 1, 0
    while held > 0:
        for e in range(len(load_E)):
            if best_group[held] >> e & 1:
                group_E[e] = number
        held, number = held ^ best_group[held], number + 1
    return int(fewest[-1]), group_E
