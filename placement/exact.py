"""One layer solved to a proven optimum, as far as the time goes.

``even`` and ``nearest`` are branch and bound over ranks (:mod:`eplb.placement.rank_search`) where
slots are few, pairs (:mod:`eplb.placement.pairs`), or integer programmes over replica counts and
ranks (:mod:`eplb.placement.exact_shares`, CP-SAT); ``weighted`` and ``batch`` have linear
programmes inside (:mod:`eplb.placement.exact_splits`). All of them report a bound that holds for
the real-valued problem.
Shape letters: W windows, E logical experts, S slots, R ranks, K slots of a rank.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.batch_split import batch_max_load
from eplb.errors import InfeasibleProblem, unknown_name
from eplb.placement.bound import weighted_bounds
from eplb.placement.exact_shares import num_variables, place_by_shares
from eplb.placement.exact_splits import place_by_cuts, place_by_fractions
from eplb.placement.fractions import best_fractions, fraction_objective
from eplb.placement.greedy import place_greedy
from eplb.placement.pairs import solve_pairs
from eplb.placement.rank_search import place_by_ranks
from eplb.slots import EMPTY
from eplb.split import slot_share
from eplb.topology import Topology

__all__ = ["EXACT_RULES", "ExactLayer", "solve_layer"]

EXACT_RULES = ("even", "nearest", "weighted", "batch")

# Objective and bound that differ by less are equal: the integer programmes round loads at a
# quarter of this, HiGHS stops at a tenth of it.
PROOF_GAP = 1e-6
# Variables of the largest integer programme that is tried: building half a million takes seconds
# and solving it hours.
_LARGEST_MODEL = 500_000
# Ranks up to which all cuts of the ranks (2^R) are written down, and windows from which on that
# is better than a split of each window's own: its variables do not grow with the windows, and its
# relaxation is weaker.
_CUT_RANKS = 8
_CUT_WINDOWS = 16
# Slots up to which branch and bound over ranks is tried, and the part of the time it gets: what it
# has not proven by then, CP-SAT may still find a better placement for.
_RANK_SLOTS, _RANK_PART = 40, 0.8
# Experts up to which the bound of components is looked for (3^E / 2 steps, some 20 times).
_COMPONENT_EXPERTS = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExactLayer:
    """The best placement found of one layer, and what no placement is below.

    Parameters
    ----------
    phys_to_log_S : array of int64
        The expert in each slot, -1 for an empty one.
    fraction_S : array of float64 or None
        Of its expert's tokens, for ``weighted``.
    objective, bound : float
        Weighted mean over windows of the largest rank load, in the unit of the loads.
    proven : bool
        The objective is the bound, up to 1e-6 of it.
    stop_reason : str
        ``finished``, ``time_limit``, or ``too_large``: an integer programme of this size is not
        tried, the placement is the start (or that of pairs), the bound the quick one.
    """

    phys_to_log_S: IntArray
    fraction_S: FloatArray | None
    objective: float
    bound: float
    proven: bool
    stop_reason: str


def solve_layer(
    load_WE: FloatArray,
    weight_W: FloatArray,
    *,
    topology: Topology,
    split: str,
    start_S: IntArray | None = None,
    time_limit_s: float | None = None,
    seed: int = 0,
    workers: int = 1,
) -> ExactLayer:
    """Return a placement of least weighted mean largest rank load, replicas on distinct ranks.

    Parameters
    ----------
    load_WE : array of float64
        Non-negative, each window in the same unit (scaled to a mean rank load of 1, as a rule).
    weight_W : array of float64
        Of the windows in the mean; positive, adding up to 1.
    topology : Topology
    split : str
        One of ``EXACT_RULES``.
    start_S : array of int64, optional
        A placement that the answer is never worse than; without it that of ``greedy``.
    time_limit_s : float, optional
        After it the best placement found and the best bound are returned.
    seed, workers : int
        For CP-SAT. With one worker and without a time limit the same seed gives the same answer.

    Raises
    ------
    InvalidInput
        The split rule is unknown.
    InfeasibleProblem
        There are fewer slots than experts.
    """
    if split not in EXACT_RULES:
        raise unknown_name("split rule", split, EXACT_RULES)
    num_experts = load_WE.shape[1]
    if topology.num_slots < num_experts:
        raise InfeasibleProblem(
            f"{topology.num_slots} slots cannot hold {num_experts} experts; use more slots a rank"
        )
    end_s = None if time_limit_s is None else time.perf_counter() + time_limit_s
    has_fractions = split == "weighted"
    if topology.num_slots == num_experts or (split == "nearest" and topology.num_nodes == 1):
        # Where no expert has replicas all rules are one.
        split = "even"
    load_WE = np.ascontiguousarray(load_WE, np.float64)
    if start_S is None:
        start_S = _greedy_row(load_WE, weight_W, topology)
    best_S, best = start_S, _objective(load_WE, weight_W, start_S, topology, split)
    low = float(
        weighted_bounds(
            load_WE[:, np.newaxis],
            weight_W,
            num_ranks=topology.num_ranks,
            slots_per_rank=topology.slots_per_rank,
            split=split,
            reached_L=np.array([best]),
        )[0]
    )
    stop_reason = "finished"
    if low < best * (1 - PROOF_GAP) and split in ("weighted", "batch"):
        rows, low = _components(weight_W @ load_WE, topology, low, best)
        for row in rows:
            reached = _objective(load_WE, weight_W, row, topology, split)
            if reached < best:
                best_S, best = row, reached
    if low < best * (1 - PROOF_GAP):
        rows, bound, stop_reason = _search(
            load_WE, weight_W, topology, split, best_S, best, low, end_s, seed, workers
        )
        low = max(low, bound)
        for row in rows:
            reached = _objective(load_WE, weight_W, row, topology, split)
            if reached < best:
                best_S, best = row, reached
    fraction_S = None
    if has_fractions:
        fraction_S, _ = best_fractions(load_WE, weight_W, best_S, topology.num_ranks)
        best = fraction_objective(load_WE, weight_W, best_S, fraction_S, topology.num_ranks)
    low = min(low, best)
    proven = low >= best * (1 - PROOF_GAP)
    return ExactLayer(
        phys_to_log_S=best_S,
        fraction_S=fraction_S,
        objective=best,
        bound=low,
        proven=proven,
        stop_reason="finished" if proven else stop_reason,
    )


def _components(
    load_E: FloatArray, topology: Topology, low: float, best: float
) -> tuple[list[IntArray], float]:
    """Return placements that are good for one load under a free split, and a bound for any."""
    # Numba takes a second to import.
    from eplb.placement.component_bound import component_bound  # noqa: PLC0415
    from eplb.placement.components import place_groups, place_in_components  # noqa: PLC0415

    num_ranks, slots_per_rank = topology.num_ranks, topology.slots_per_rank
    row, fraction_S = place_in_components(load_E, num_ranks, slots_per_rank)
    rows = [row]
    num_experts = len(load_E)
    # All experts in one component is possible, and says no more than the mean.
    several = num_experts - 1 > num_ranks * (slots_per_rank - 1)
    if several and num_experts <= _COMPONENT_EXPERTS:
        reached = fraction_objective(load_E[np.newaxis], np.ones(1), row, fraction_S, num_ranks)
        low, group_E = component_bound(load_E, num_ranks, slots_per_rank, low, min(best, reached))
        if group_E is not None:
            rows.append(place_groups(load_E, group_E, num_ranks, slots_per_rank)[0])
    return rows, low


def _search(
    load_WE: FloatArray,
    weight_W: FloatArray,
    topology: Topology,
    split: str,
    start_S: IntArray,
    start: float,
    low: float,
    end_s: float | None,
    seed: int,
    workers: int,
) -> tuple[list[IntArray], float, str]:
    """Return placements worth scoring, a bound, and why an optimum may not be proven."""

    def left_s() -> float | None:
        return None if end_s is None else max(0.01, end_s - time.perf_counter())

    num_windows, num_experts = load_WE.shape
    stop_reason = "time_limit"
    rows: list[IntArray] = []
    if split == "even" and topology.slots_per_rank == 2 and num_windows == 1:
        unit = float(weight_W[0])
        pairs = solve_pairs(
            load_WE[0], topology.num_ranks, low=low / unit, time_limit_s=left_s(), seed=seed
        )
        rows.append(pairs.phys_to_log_S)
        low = max(low, pairs.bound * unit)
        start = min(start, pairs.objective * unit)
        if low >= start * (1 - PROOF_GAP):
            return rows, low, stop_reason
    # Under other rules than nearest the nodes do not count: all ranks are one node.
    flat = topology if split == "nearest" else _one_node(topology)
    if split in ("even", "nearest") and topology.num_slots <= _RANK_SLOTS:
        limit_s = None if end_s is None else _RANK_PART * (left_s() or 0.0)
        found, low = place_by_ranks(load_WE, weight_W, flat, start, low, limit_s)
        if found:
            rows.append(found[-1])
            start_S = found[-1]
            start = _objective(load_WE, weight_W, start_S, topology, split)
        if low >= start * (1 - PROOF_GAP):
            return rows, low, stop_reason
    by_cuts = split == "batch" and num_windows >= _CUT_WINDOWS and topology.num_ranks <= _CUT_RANKS
    if split in ("even", "nearest"):
        size = num_variables(flat, num_experts)
    elif by_cuts:
        size = num_experts << topology.num_ranks
    else:
        size = num_experts * topology.num_ranks * (1 + (num_windows if split == "batch" else 1))
    if size > _LARGEST_MODEL:
        return rows, low, "too_large"
    if split in ("even", "nearest") or by_cuts:
        place = place_by_cuts if by_cuts else place_by_shares
        found, bound = place(
            load_WE, weight_W, flat, start_S, start, low, left_s(), seed=seed, workers=workers
        )
    else:
        found, bound = place_by_fractions(
            load_WE, weight_W, flat, low, left_s(), per_window=split == "batch"
        )
    return rows + found, max(low, bound), stop_reason


def _one_node(topology: Topology) -> Topology:
    return Topology(
        num_nodes=1, ranks_per_node=topology.num_ranks, slots_per_rank=topology.slots_per_rank
    )


def _greedy_row(load_WE: FloatArray, weight_W: FloatArray, topology: Topology) -> IntArray:
    """Return the slots of ``greedy`` on the mean load; those that it cannot fill stay empty."""
    num_experts = load_WE.shape[1]
    per_rank = min(topology.slots_per_rank, num_experts)
    row_LS, _ = place_greedy(
        (weight_W @ load_WE)[np.newaxis].astype(np.float32),
        num_slots=topology.num_ranks * per_rank,
        num_ranks=topology.num_ranks,
        distinct_ranks=True,
    )
    row_RK = np.full((topology.num_ranks, topology.slots_per_rank), EMPTY, np.int64)
    row_RK[:, :per_rank] = row_LS[0].reshape(topology.num_ranks, per_rank)
    return row_RK.reshape(-1)


def _objective(
    load_WE: FloatArray, weight_W: FloatArray, row_S: IntArray, topology: Topology, split: str
) -> float:
    """Return the weighted mean over windows of the largest rank load under a rule."""
    if split == "batch":
        return float(batch_max_load(load_WE, row_S, topology.num_ranks) @ weight_W)
    if split == "weighted":
        return best_fractions(load_WE, weight_W, row_S, topology.num_ranks)[1]
    share_S = slot_share(row_S[np.newaxis], load_WE.shape[1], topology, split)[0]
    return fraction_objective(load_WE, weight_W, row_S, share_S, topology.num_ranks)
