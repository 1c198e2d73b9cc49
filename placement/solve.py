"""Ask a solver, score its placement, and bound what any placement could reach."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np

from eplb.errors import unknown_name
from eplb.metrics import evaluate
from eplb.placement.bound import layer_bounds
from eplb.placement.greedy import place_greedy
from eplb.problem import Problem, Solution
from eplb.slots import Placement

__all__ = ["SOLVERS", "Solver", "solve"]

# Below this the objective is as low as the bound, up to rounding.
OPTIMAL_GAP = 1e-9


class Solver(Protocol):
    """Places experts; scoring, bound and status are the same for all solvers."""

    def __call__(
        self, problem: Problem, *, seed: int, time_limit_s: float | None
    ) -> tuple[Placement, str]:
        """Return a placement that keeps the problem's constraints, and why the solver stopped."""


def solve(
    problem: Problem, solver: str = "greedy", *, seed: int = 0, time_limit_s: float | None = None
) -> Solution:
    """Solve a problem.

    Parameters
    ----------
    problem : Problem
    solver : str
        A key of ``SOLVERS``.
    seed : int
        The same seed gives the same placement.
    time_limit_s : float, optional
        For solvers that go on as long as they are let; what is best by then is returned.

    Raises
    ------
    InvalidInput
        The solver is unknown.
    """
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    start = time.perf_counter()
    placement, stop_reason = SOLVERS[solver](problem, seed=seed, time_limit_s=time_limit_s)
    time_s = time.perf_counter() - start
    balance = evaluate(problem.profile, placement, problem.topology, problem.split)
    imbalance_L = np.array([layer.imbalance_mean for layer in balance.by_layer.values()])
    bound_L = np.minimum(layer_bounds(problem, imbalance_L), imbalance_L)
    # Layers weigh as in imbalance_mean: by the windows in which they have load.
    weight_L = np.count_nonzero(problem.profile.counts_WLE.any(axis=2), axis=0)
    bound = float(np.average(bound_L, weights=weight_L))
    gap = (balance.imbalance_mean - bound) / bound
    return Solution(
        placement=placement,
        balance=balance,
        objective=balance.imbalance_mean,
        bound=bound,
        gap=gap,
        bound_L=bound_L,
        status="optimal" if gap <= OPTIMAL_GAP else "feasible",
        stop_reason=stop_reason,
        solver=solver,
        seed=seed,
        time_s=time_s,
    )


def _greedy(
    problem: Problem,
    *,
    seed: int,
    time_limit_s: float | None,
) -> tuple[Placement, str]:
    """DeepSeek's algorithm on the mean load. Deterministic, and done before any time limit."""
    load_LE = problem.profile.mean_load_LE()
    # By a power of two into the range of float32: rounds as the counts themselves would.
    _, exponent = np.frexp(load_LE.max())
    hierarchical = problem.groups_in_nodes
    phys_to_log_LS, _ = place_greedy(
        np.ldexp(load_LE, -exponent).astype(np.float32),
        num_slots=problem.topology.num_slots,
        num_ranks=problem.topology.num_ranks,
        num_nodes=problem.topology.num_nodes if hierarchical else 1,
        num_groups=problem.model.num_groups if hierarchical else 1,
        distinct_ranks=problem.distinct_ranks,
    )
    placement = Placement(
        phys_to_log_LS=phys_to_log_LS,
        layer_ids=problem.profile.layer_ids,
        num_experts=problem.model.num_experts,
    )
    return placement, "finished"


SOLVERS: dict[str, Solver] = {"greedy": _greedy}
