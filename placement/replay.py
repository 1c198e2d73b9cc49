"""Live through a recorded stream: fit on the past, move, and be scored on the steps that follow.

Shape letters: W windows, L layers, E logical experts, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput, unknown_name
from eplb.load_profile import LoadProfile, replace_windows
from eplb.metrics import imbalance, rank_load, step_costs
from eplb.placement.jump import FALSE_ALARM_RATE, find_jump
from eplb.placement.keep_slots import count_moves, keep_slots
from eplb.placement.replan import Replan, replan
from eplb.placement.solve import Effort, solve
from eplb.problem import Problem
from eplb.slots import Placement

__all__ = ["POLICIES", "Decision", "Replay", "ReplayOptions", "replay"]

# keep: the first plan. resolve, resolve-matched: greedy on the last steps, as the engines'
# rebalancers do, the latter with ranks numbered so that most experts stay. follow: few moves at
# each decision. follow-threshold: the same, but only while enough is to be gained. oracle: fitted
# to every other step of those that come, and scored on the others.
POLICIES = ("keep", "resolve", "resolve-matched", "follow", "follow-threshold", "oracle")


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
        Of ``resolve`` and ``resolve-matched``: the last steps of the past that are fitted.
        ``follow`` looks at all of the past.
    max_share : float
        Of ``follow``: the part of all slots that may be filled anew at each decision.
    lift_after_jump : bool
        Of ``follow``: no limit at the decision after a jump of the traffic.
    false_alarm_rate : float
        Of the test for jumps, at each decision.
    move_above, rest_below : float
        Of ``follow-threshold``: it starts to move where moves promise to lower the imbalance by
        more than ``move_above``, and rests again where they promise less than ``rest_below``.
    start_solver : str
        Of the first plan, where the policy is not one of the engines'.
    effort : Effort
        Of solvers.

    Raises
    ------
    InvalidInput
        A value is out of range.
    """

    every: int
    warmup: int
    policy: str = "follow"
    fit_steps: int = 100
    max_share: float = 0.04
    lift_after_jump: bool = True
    false_alarm_rate: float = FALSE_ALARM_RATE
    move_above: float = 0.02
    rest_below: float = 0.01
    start_solver: str = "search"
    effort: Effort = field(default_factory=Effort)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise unknown_name("policy", self.policy, POLICIES)
        if self.every < 1 or self.warmup < 1 or self.fit_steps < 1:
            raise InvalidInput("every, warmup and fit_steps must be at least 1 step")
        if not 0 <= self.max_share <= 1:
            raise InvalidInput(f"max_share must be from 0 to 1, got {self.max_share}")
        if not 0 <= self.rest_below <= self.move_above:
            raise InvalidInput(
                f"rest_below ({self.rest_below}) must be from 0 to move_above "
                f"({self.move_above}), else the policy would start and stop at once"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One decision of a policy.

    Parameters
    ----------
    step : int
        The step it came before.
    moved : int
        Experts that were fetched.
    placement : Placement
        In force from then on.
    jumped : bool
        The traffic was found to have jumped.
    """

    step: int
    moved: int
    placement: Placement
    jumped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """What became of a policy.

    Parameters
    ----------
    step_W : array of int64
        The steps that were scored: those after the warm-up, and every other one under ``oracle``.
    imbalance_W : array of float64
        Of each of them: mean over layers.
    start : Placement
        The plan before the first decision.
    decisions : tuple of Decision
    """

    step_W: IntArray
    imbalance_W: FloatArray
    start: Placement
    decisions: tuple[Decision, ...]

    @property
    def moved(self) -> int:
        """Experts fetched, over all decisions."""
        return sum(decision.moved for decision in self.decisions)


def replay(problem: Problem, options: ReplayOptions) -> Replay:
    """Live through the profile of a problem, step by step (its windows).

    Raises
    ------
    InvalidInput
        The warm-up leaves no step, or the policy does not know the split rule.
    """
    profile = problem.profile
    if options.warmup >= profile.num_windows:
        raise InvalidInput(
            f"--warmup {options.warmup} leaves none of the {profile.num_windows} steps to score; "
            "use a smaller one"
        )
    if options.policy == "resolve-matched" and problem.split == "weighted":
        raise InvalidInput(
            "--policy resolve-matched exchanges ranks without their fractions; use --policy "
            "resolve or follow with --split weighted"
        )
    decide = _DECIDERS[options.policy](options)
    engines = options.policy in ("resolve", "resolve-matched")
    past = _fitted(problem, profile.windows(0, options.warmup))
    # DeepSeek's and vLLM's rebalancers start from their own plan, as they would in an engine.
    start = solve(past, "greedy" if engines else options.start_solver, options.effort).placement
    placement, decisions = start, []
    steps: list[int] = []
    scores: list[FloatArray] = []
    for step in range(options.warmup, profile.num_windows, options.every):
        ahead = profile.windows(step, min(step + options.every, profile.num_windows))
        past = _fitted(problem, profile.windows(0, step))
        new, jumped = decide(past, placement, ahead)
        moved = count_moves(
            placement.phys_to_log_LS, new.phys_to_log_LS, problem.topology.num_ranks
        )
        decisions.append(Decision(step=step, moved=moved, placement=new, jumped=jumped))
        placement = new
        scored = _odd(ahead) if options.policy == "oracle" else np.arange(ahead.num_windows)
        steps.extend((step + scored).tolist())
        scores.append(_step_costs(ahead, placement, problem)[scored])
    return Replay(
        step_W=np.array(steps),
        imbalance_W=np.concatenate(scores),
        start=start,
        decisions=tuple(decisions),
    )


# What a policy does at a decision: (past, placement in force, steps ahead) -> placement, and
# whether a jump was found.
_Decide = Callable[[Problem, Placement, LoadProfile], tuple[Placement, bool]]


def _keep(options: ReplayOptions) -> _Decide:
    return lambda past, placement, ahead: (placement, False)


def _resolve(options: ReplayOptions) -> _Decide:
    def decide(past: Problem, placement: Placement, ahead: LoadProfile) -> tuple[Placement, bool]:
        first = max(past.profile.num_windows - options.fit_steps, 0)
        recent = _fitted(past, past.profile.windows(first, None))
        return solve(recent, "greedy", options.effort).placement, False

    return decide


def _resolve_matched(options: ReplayOptions) -> _Decide:
    resolve = _resolve(options)

    def decide(past: Problem, placement: Placement, ahead: LoadProfile) -> tuple[Placement, bool]:
        new, _ = resolve(past, placement, ahead)
        return _matched(past, new, placement), False

    return decide


def _follow(options: ReplayOptions) -> _Decide:
    def decide(past: Problem, placement: Placement, ahead: LoadProfile) -> tuple[Placement, bool]:
        found, jumped = _replanned(past, placement, options)
        return found.placement, jumped

    return decide


def _follow_threshold(options: ReplayOptions) -> _Decide:
    moving = False

    def decide(past: Problem, placement: Placement, ahead: LoadProfile) -> tuple[Placement, bool]:
        nonlocal moving
        found, jumped = _replanned(past, placement, options)
        promised = found.curve[0].imbalance / found.curve[-1].imbalance - 1
        # Two thresholds, so that a gain near one of them does not start and stop moves in turn.
        moving = jumped or promised > (options.rest_below if moving else options.move_above)
        return (found.placement if moving else placement), jumped

    return decide


def _oracle(options: ReplayOptions) -> _Decide:
    def decide(past: Problem, placement: Placement, ahead: LoadProfile) -> tuple[Placement, bool]:
        if ahead.num_windows < 2:
            return placement, False
        even = np.arange(0, ahead.num_windows, 2)
        effort = replace(options.effort, start=placement)
        new = solve(_fitted(past, _only(ahead, even)), "search", effort).placement
        return (new if past.split == "weighted" else _matched(past, new, placement)), False

    return decide


_DECIDERS: dict[str, Callable[[ReplayOptions], _Decide]] = dict(
    zip(
        POLICIES,
        (_keep, _resolve, _resolve_matched, _follow, _follow_threshold, _oracle),
        strict=True,
    )
)


def _replanned(past: Problem, placement: Placement, options: ReplayOptions) -> tuple[Replan, bool]:
    """Return the few moves, or the many after a jump, and whether there was one."""
    jumped = (
        options.lift_after_jump
        and find_jump(past.profile, options.every, false_alarm_rate=options.false_alarm_rate).found
    )
    slots = placement.phys_to_log_LS.size
    limit = slots if jumped else int(options.max_share * slots)
    return replan(past, placement, max_moves=limit, seed=options.effort.seed), jumped


def _matched(past: Problem, new: Placement, old: Placement) -> Placement:
    topology = past.topology
    # Ranks of a node stay together where the plan tells nodes apart.
    nodes = topology.num_nodes if past.split == "nearest" or past.groups_in_nodes else 1
    slots_LS = keep_slots(new.phys_to_log_LS, old.phys_to_log_LS, topology.num_ranks, nodes)
    return replace(new, phys_to_log_LS=slots_LS)


def _only(profile: LoadProfile, windows: IntArray) -> LoadProfile:
    return replace_windows(profile, np.isin(np.arange(profile.num_windows), windows))


def _odd(profile: LoadProfile) -> IntArray:
    """Return the steps that the oracle was not fitted to; a single one is all there is."""
    return np.arange(min(1, profile.num_windows - 1), profile.num_windows, 2)


def _fitted(problem: Problem, profile: LoadProfile) -> Problem:
    """Return the problem on some of its windows.

    Raises
    ------
    InvalidInput
        A layer has no load in them, so that there would be no plan for it.
    """
    if profile.layer_ids != problem.profile.layer_ids:
        idle = sorted(set(problem.profile.layer_ids) - set(profile.layer_ids))
        raise InvalidInput(
            f"layer {idle[0]} has no load in the {profile.num_windows} steps of {profile.source} "
            "that a decision is fitted to; use a longer --warmup or --every"
        )
    return replace(problem, profile=profile)


def _step_costs(ahead: LoadProfile, placement: Placement, problem: Problem) -> FloatArray:
    """Return the imbalance of each step, mean over layers; NaN where there is no load."""
    topology = problem.topology
    return step_costs(imbalance(rank_load(ahead, placement, topology, problem.split), topology))
