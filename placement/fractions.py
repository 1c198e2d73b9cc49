"""The ``weighted`` rule: one fixed fraction a slot, the same in all windows, best for a placement.

Shape letters: W windows, E logical experts, S slots, R ranks, F filled slots.
"""

from __future__ import annotations

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import SolverFailed

__all__ = ["best_fractions", "fraction_objective"]


def best_fractions(
    load_WE: FloatArray, weight_W: FloatArray, phys_to_log_S: IntArray, num_ranks: int
) -> tuple[FloatArray, float]:
    """Return the fractions of least weighted mean largest rank load, shape [S], and that mean.

    Parameters
    ----------
    load_WE : array of float64
        Non-negative loads of one layer, in any unit near 1 (each window scaled to its mean rank
        load, as a rule).
    weight_W : array of float64
        Of the windows in the mean.
    phys_to_log_S : array of int
        The expert in each slot, -1 for an empty one; every expert has a slot.
    num_ranks : int
        Divides S.

    Raises
    ------
    SolverFailed
        The linear programme was not solved (HiGHS says why).

    Notes
    -----
    Fractions of an expert add up to 1, those of empty slots are 0. An exact optimum of
    ``min sum_w p_w t_w`` subject to ``sum of load * fraction on r <= t_w`` for all w and r.
    """
    # scipy.optimize takes a second to import, and only this rule needs it.
    from scipy.optimize import linprog  # noqa: PLC0415
    from scipy.sparse import coo_array  # noqa: PLC0415

    num_windows, num_experts = load_WE.shape
    filled = np.flatnonzero(phys_to_log_S >= 0)
    expert_F = phys_to_log_S[filled]
    rank_F = filled // (len(phys_to_log_S) // num_ranks)
    num_filled = len(filled)
    window_W1 = np.arange(num_windows)[:, np.newaxis]
    row_WR = window_W1 * num_ranks + np.arange(num_ranks)
    num_rows = row_WR.size
    upper = coo_array(
        (
            np.concatenate([load_WE[:, expert_F].reshape(-1), np.full(num_rows, -1.0)]),
            (
                np.concatenate([(window_W1 * num_ranks + rank_F).reshape(-1), row_WR.reshape(-1)]),
                np.concatenate(
                    [
                        np.tile(np.arange(num_filled), num_windows),
                        np.repeat(num_filled + np.arange(num_windows), num_ranks),
                    ]
                ),
            ),
        ),
        shape=(num_rows, num_filled + num_windows),
    )
    whole = coo_array(
        (np.ones(num_filled), (expert_F, np.arange(num_filled))),
        shape=(num_experts, num_filled + num_windows),
    )
    result = linprog(
        np.concatenate([np.zeros(num_filled), weight_W]),
        A_ub=upper.tocsr(),
        b_ub=np.zeros(num_rows),
        A_eq=whole.tocsr(),
        b_eq=np.ones(num_experts),
        bounds=(0, None),
        method="highs",
    )
    if result.x is None:
        raise SolverFailed(f"no split fractions were found: HiGHS says {result.message!r}")
    fraction_S = np.zeros(len(phys_to_log_S))
    fraction_S[filled] = np.maximum(result.x[:num_filled], 0.0)
    # The solver keeps its tolerance of 1e-7; a plan's fractions add up to 1.
    total_E = np.bincount(expert_F, fraction_S[filled], minlength=num_experts)
    fraction_S[filled] /= total_E[expert_F]
    return fraction_S, fraction_objective(load_WE, weight_W, phys_to_log_S, fraction_S, num_ranks)


def fraction_objective(
    load_WE: FloatArray,
    weight_W: FloatArray,
    phys_to_log_S: IntArray,
    fraction_S: FloatArray,
    num_ranks: int,
) -> float:
    """Return the weighted mean over windows of the largest rank load under fixed fractions."""
    load_WS = load_WE[:, np.maximum(phys_to_log_S, 0)] * fraction_S
    rank_load_WR = load_WS.reshape(len(load_WE), num_ranks, -1).sum(axis=2)
    return float(rank_load_WR.max(axis=1) @ weight_W)
