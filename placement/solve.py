"""Ask a solver, score its placement, and bound what any placement could reach."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Protocol

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput, PlacementInvalid, unknown_name
from eplb.metrics import Balance, evaluate
from eplb.placement.bound import layer_bounds
from eplb.placement.fractions import best_fractions
from eplb.placement.greedy import place_greedy
from eplb.placement.in_service import put_back, reduced_placement, reduced_problem
from eplb.placement.uneven import place_uneven
from eplb.placement.windows import scaled_windows, window_weights
from eplb.problem import Problem, Solution
from eplb.slots import Placement

if TYPE_CHECKING:
    from eplb.placement.exact import ExactLayer

__all__ = ["SOLVERS", "Answer", "Effort", "Solver", "solve"]

# Below this the objective is as low as the bound, up to rounding.
OPTIMAL_GAP = 1e-9
# Greedy placements that a search may start from: of mean loads, of the largest of all windows, and
# between. A plan for loads that differ much has to have replicas of all that get hot.
START_BLENDS = (0.0, 0.5, 1.0)
# Time of `exact` without a limit, and the part of it that goes into the placement to start from;
# with few slots in all a fixed number of sweeps does, in a fraction of a second.
EXACT_LIMIT_S, EXACT_SEARCH_PART = 60.0, 0.1
EXACT_FEW_SLOTS, EXACT_SWEEPS, EXACT_LEAST_S = 400, 200, 1.0


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
    max_moves, max_moves_per_layer : int, optional
        Of the search from a start: experts that ranks may fetch, over all layers and in each.
    """

    seed: int = 0
    time_limit_s: float | None = None
    sweeps: int | None = None
    extend: bool = True
    start: Placement | None = None
    max_moves: int | None = None
    max_moves_per_layer: int | None = None


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
    part = reduced_problem(problem)
    if part is not problem:
        if effort.start is not None and effort.start.num_slots == problem.topology.num_slots:
            start_part = reduced_placement(effort.start, problem.topology)
            effort = replace(effort, start=start_part)
        found = solve(part, solver, effort)
        return replace(found, placement=put_back(found.placement, problem.topology))
    if not problem.topology.is_uniform:
        _check_uneven(problem, solver)
    start = time.perf_counter()
    answer = SOLVERS[solver](problem, effort)
    time_s = time.perf_counter() - start
    balance = evaluate(problem.profile, answer.placement, problem.topology, problem.split)
    imbalance_L = np.array([layer.imbalance_mean for layer in balance.by_layer.values()])
    load_WLE = scaled_windows(problem.profile, problem.topology.num_ranks)
    weight_WL = window_weights(load_WLE)
    if not problem.topology.is_uniform:
        return _unproven(problem, answer, balance, solver, effort, time_s)
    # These bounds take a compiler, which greedy does without.
    bounds = partial(
        layer_bounds,
        load_WLE,
        num_ranks=problem.topology.num_ranks,
        slots_per_rank=problem.topology.slots_per_rank,
        split=problem.split,
        thorough=solver != "greedy",
    )
    weight_L = weight_WL.sum(axis=0)
    bound_L = bounds(weight_WL / weight_L, reached_L=imbalance_L)
    if answer.bound_L is not None:
        bound_L = np.minimum(np.maximum(bound_L, answer.bound_L), imbalance_L)
    bound_mean = min(float(bound_L @ weight_L), balance.imbalance_mean)
    objective = _objective(balance, problem.statistic)
    bound = bound_mean
    if problem.statistic != "mean" and answer.weight_WL is not None:
        # Any weighted mean over windows, with weights that the statistic allows, is at most the
        # statistic, and the weighted mean of a layer is at least its bound.
        bound = max(bound, float(bounds(answer.weight_WL).sum()))
    bound = min(bound, objective)
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


def _check_uneven(problem: Problem, solver: str) -> None:
    """Refuse what is solved only for ranks with equal slots and speed."""
    for asked, what in (
        (solver != "greedy", f"--solver {solver}"),
        (problem.groups_in_nodes, "--hierarchical"),
        (problem.split == "weighted", "--split weighted"),
    ):
        if asked:
            raise InvalidInput(
                f"{what} knows ranks of equal slots and speed only; use --solver greedy with "
                "--split even or nearest and without --hierarchical, or leave rank_slots and "
                "rank_speed out of the topology"
            )


def _unproven(
    problem: Problem, answer: Answer, balance: Balance, solver: str, effort: Effort, time_s: float
) -> Solution:
    """Return a solution for ranks that differ, of which no bound but 1 is known."""
    objective = _objective(balance, problem.statistic)
    bound = min(1.0, objective)
    return Solution(
        placement=answer.placement,
        balance=balance,
        objective=objective,
        bound=bound,
        gap=(objective - bound) / bound,
        bound_mean=min(1.0, balance.imbalance_mean),
        bound_L=np.ones(problem.profile.num_layers),
        status="optimal" if objective - bound <= OPTIMAL_GAP else "feasible",
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
    load_LE = np.ldexp(load_LE, -exponent).astype(np.float32)
    if not problem.topology.is_uniform:
        return place_uneven(load_LE, problem.topology, distinct_ranks=problem.distinct_ranks)
    hierarchical = problem.groups_in_nodes
    phys_to_log_LS, _ = place_greedy(
        load_LE,
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


def _special_starts(
    problem: Problem, starts: Sequence[Placement], effort: Effort
) -> list[Placement]:
    """Return placements made for the rule and the shape of the slots (:mod:`.starts`)."""
    # Numba takes a second to import.
    from eplb.placement.starts import component_slots, is_pairs, node_slots, pair_slots  # noqa: PLC0415

    special: list[Placement] = []
    if problem.groups_in_nodes:
        return special
    if problem.split in ("weighted", "batch"):
        slots_LS, fraction_LS = component_slots(problem, effort.seed, effort.time_limit_s)
        placement = _placement(problem, slots_LS)
        if problem.split == "weighted":
            placement = replace(placement, split_weights_LS=fraction_LS)
        special.append(placement)
    if is_pairs(problem):
        slots_LS = pair_slots(problem, effort.seed, effort.time_limit_s)
        special.append(_placement(problem, slots_LS))
    if problem.split == "nearest":
        special.extend(
            _placement(problem, node_slots(problem, start.phys_to_log_LS))
            for start in (*starts, *special)
        )
    return special


def _with_fractions(problem: Problem, placement: Placement) -> Placement:
    """Return a placement with the fractions that are best for its mean load."""
    load_LE = problem.profile.mean_load_LE()
    num_ranks = problem.topology.num_ranks
    fractions = [
        best_fractions(
            load_E[np.newaxis] * (num_ranks / load_E.sum()), np.ones(1), row_S, num_ranks
        )[0]
        for load_E, row_S in zip(load_LE, placement.phys_to_log_LS, strict=True)
    ]
    return replace(placement, split_weights_LS=np.stack(fractions))


def _search(problem: Problem, effort: Effort) -> Answer:
    """Annealing over all windows (:mod:`eplb.placement.search`), from greedy or a given plan."""
    # Numba takes a second to import, and not every command searches.
    from eplb.placement.search import DEFAULT_SWEEPS, search  # noqa: PLC0415

    if effort.max_moves is not None:
        return _few_moves(problem, effort)
    deadline = time.perf_counter() + (effort.time_limit_s or 0.0)
    # The moves keep replicas on distinct ranks, so the starts have to, also where they need not.
    problem = replace(problem, distinct_ranks=True)
    if effort.start is not None:
        starts = [_start(problem, effort.start)]
    else:
        blends = START_BLENDS if problem.profile.num_windows > 1 else START_BLENDS[:1]
        starts = [_placement(problem, _greedy_slots(problem, blend)) for blend in blends]
        if problem.split == "weighted":
            starts.append(_with_fractions(problem, starts[0]))
        starts.extend(_special_starts(problem, starts, effort))
    found = search(
        problem,
        starts,
        seed=effort.seed,
        sweeps=DEFAULT_SWEEPS if effort.sweeps is None else effort.sweeps,
        time_limit_s=(
            None if effort.time_limit_s is None else max(deadline - time.perf_counter(), 0.0)
        ),
        extend=effort.extend,
    )
    return Answer(
        placement=replace(
            _placement(problem, found.phys_to_log_LS), split_weights_LS=found.split_weights_LS
        ),
        stop_reason=found.stop_reason,
        weight_WL=found.weight_WL,
        notes=found.notes,
    )


def _few_moves(problem: Problem, effort: Effort) -> Answer:
    """Search from the start under a limit on moves (:mod:`eplb.placement.replan`)."""
    from eplb.placement.replan import replan  # noqa: PLC0415

    if effort.start is None or effort.max_moves is None:
        raise InvalidInput("a limit on moves needs a placement to move from; give --previous")
    found = replan(
        problem,
        effort.start,
        max_moves=effort.max_moves,
        max_moves_per_layer=effort.max_moves_per_layer,
        seed=effort.seed,
    )
    return Answer(placement=found.placement, notes={"moved_experts": found.num_moves})


def _start(problem: Problem, start: Placement) -> Placement:
    """Return the profile's layers of a placement to start from, if it fits."""
    topology, model = problem.topology, problem.model
    if (start.num_slots, start.num_experts) != (topology.num_slots, model.num_experts):
        raise PlacementInvalid(
            f"the plan to start from has {start.num_slots} slots for {start.num_experts} experts, "
            f"and this one {topology.num_slots} for {model.num_experts}; leave --previous out, or "
            "plan for its model and topology"
        )
    rows = start.rows(problem.profile.layer_ids)
    slots_LS, weights_LS = start.phys_to_log_LS[rows], start.split_weights_LS
    by_rank = np.sort(slots_LS.reshape(len(slots_LS), topology.num_ranks, -1), axis=2)
    if ((by_rank[:, :, 1:] == by_rank[:, :, :-1]) & (by_rank[:, :, 1:] >= 0)).any():
        raise PlacementInvalid(
            "the plan to start from has replicas of an expert on one rank, which search does not "
            "keep; leave --previous out"
        )
    if problem.groups_in_nodes:
        node_S = np.arange(topology.num_slots) // (topology.num_slots // topology.num_nodes)
        group_LS = slots_LS // (model.num_experts // model.num_groups)
        for group in range(model.num_groups):
            on = [set(node_S[row == group].tolist()) for row in group_LS]
            if any(len(nodes) > 1 for nodes in on):
                raise PlacementInvalid(
                    f"the plan to start from has group {group} on several nodes; leave "
                    "--hierarchical or --previous out"
                )
    return replace(
        _placement(problem, slots_LS),
        split_weights_LS=None if weights_LS is None else weights_LS[rows],
    )


def _exact(problem: Problem, effort: Effort) -> Answer:
    """Every layer to a proven optimum as far as the time goes (:mod:`eplb.placement.exact`)."""
    from eplb.placement.exact import solve_layer  # noqa: PLC0415

    if problem.statistic != "mean":
        raise InvalidInput(
            f"--solver exact minimises the mean over windows and not {problem.statistic}, which "
            "couples layers; use --solver search"
        )
    if problem.groups_in_nodes:
        raise InvalidInput("--solver exact knows no groups; use --solver search or greedy")
    limit_s = EXACT_LIMIT_S if effort.time_limit_s is None else effort.time_limit_s
    begin = time.perf_counter()
    few = problem.topology.num_slots * problem.profile.num_layers <= EXACT_FEW_SLOTS
    searched = _search(
        problem,
        replace(effort, time_limit_s=None, sweeps=EXACT_SWEEPS, extend=False)
        if few and limit_s >= EXACT_LEAST_S
        else replace(effort, time_limit_s=EXACT_SEARCH_PART * limit_s, extend=False),
    )
    load_WLE = scaled_windows(problem.profile, problem.topology.num_ranks)
    num_threads = len(os.sched_getaffinity(0))
    rows = range(problem.profile.num_layers)
    done = count()

    def one(row: int) -> ExactLayer:
        left = len(rows) - next(done)
        remaining_s = limit_s - (time.perf_counter() - begin)
        loaded_W = load_WLE[:, row].any(axis=1)
        return solve_layer(
            load_WLE[loaded_W, row],
            np.full(np.count_nonzero(loaded_W), 1.0 / np.count_nonzero(loaded_W)),
            topology=problem.topology,
            split=problem.split,
            start_S=searched.placement.phys_to_log_LS[row],
            time_limit_s=max(remaining_s * min(num_threads / left, 1.0), 0.1),
            seed=effort.seed,
        )

    with ThreadPoolExecutor(min(num_threads, len(rows))) as threads:
        layers = list(threads.map(one, rows))
    fractions = None
    if problem.split == "weighted":
        fractions = np.stack([x.fraction_S for x in layers if x.fraction_S is not None])
    proven = sum(layer.proven for layer in layers)
    return Answer(
        placement=replace(
            _placement(problem, np.stack([layer.phys_to_log_S for layer in layers])),
            split_weights_LS=fractions,
        ),
        stop_reason="proven" if proven == len(layers) else "time_limit",
        bound_L=np.array([layer.bound for layer in layers]),
        notes={"layers_proven": proven},
    )


SOLVERS: dict[str, Solver] = {"greedy": _greedy, "search": _search, "exact": _exact}
