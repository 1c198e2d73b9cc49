"""What both annealings share: a layer, and the small compiled parts that their loops are made of.

Used by :mod:`eplb.placement.annealing` with its moves (:mod:`eplb.placement.anneal_moves`) and by
:mod:`eplb.placement.batch_annealing`. Numba's cache looks at the file of the function it kept, not
at this one: after a change here, ``__pycache__`` of this folder has to go.

Shape letters: W windows, E logical experts, R ranks, K slots of a rank.
"""

from __future__ import annotations

from math import exp
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from eplb.arrays import FloatArray

__all__ = [
    "EVEN",
    "NEAREST",
    "RULES",
    "WEIGHTED",
    "Layer",
    "accepts",
    "add_scaled",
    "can_swap",
    "copy_row",
    "copy_rows",
    "fill",
    "index_slots",
    "inner",
    "random_below",
    "random_unit",
    "rank_cost",
    "set_slopes",
    "to_power",
]

EVEN, NEAREST, WEIGHTED = 0, 1, 2
# `batch` has an inner loop of its own, which uses no shares.
RULES = {"even": EVEN, "nearest": NEAREST, "weighted": WEIGHTED, "batch": EVEN}


class Layer(NamedTuple):
    """One layer's loads, its slots, and what the search knows of them.

    Made by :mod:`eplb.placement.search`; slots and shares change in place.

    Parameters
    ----------
    load_EW : array of float64
        Scaled so that the mean rank load of each window is 1.
    weight_W : array of float64
        Non-negative, adds up to 1.
    node_E : array of int64
        The node an expert has to stay in, or -1.
    slot_RK : array of int64
        The expert in each slot, no expert twice on a rank.
    share_RK : array of float64
        The fraction of its expert's tokens that a slot receives.
    rule : int
        ``EVEN``, ``NEAREST`` or ``WEIGHTED``.
    ranks_per_node : int
    random : array of uint64, shape [1]
        State of the random numbers.
    """

    load_EW: FloatArray
    weight_W: FloatArray
    node_E: NDArray[np.int64]
    slot_RK: NDArray[np.int64]
    share_RK: FloatArray
    rule: int
    ranks_per_node: int
    random: NDArray[np.uint64]


def inner(**options: Any) -> Any:
    """Compile a function that compiled functions call: without what Python would call it by."""
    compiler: Any = njit
    return compiler(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)


@inner()
def random_unit(state):  # type: ignore[no-untyped-def]
    """Xorshift (Marsaglia, J. Stat. Softw. 8, 2003): the next number in [0, 1)."""
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return np.float64(x >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@inner()
def random_below(state, n):  # type: ignore[no-untyped-def]
    """Return a random whole number below n."""
    return int(random_unit(state) * n)


# Loops in place of array expressions, which take numba seconds each to compile.
@inner()
def fill(target, value):  # type: ignore[no-untyped-def]
    """Set every entry."""
    for i in range(len(target)):
        target[i] = value


@inner()
def copy_row(target, source):  # type: ignore[no-untyped-def]
    """Copy entries."""
    for i in range(len(target)):
        target[i] = source[i]


@inner()
def copy_rows(target, source):  # type: ignore[no-untyped-def]
    """Copy rows."""
    for i in range(len(target)):
        copy_row(target[i], source[i])


@inner(fastmath=True)
def add_scaled(target, factor, source):  # type: ignore[no-untyped-def]
    """Add a multiple."""
    for i in range(len(target)):
        target[i] += factor * source[i]


@inner(fastmath=True)
def to_power(v, doublings):  # type: ignore[no-untyped-def]
    """Return v ** 2 ** doublings, for 4 to 7 doublings.

    A loop in here would keep the loops over windows around it from being vectorized, which makes
    them four times as fast; a choice that no window changes does not.
    """
    v *= v
    v *= v
    v *= v
    v *= v
    if doublings > 4:
        v *= v
    if doublings > 5:
        v *= v
    if doublings > 6:
        v *= v
    return v


@inner(fastmath=True)
def rank_cost(load_W, slope_W, doublings):  # type: ignore[no-untyped-def]
    """Return what a rank costs: its loads to the power P, weighed by the slopes."""
    total = 0.0
    for w in range(load_W.shape[0]):
        total += slope_W[w] * to_power(load_W[w], doublings)
    return total


@inner(fastmath=True)
def set_slopes(slope_W, weight_W, load_RW, doublings):  # type: ignore[no-untyped-def]
    """Set the slopes of the tangent of each window's norm (see :mod:`eplb.placement.annealing`)."""
    exponent = 2.0**doublings
    fill(slope_W, 0.0)
    for r in range(load_RW.shape[0]):
        for w in range(load_RW.shape[1]):
            slope_W[w] += to_power(load_RW[r, w], doublings)
    for w in range(load_RW.shape[1]):
        slope_W[w] = weight_W[w] / exponent * slope_W[w] ** (1.0 / exponent - 1.0)


@inner()
def index_slots(slot_RK, count_E, holder_ER, place_ER):  # type: ignore[no-untyped-def]
    """Fill in how many replicas each expert has, on which ranks, and in which slots of them."""
    fill(count_E, 0)
    for e in range(len(count_E)):
        fill(place_ER[e], -1)
    for r in range(slot_RK.shape[0]):
        for k in range(slot_RK.shape[1]):
            e = slot_RK[r, k]
            if e >= 0:
                holder_ER[e, count_E[e]] = r
                count_E[e] += 1
                place_ER[e, r] = k


@inner()
def can_swap(place_ER, node_E, ranks_per_node, r, s, e, f):  # type: ignore[no-untyped-def]
    """Tell whether rank r may get expert f and rank s expert e; -1 is an empty slot."""
    if (e >= 0 and place_ER[e, s] >= 0) or (f >= 0 and place_ER[f, r] >= 0):
        return False
    if r // ranks_per_node == s // ranks_per_node:
        return True
    return (e < 0 or node_E[e] < 0) and (f < 0 or node_E[f] < 0)


@inner()
def accepts(random, change, temperature):  # type: ignore[no-untyped-def]
    """Decide by the rule of Metropolis et al. (J. Chem. Phys. 21, 1953)."""
    return change <= 0.0 or random_unit(random) < exp(-change / temperature)
