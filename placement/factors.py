"""Non-negative factors: recorded windows as mixes of a few kinds of traffic.

Shape letters: W windows, F factors, X loads of a window, in any order.
"""

from __future__ import annotations

import math
import time

import numpy as np

from eplb.arrays import FloatArray

__all__ = ["factor_loads", "factorize"]

# Steps of fitting loads to factors whose parts are known.
LOAD_STEPS = 5
# Updates to this power converge below 2, faster than plain ones (Salakhutdinov and Roweis, Adaptive
# overrelaxed bound optimization methods, ICML 2003).
RELAXATION = 1.8


def factorize(
    load_WX: FloatArray,
    num_factors: int,
    *,
    steps: int,
    first: int | None = None,
    deadline: float = math.inf,
) -> FloatArray:
    """Return the part that each factor has in each window, [W, F], up to scale.

    Minimises the Kullback-Leibler divergence, that is, takes counts for Poisson, by the updates of
    Lee and Seung (NIPS 13, 2000), from windows that are least like each other (successive
    projection: Araujo et al., Chemom. Intell. Lab. Syst. 57, 2001).

    Parameters
    ----------
    load_WX : array of float32 or float64
    num_factors : int
        At most; windows that are alike have fewer.
    steps : int
        Updates.
    first : int, optional
        The window to start from instead of the one that is least like the mean.
    deadline : float
        Of ``time.perf_counter``: fewer updates where it comes first.
    """
    mean_X = load_WX.mean(axis=0)
    used_X = mean_X > 0
    load_WX, mean_X = load_WX[:, used_X], mean_X[used_X]
    rest_WX = (load_WX - mean_X) / np.sqrt(mean_X)
    chosen: list[int] = []
    for _ in range(num_factors):
        norm_W = np.square(rest_WX).sum(axis=1)
        window = first if not chosen and first is not None else int(norm_W.argmax())
        chosen.append(window)
        if norm_W[window] <= 0:
            break
        direction_X = rest_WX[window] / np.sqrt(norm_W[window])
        rest_WX = rest_WX - np.outer(rest_WX @ direction_X, direction_X)
    factor_FX = np.maximum(load_WX[chosen], 1e-6 * mean_X)
    part_WF = np.full((len(load_WX), len(chosen)), 1.0 / len(chosen), load_WX.dtype)
    for _ in range(steps):
        if time.perf_counter() > deadline:
            break
        change_WF = _quotient(load_WX, part_WF, factor_FX) @ factor_FX.T / factor_FX.sum(axis=1)
        part_WF *= change_WF**RELAXATION
        factor_FX *= _change(load_WX, part_WF, factor_FX) ** RELAXATION
    return part_WF


def factor_loads(load_WX: FloatArray, part_WF: FloatArray) -> FloatArray:
    """Return the loads of factors whose parts are known, [F, X]."""
    least_X = 0.05 * load_WX.mean(axis=0)
    factor_FX: FloatArray = np.maximum(np.linalg.pinv(part_WF) @ load_WX, least_X)
    for _ in range(LOAD_STEPS):
        factor_FX *= _change(load_WX, part_WF, factor_FX)
    return factor_FX


def _quotient(load_WX: FloatArray, part_WF: FloatArray, factor_FX: FloatArray) -> FloatArray:
    quotient: FloatArray = np.maximum(part_WF @ factor_FX, 1e-12)
    return np.divide(load_WX, quotient, out=quotient)


def _change(load_WX: FloatArray, part_WF: FloatArray, factor_FX: FloatArray) -> FloatArray:
    total_F1 = np.maximum(part_WF.sum(axis=0), 1e-12)[:, np.newaxis]
    change_FX: FloatArray = part_WF.T @ _quotient(load_WX, part_WF, factor_FX) / total_F1
    return change_FX
