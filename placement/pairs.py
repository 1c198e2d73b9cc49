"""Two slots a rank, one window, even split: every rank holds a pair, and pairs have structure.

Replicas in order of load pair up best first with last, whatever the counts, so the search is over
replica counts alone (:mod:`eplb.placement.pair_kernel`). By Hall's condition counts reach a target
T if and only if, for every size x above T/2, the replicas of at least x are no more than those of
at most T - x and the empty slots: a set of linear constraints on "expert e has c replicas", which
a MILP solver decides. Its answer "no" is a proof for all placements.
Shape letters: E logical experts, S slots, O options (an expert with a number of replicas).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.slots import EMPTY

__all__ = ["PairSolution", "counts_within", "pair_up", "search_pairs", "solve_pairs"]

# Loads that differ by less count as equal, in favour of "can be reached".
_SLACK = 1e-9
# An optimum is proven when nothing is this much better.
_PROOF = 1e-6
# Where it is not proven: how near to what counts can reach the bound is brought.
_NARROW = 1e-4
# With less time than this left no further target is tried.
_LEAST_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairSolution:
    """A placement of pairs.

    Parameters
    ----------
    phys_to_log_S : array of int64
    objective, bound : float
        Largest pair, and a value no placement is below, in the unit of the loads.
    """

    phys_to_log_S: IntArray
    objective: float
    bound: float


def search_pairs(
    load_E: FloatArray,
    num_ranks: int,
    *,
    start_E: IntArray | None = None,
    evaluations: int = 4000,
    seed: int = 0,
    low: float = 0.0,
) -> IntArray:
    """Return the slots of a placement with a small largest pair, shape [S].

    Parameters
    ----------
    load_E : array of float64
    num_ranks : int
        At least E / 2.
    start_E : array of int64, optional
        Replica counts to start from, at most ``num_ranks`` each; without it those that make the
        largest replica smallest.
    evaluations, seed : int
        Work (about 2 us each on one core for 288 slots), and the random seed.
    low : float
        A bound: the search ends where it is met.
    """
    # Numba takes a second to import, and only this search needs it.
    from eplb.placement.pair_kernel import search_counts  # noqa: PLC0415

    load_E = np.ascontiguousarray(load_E, np.float64)
    if start_E is None:
        start_E = _even_counts(load_E, num_ranks)
    count_E, _ = search_counts(load_E, start_E, 2 * num_ranks, evaluations, seed, low)
    return pair_up(load_E, count_E, num_ranks)


def _even_counts(load_E: FloatArray, num_ranks: int) -> IntArray:
    """Return the counts, at most R each, that make the largest replica smallest."""
    count_E = np.ones(len(load_E), np.int64)
    for _ in range(min(2 * num_ranks, num_ranks * len(load_E)) - len(load_E)):
        count_E[np.argmax(np.where(count_E < num_ranks, load_E / count_E, -1.0))] += 1
    return count_E


def pair_up(load_E: FloatArray, count_E: IntArray, num_ranks: int) -> IntArray:
    """Return the slots of a placement of these counts, replicas on distinct ranks, shape [S].

    Pairs first with last; a rank that would hold one expert twice changes its second replica with
    the rank where that costs least.
    """
    expert_S = np.full(2 * num_ranks, EMPTY, np.int64)
    order_E = np.argsort(-load_E / count_E, kind="stable")
    expert_S[: count_E.sum()] = np.repeat(order_E, count_E[order_E])
    first_R, second_R = expert_S[:num_ranks].copy(), expert_S[: num_ranks - 1 : -1].copy()
    value_E = np.append(load_E / count_E, 0.0)
    for rank in np.flatnonzero((first_R == second_R) & (first_R >= 0)):
        if first_R[rank] != second_R[rank]:
            continue
        expert = first_R[rank]
        free_R = (first_R != expert) & (second_R != expert)
        cost_R = np.maximum(value_E[expert] + value_E[second_R], value_E[first_R] + value_E[expert])
        other = int(np.argmin(np.where(free_R, cost_R, np.inf)))
        assert free_R[other], "an expert has at most R replicas, so some rank is without it"
        second_R[rank], second_R[other] = second_R[other], second_R[rank]
    return np.stack([first_R, second_R], axis=1).reshape(-1)


def counts_within(
    load_E: FloatArray, num_ranks: int, target: float, *, time_limit_s: float | None = None
) -> tuple[IntArray | None, bool]:
    """Return replica counts whose pairs are all within the target, and if the answer is final.

    ``(None, True)`` proves that no placement reaches the target, ``(None, False)`` is a time-out.
    """
    # scipy.optimize takes a second to import, and only a proof needs it.
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415
    from scipy.sparse import csr_array  # noqa: PLC0415

    num_slots = 2 * num_ranks
    least_E = np.maximum(1, np.ceil(load_E / target * (1 - _SLACK))).astype(np.int64)
    spare = num_slots - int(least_E.sum())
    if spare < 0 or (least_E > num_ranks).any():
        return None, True
    expert_O, count_O, need_XO = _options(load_E, least_E, spare, num_ranks, target)
    num_options = len(expert_O)
    one = csr_array(
        (np.ones(num_options), (expert_O, np.arange(num_options))),
        shape=(len(load_E), num_options),
    )
    result = milp(
        # Few replicas: what is left over stays empty or goes where it does good.
        count_O.astype(float),
        integrality=np.ones(num_options),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(csr_array(need_XO), -np.inf, num_slots),
            LinearConstraint(one, 1, 1),
        ],
        options={} if time_limit_s is None else {"time_limit": max(time_limit_s, 0.01)},
    )
    if result.x is None:
        return None, result.status == 2
    count_E = np.zeros(len(load_E), np.int64)
    chosen = result.x > 0.5
    count_E[expert_O[chosen]] = count_O[chosen]
    return count_E, True


def _options(
    load_E: FloatArray, least_E: IntArray, spare: int, num_ranks: int, target: float
) -> tuple[IntArray, IntArray, FloatArray]:
    """Return expert, count and, for each size x, the slots that an option needs, [X, O].

    A replica of at least x takes two slots (its own, and one that only a small one may share), one
    of at most T - x none (it lies beside a large one), others one. Options that need no less for
    any size than another of the same expert are left out.
    """
    experts, counts = [], []
    for expert, least in enumerate(least_E):
        count = np.arange(least, min(least + spare, num_ranks) + 1)
        experts.append(np.full(len(count), expert))
        counts.append(count)
    expert_O, count_O = np.concatenate(experts), np.concatenate(counts)
    value_O = load_E[expert_O] / count_O
    size_X1 = np.unique(value_O[value_O > target / 2 * (1 + _SLACK)])[:, np.newaxis]
    is_large = value_O >= size_X1 * (1 - _SLACK)
    is_small = value_O <= (target - size_X1) + _SLACK * target
    need_XO = np.vstack([count_O * (1.0 + is_large - is_small), count_O])
    kept = np.ones(len(expert_O), bool)
    first_E = np.searchsorted(expert_O, np.arange(len(load_E) + 1))
    for first, end in pairwise(first_E):
        need = need_XO[:, first:end]
        no_less = (need[:, :, np.newaxis] <= need[:, np.newaxis, :]).all(axis=0)
        # Of equals the first stays.
        beaten = no_less & ~(no_less.T & np.tril(np.ones_like(no_less)))
        kept[first:end] = ~beaten.any(axis=0)
    return expert_O[kept], count_O[kept], np.unique(need_XO[:, kept], axis=0)


def solve_pairs(
    load_E: FloatArray,
    num_ranks: int,
    *,
    start_E: IntArray | None = None,
    low: float = 0.0,
    time_limit_s: float | None = None,
    seed: int = 0,
) -> PairSolution:
    """Search, and prove that nothing is better, or find it.

    Parameters
    ----------
    load_E, num_ranks, start_E, seed
        As for :func:`search_pairs`.
    low : float
        A bound known before.
    time_limit_s : float, optional
    """
    # Numba takes a second to import, and only pairs need it.
    from eplb.placement.pair_bound import THOROUGH, pair_bound  # noqa: PLC0415

    end_s = None if time_limit_s is None else time.perf_counter() + time_limit_s
    load_E = np.ascontiguousarray(load_E, np.float64)
    row = search_pairs(load_E, num_ranks, start_E=start_E, evaluations=20_000, seed=seed, low=low)
    best = _largest_pair(load_E, row)
    low = min(best, max(low, load_E.sum() / num_ranks))
    low = float(pair_bound(load_E, num_ranks, low, best, THOROUGH))
    # From here on counts are known, or could not be decided in time.
    high = best
    while low < best * (1 - _PROOF) and low < high * (1 - _NARROW):
        left_s = None if end_s is None else end_s - time.perf_counter()
        if left_s is not None and left_s <= _LEAST_S:
            break
        # Most often nothing is better than what the search found.
        target = best * (1 - _PROOF) if high >= best else (low + high) / 2
        # A third, so that lower targets, which are easier to refute, have their turn.
        count_E, final = counts_within(
            load_E, num_ranks, target, time_limit_s=None if left_s is None else left_s / 3
        )
        if count_E is None:
            low, high = (target, high) if final else (low, target)
            continue
        better = search_pairs(load_E, num_ranks, start_E=count_E, seed=seed, low=low)
        reached = _largest_pair(load_E, better)
        # Counts that fit may still put an expert's replicas on one rank.
        high = target
        if reached < best:
            row, best = better, reached
            high = min(high, best)
    return PairSolution(phys_to_log_S=row, objective=best, bound=min(low, best))


def _largest_pair(load_E: FloatArray, row: IntArray) -> float:
    """Return the largest rank load under even split."""
    count_E = np.bincount(row[row >= 0], minlength=len(load_E))
    value_S = np.where(row >= 0, (load_E / count_E)[row], 0.0)
    return float(value_S.reshape(-1, 2).sum(axis=1).max())
