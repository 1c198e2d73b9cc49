"""What the integer programmes of one layer share: scaling, order of ranks, objective, solving.

Loads become whole numbers by rounding down, so for every placement the programme's objective is
at most the true one times the scale: its bound is a bound of the real-valued problem.
Shape letters: W windows, E logical experts, S slots, R ranks, K slots of a rank, V variables.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.slots import EMPTY
from eplb.topology import Topology

__all__ = ["LayerModel", "held_by_ranks", "rank_order", "slots_of"]

# Rounding down takes at most 1 / this from a rank load of the size of the mean one.
_UNITS_PER_SLOT = 4_000_000
# Rounding down takes at most 1 / this from the objective where weights differ.
_WEIGHT_UNITS = 10_000_000
_ROUNDING = 2e-6
# What a sum in the model stays below (CP-SAT computes in 64 bits).
_LARGEST_SUM = 1 << 60
# Ranks are put in order of the experts on them, read as binary digits: those of the hottest.
_ORDERING_EXPERTS = 20


def held_by_ranks(row_S: IntArray, num_experts: int, num_ranks: int) -> np.ndarray[Any, Any]:
    """Return which experts lie on which rank, bool of the shape [E, R]."""
    held_ER = np.zeros((num_experts, num_ranks), bool)
    filled = np.flatnonzero(row_S >= 0)
    held_ER[row_S[filled], filled // (len(row_S) // num_ranks)] = True
    return held_ER


def slots_of(held_ER: np.ndarray[Any, Any], slots_per_rank: int) -> IntArray:
    """Return the slots that hold these experts, each rank's in order of id, shape [S]."""
    row_RK = np.full((held_ER.shape[1], slots_per_rank), EMPTY, np.int64)
    for rank, held_E in enumerate(held_ER.T):
        experts = np.flatnonzero(held_E)
        row_RK[rank, : len(experts)] = experts
    return row_RK.reshape(-1)


def rank_order(held_ER: np.ndarray[Any, Any], first_E: IntArray, topology: Topology) -> IntArray:
    """Return the ranks in falling order of their experts, within nodes, and nodes by their first.

    ``first_E`` are the experts that count, the most significant first.
    """
    digits = 1 << np.arange(len(first_E))[::-1]
    key_NM = (digits @ held_ER[first_E]).reshape(topology.num_nodes, -1)
    rank_NM = np.argsort(-key_NM, axis=1, kind="stable")
    first_N = np.take_along_axis(key_NM, rank_NM[:, :1], axis=1)[:, 0]
    node_N = np.argsort(-first_N, kind="stable")
    order: IntArray = (rank_NM + np.arange(len(first_N))[:, np.newaxis] * key_NM.shape[1])[
        node_N
    ].reshape(-1)
    return order


class LayerModel:
    """A CP-SAT model of which ranks hold which experts, and what that costs.

    Parameters
    ----------
    load_WE, weight_W : arrays of float64
    topology : Topology
    start_S : array of int64
        Its values become hints, after its ranks are put in order.
    start, low : float
        The objective of ``start_S``, above which nothing is looked for, and a bound known before.

    Attributes
    ----------
    model : ortools.sat.python.cp_model.CpModel
    start_ER : array of bool, shape [E, R]
        The start, its ranks in order.
    """

    def __init__(
        self,
        load_WE: FloatArray,
        weight_W: FloatArray,
        topology: Topology,
        start_S: IntArray,
        start: float,
        low: float,
    ) -> None:
        # OR-Tools takes a second to import, and only exact solves need it.
        from ortools.sat.python import cp_model  # noqa: PLC0415

        self._cp_model = cp_model
        self.model = cp_model.CpModel()
        self.topology = topology
        num_windows, num_experts = load_WE.shape
        mean_E = weight_W @ load_WE
        self._load_WE = load_WE
        self._start, self._low = start, low
        self._scale = _UNITS_PER_SLOT * topology.slots_per_rank * topology.num_ranks / mean_E.sum()
        self._first_E = np.argsort(-mean_E, kind="stable")[:_ORDERING_EXPERTS]
        held_ER = held_by_ranks(start_S, num_experts, topology.num_ranks)
        self.start_ER = held_ER[:, rank_order(held_ER, self._first_E, topology)]
        self._place: list[list[Any]] = []
        self._terms: list[list[list[Any]]] = [
            [[] for _ in range(topology.num_ranks)] for _ in range(num_windows)
        ]
        mean_W = load_WE.sum(axis=1) / topology.num_ranks
        # With every other window at its mean, this one has what is left of the start's objective.
        most_W = mean_W + (start - weight_W @ mean_W) / weight_W
        low_W = np.floor(mean_W * self._scale)
        high_W = np.ceil(np.minimum(most_W, load_WE.sum(axis=1)) * self._scale) + 1
        self.largest_W = [
            self.model.new_int_var(int(least), int(most), "")
            for least, most in zip(low_W, high_W, strict=True)
        ]
        if np.ptp(weight_W) <= 1e-12 * weight_W[0]:
            # Equal weights lose nothing.
            self._weights, self._weight_scale = np.ones(num_windows, np.int64), 1 / weight_W[0]
        else:
            self._weight_scale = min(
                _WEIGHT_UNITS * num_windows / weight_W.sum(), _LARGEST_SUM / (weight_W @ high_W)
            )
            self._weights = np.floor(weight_W * self._weight_scale).astype(np.int64)

    def new_bool(self, hint: bool) -> Any:
        """Return a new variable of 0 or 1 with its value at the start."""
        variable = self.model.new_bool_var("")
        self.model.add_hint(variable, hint)
        return variable

    def whole(self, load: float) -> int:
        """Return a load in the model's unit, rounded down."""
        return int(np.floor(load * self._scale))

    def add_load(self, rank: int, expert: int, share: float, on: Any) -> None:
        """Let a variable bring a share of an expert's load to a rank, in all windows."""
        for window, load in enumerate(self._load_WE[:, expert]):
            whole = self.whole(load * share)
            if whole:
                self._terms[window][rank].append(whole * on)

    def hold(self, expert: int, on_RV: list[list[Any]]) -> None:
        """Say which variables put an expert on each rank; experts come in order of id."""
        assert expert == len(self._place)
        self._place.append([sum(on_V) for on_V in on_RV])
        for on_V in on_RV:
            if len(on_V) > 1:
                self.model.add_at_most_one(on_V)

    def solve(
        self, time_limit_s: float | None, *, seed: int, workers: int
    ) -> tuple[list[IntArray], float]:
        """Return the placements found (none, or one) and a bound on the objective."""
        model, topology = self.model, self.topology
        for rank in range(topology.num_ranks):
            model.add(sum(on[rank] for on in self._place) <= topology.slots_per_rank)
        for largest, terms_R in zip(self.largest_W, self._terms, strict=True):
            for terms in terms_R:
                if terms:
                    model.add(sum(terms) <= largest)
        self._order_ranks()
        objective = sum(
            int(weight) * largest
            for weight, largest in zip(self._weights, self.largest_W, strict=True)
        )
        unit = self._scale * self._weight_scale
        # Less what rounding may have taken from the objective of any placement.
        model.add(objective >= int(self._low * unit * (1 - _ROUNDING)))
        model.minimize(objective)
        solver = self._cp_model.CpSolver()
        solver.parameters.num_workers = workers
        solver.parameters.random_seed = seed % (1 << 31)
        if time_limit_s is not None:
            solver.parameters.max_time_in_seconds = time_limit_s
        status = solver.solve(model)
        if status == self._cp_model.INFEASIBLE:
            # Nothing as good as the start is in the model.
            return [], self._start
        bound = max(0.0, solver.best_objective_bound) / unit
        if status not in (self._cp_model.OPTIMAL, self._cp_model.FEASIBLE):
            return [], bound
        held_ER = np.array([[bool(solver.value(on)) for on in on_R] for on_R in self._place])
        return [slots_of(held_ER, topology.slots_per_rank)], bound

    def _order_ranks(self) -> None:
        """Ranks of a node are alike, and so are nodes: keep one order of each."""
        digits = [1 << i for i in reversed(range(len(self._first_E)))]
        key_R = [
            sum(
                digit * self._place[e][rank] for digit, e in zip(digits, self._first_E, strict=True)
            )
            for rank in range(self.topology.num_ranks)
        ]
        per_node = self.topology.ranks_per_node
        for rank in range(1, self.topology.num_ranks):
            previous = rank - 1 if rank % per_node else rank - per_node
            self.model.add(key_R[previous] >= key_R[rank])
