"""Ask a solver, score its placement, and bound what any placement could reach."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InfeasibleProblem, InvalidInput, PlacementInvalid, unknown_name
from eplb.metrics import Balance, evaluate
from eplb.placement.bound import layer_bounds
from eplb.placement.greedy import place_greedy
from eplb.problem import Problem, Solution
from eplb.slots import Placement

__all__ = ["SOLVERS", "Answer", "Effort", "Solver", "solve"]

# Below this the objective is as low as the bound, up to rounding.
OPTIMAL_GAP = 1e-9
# Greedy placements that a search may start from: of mean loads, of the largest of all windows, and
# between. A plan for loads that differ much has to have replicas of all that get hot.
START_BLENDS = (0.0, 0.5, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What a solver may spend, and from where.

    Parameters
    ----------
    seed : int
        The same seed and number of sweeps give the same placement.
    time_limit_s : float, optional
        Wall time; what is best by then is returned.
    sweeps : int, optional
        Of the search, for each layer; it has a default.
    extend : bool
        Let the search fit windows that may come, besides those recorded.
    start : Placement, optional
        A placement to improve on, in place of greedy ones.
    """

    seed: int = 0
    time_limit_s: float | None = None
    sweeps: int | None = None
    extend: bool = True
    start: Placement | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A placement that keeps the problem's constraints, and how a solver came to it.

    Parameters
    ----------
    placement : Placement
    stop_reason : str
    weight_WL : array of float64, optional
        Weights of the windows whose weighted mean bounds the statistic; for ``worst`` and ``cvar``.
    bound_L : array of float64, optional
        A bound on each layer's ``imbalance_mean`` that the solver proved.
    notes : mapping
        JSON values.
    """

    placement: Placement
    stop_reason: str = "finished"
    weight_WL: FloatArray | None = None
    bound_L: FloatArray | None = None
    notes: Mapping[str, object] = field(default_factory=dict)


class Solver(Protocol):
    """Places experts; scoring, bound and status are the same for all solvers."""

    def __call__(self, problem: Problem, effort: Effort) -> Answer:
        """Return a placement that keeps the problem's constraints."""


def solve(problem: Problem, solver: str = "greedy", effort: Effort | None = None) -> Solution:
    """Solve a problem.

    Parameters
    ----------
    problem : Problem
    solver : str
        A key of ``SOLVERS``.
    effort : Effort, optional

    Raises
    ------
    InvalidInput
        The solver is unknown, or cannot minimise what the problem asks for.
    PlacementInvalid
        The placement to start from does not fit the problem.
    """
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    effort = effort or Effort()
    start = time.perf_counter()
    answer = SOLVERS[solver](problem, effort)
    time_s = time.perf_counter() - start
    balance = evaluate(problem.profile, answer.placement, problem.topology, problem.split)
    imbalance_L = np.array([layer.imbalance_mean for layer in balance.by_layer.values()])
    bound_L = layer_bounds(problem, imbalance_L)
    if answer.bound_L is not None:
        bound_L = np.maximum(bound_L, answer.bound_L)
    bound_L = np.minimum(bound_L, imbalance_L)
    # Layers weigh as in imbalance_mean: by the windows in which they have load.
    weight_L = np.count_nonzero(problem.profile.counts_WLE.any(axis=2), axis=0)
    bound_mean = float(np.average(bound_L, weights=weight_L))
    objective = _objective(balance, problem.statistic)
    bound = bound_mean
    if problem.statistic != "mean":
        bound = min(statistic_bound(problem, answer.weight_WL, bound_mean), objective)
    gap = (objective - bound) / bound
    return Solution(
        placement=answer.placement,
        balance=balance,
        objective=objective,
        bound=bound,
        gap=gap,
        bound_mean=bound_mean,
        bound_L=bound_L,
        status="optimal" if gap <= OPTIMAL_GAP else "feasible",
        stop_reason=answer.stop_reason,
        solver=solver,
        seed=effort.seed,
        time_s=time_s,
        notes=answer.notes,
    )


def _objective(balance: Balance, statistic: str) -> float:
    figures = {
        "mean": balance.imbalance_mean,
        "worst": balance.imbalance_worst,
        "cvar": balance.imbalance_cvar,
    }
    return figures[statistic]


def statistic_bound(problem: Problem, weight_WL: FloatArray | None, bound_mean: float) -> float:
    """Return a value that no placement's worst or CVaR step cost is below.

    Both are at least any weighted mean over windows with weights that they allow, and a weighted
    mean at least the sum of its layers' bounds.
    """
    raise NotImplementedError


def _placement(problem: Problem, phys_to_log_LS: IntArray) -> Placement:
    return Placement(
        phys_to_log_LS=phys_to_log_LS,
        layer_ids=problem.profile.layer_ids,
        num_experts=problem.model.num_experts,
    )


def _greedy_slots(problem: Problem, blend: float = 0.0) -> IntArray:
    """DeepSeek's algorithm on the windows' mean load, or towards their largest."""
    load_LE = problem.profile.mean_load_LE()
    if blend:
        largest_LE = problem.profile.largest_load_LE()
        load_LE = load_LE ** (1 - blend) * largest_LE**blend
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
    return phys_to_log_LS


def _greedy(problem: Problem, effort: Effort) -> Answer:
    """DeepSeek's algorithm on the mean load. Deterministic, and done before any time limit."""
    placement = _placement(problem, _greedy_slots(problem))
    if problem.split == "weighted":
        placement = _with_fractions(problem, placement)
    return Answer(placement=placement)
