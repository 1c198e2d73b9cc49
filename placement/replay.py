"""Live through a recorded stream: fit on the past, move, and be scored on the steps that follow.

Shape letters: W windows, L layers, E logical experts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput, unknown_name
from eplb.load_profile import LoadProfile
from eplb.metrics import imbalance, rank_load, step_costs
from eplb.placement.keep_slots import count_moves, keep_slots
from eplb.placement.replan import replan
from eplb.placement.solve import Effort, solve
from eplb.problem import Problem
from eplb.slots import Placement

__all__ = ["POLICIES", "Replay", "ReplayOptions", "replay"]

# follow: the first plan, moved a little; oracle: re-solved on the very steps it is scored on.
POLICIES = ("keep", "resolve", "resolve-matched", "follow", "oracle")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """How a stream is lived through.

    Parameters
    ----------
    every, warmup : int
        Steps between decisions, and before the first one.
    policy : str
        One of ``POLICIES``.
    fit_steps : int
        The last steps of the past that are fitted, once there is a plan.
    max_share : float
        Of ``follow``: the part of all slots that may be filled anew at each decision.
    start_solver : str
        Of the first plan.
    effort : Effort
        Of solvers.
    """

    every: int
    warmup: int
    policy: str = "follow"
    fit_steps: int = 100
    max_share: float = 0.04
    start_solver: str = "search"
    effort: Effort = field(default_factory=Effort)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise unknown_name("policy", self.policy, POLICIES)
        if self.every < 1 or self.warmup < 1 or self.fit_steps < 1:
            raise InvalidInput("every, warmup and fit_steps must be at least 1 step")
        if not 0 <= self.max_share <= 1:
            raise InvalidInput(f"max_share must be from 0 to 1, got {self.max_share}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """What became of a policy.

    Parameters
    ----------
    imbalance_W : array of float64
        Of each step after the warm-up: mean over layers.
    steps, moved : list of int
        Of each decision: the step it came before, and the experts that were fetched for it.
    placements : list of Placement
        In force from each decision on.
    """

    imbalance_W: FloatArray
    steps: list[int]
    moved: list[int]
    placements: list[Placement]


def replay(problem: Problem, options: ReplayOptions) -> Replay:
    """Live through the profile of a problem, step by step (its windows).

    Raises
    ------
    InvalidInput
        The warm-up leaves no step, or the policy does not know the split rule.
    """
    profile, topology = problem.profile, problem.topology
    if options.warmup >= profile.num_windows:
        raise InvalidInput(
            f"--warmup {options.warmup} leaves none of the {profile.num_windows} steps to score; "
            "use a smaller one"
        )
    if options.policy == "follow" and problem.split != "even":
        raise InvalidInput(
            f"--policy follow moves experts for the split rule even, not {problem.split}; use "
            "--split even or --policy resolve-matched"
        )
    if options.policy != "keep" and problem.split == "weighted":
        raise InvalidInput(
            f"--policy {options.policy} solves no fractions for --split weighted; use --split even"
        )
    # DeepSeek's and vLLM's rebalancers start from their own plan, as they would in an engine.
    greedy = options.policy in ("resolve", "resolve-matched")
    solver = "greedy" if greedy else options.start_solver
    past = replace(problem, profile=profile.windows(0, options.warmup))
    placement = solve(past, solver, options.effort).placement
    result = Replay(imbalance_W=np.empty(0), steps=[], moved=[], placements=[])
    scores = []
    for step in range(options.warmup, profile.num_windows, options.every):
        ahead = profile.windows(step, min(step + options.every, profile.num_windows))
        fit = profile.windows(max(step - options.fit_steps, 0), step)
        new_LS = _decide(replace(problem, profile=fit), placement, ahead, options)
        result.steps.append(step)
        result.moved.append(count_moves(placement.phys_to_log_LS, new_LS, topology.num_ranks))
        placement = replace(placement, phys_to_log_LS=new_LS)
        result.placements.append(placement)
        load_WLR = rank_load(ahead, placement, topology, problem.split)
        scores.append(step_costs(imbalance(load_WLR, topology)))
    return replace(result, imbalance_W=np.concatenate(scores))


def _decide(
    past: Problem, placement: Placement, ahead: LoadProfile, options: ReplayOptions
) -> IntArray:
    """Return the slots from now on."""
    old_LS, topology = placement.phys_to_log_LS, past.topology
    if options.policy == "keep":
        return old_LS
    if options.policy == "follow":
        limit = int(options.max_share * old_LS.size)
        return replan(past.profile, old_LS, topology, max_moves=limit).phys_to_log_LS
    if options.policy == "oracle":
        past = replace(past, profile=ahead)
        effort = replace(options.effort, extend=False)
        new_LS = solve(past, options.start_solver, effort).placement.phys_to_log_LS
    else:
        new_LS = solve(past, "greedy", options.effort).placement.phys_to_log_LS
    if options.policy == "resolve":
        return new_LS
    return keep_slots(new_LS, old_LS, topology.num_ranks, topology.num_nodes)
