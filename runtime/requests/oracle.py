"""The best assignment there is, by CP-SAT: seconds for small cases, offline only.

Shape letters: Q requests, D objectives, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput, SolverFailed, SolverUnavailable

__all__ = ["BestAssignment", "best_assignment"]

# Sizes are rounded to this many parts of the largest total: CP-SAT counts in whole numbers.
PARTS = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class BestAssignment:
    """An assignment with its proof.

    Parameters
    ----------
    rank_Q : array of int64
    objective, bound : float
        The largest level over ranks and objectives, and what no assignment goes below.
    status : str
        ``optimal`` or ``feasible``.
    """

    rank_Q: IntArray
    objective: float
    bound: float
    status: str


def best_assignment(
    size_QD: FloatArray,
    level_RD: FloatArray,
    *,
    max_requests: int | None = None,
    time_limit_s: float = 30.0,
    seed: int = 0,
) -> BestAssignment:
    """Assign every request so that the largest level of any rank in any objective is smallest.

    Parameters
    ----------
    size_QD : array of float64
        What a request adds in each objective, in units of that objective.
    level_RD : array of float64
        What ranks hold already.
    max_requests : int, optional
        New requests of a rank at most.
    time_limit_s : float
        The best found by then is returned.

    Raises
    ------
    SolverUnavailable
        OR-Tools is not installed.
    SolverFailed
        Nothing was found in time.
    """
    try:
        from ortools.sat.python import cp_model  # noqa: PLC0415
    except ImportError:
        raise SolverUnavailable("the oracle needs OR-Tools; pip install ortools") from None
    num_requests, num_ranks = len(size_QD), len(level_RD)
    if max_requests is not None and num_requests > max_requests * num_ranks:
        raise InvalidInput(
            f"{num_requests} requests do not fit on {num_ranks} ranks of {max_requests}"
        )
    scale = PARTS / max(float((size_QD.sum(axis=0) + level_RD.sum(axis=0)).max()), 1e-300)
    size = np.rint(size_QD * scale).astype(np.int64).tolist()
    level = np.rint(level_RD * scale).astype(np.int64).tolist()
    model = cp_model.CpModel()
    on = [[model.new_bool_var(f"on_{q}_{r}") for r in range(num_ranks)]
          for q in range(num_requests)]  # fmt: skip
    highest = model.new_int_var(0, 2 * PARTS, "highest")
    for row in on:
        model.add_exactly_one(row)
    for r in range(num_ranks):
        for d in range(size_QD.shape[1]):
            model.add(sum(size[q][d] * on[q][r] for q in range(num_requests)) + level[r][d]
                      <= highest)  # fmt: skip
        if max_requests is not None:
            model.add(sum(on[q][r] for q in range(num_requests)) <= max_requests)
    model.minimize(highest)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    status = solver.solve(model)
    if status not in {cp_model.OPTIMAL, cp_model.FEASIBLE}:
        raise SolverFailed(f"CP-SAT found no assignment in {time_limit_s} s; allow more time")
    rank_Q = np.array([[solver.value(x) for x in row].index(1) for row in on], np.int64)
    level_end = level_RD.copy()
    np.add.at(level_end, rank_Q, size_QD)
    return BestAssignment(
        rank_Q=rank_Q,
        objective=float(level_end.max(initial=0.0)),
        bound=solver.best_objective_bound / scale,
        status="optimal" if status == cp_model.OPTIMAL else "feasible",
    )
