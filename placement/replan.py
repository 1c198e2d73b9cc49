"""Follow the traffic from the placement in force: the best balance for each number of moves.

Each layer is repaired on its own (:mod:`eplb.placement.repair_kernel`), and moves go to the layers
in which they gain most for each expert fetched. What is fitted is what the traffic is like now and
where it may go (:mod:`eplb.placement.forecast`). What a move costs decides how many are worth it:
:func:`break_even`.

Shape letters: W windows, L layers, E logical experts, S slots, R ranks, K slots of a rank, M moves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput, PlacementInvalid
from eplb.metrics import CVAR_TAIL, tail_mean
from eplb.placement.forecast import forecast_windows
from eplb.placement.in_service import put_back, reduced_placement, reduced_problem
from eplb.placement.keep_slots import count_moves, reorder_slots
from eplb.placement.windows import fit_windows
from eplb.problem import Problem
from eplb.slots import Placement

__all__ = ["BreakEven", "Point", "Replan", "break_even", "replan"]

# The largest load of a window is stood for by its loads' norm of power 2 ** 4 = 16; the ranks that
# moves relieve. A higher power fits the last windows better and the next ones worse.
DOUBLINGS, HOT_RANKS = 4, 6
# Rounds of new window weights for `worst` and `cvar`.
ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A number of moves, and what is reached with it.

    Parameters
    ----------
    moves : int
        Experts that ranks have to fetch.
    imbalance : float
        The statistic over the windows fitted, which is a forecast: mean over layers of the weighted
        imbalance, or the worst or the CVaR of steps.
    """

    moves: int
    imbalance: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replan:
    """Placements of few moves.

    Parameters
    ----------
    placement : Placement
        The one that uses the moves allowed as far as they gain.
    num_moves : int
        Experts that ranks have to fetch for it.
    curve : tuple of Point
        Pareto curve from no move on.
    """

    placement: Placement
    num_moves: int
    curve: tuple[Point, ...]
    _at: Callable[[int], Placement]

    def at(self, moves: int) -> Placement:
        """Return the placement of a point of the curve.

        Raises
        ------
        InvalidInput
            The curve has no point of so many moves.
        """
        if moves not in {point.moves for point in self.curve}:
            raise InvalidInput(f"the curve has no point of {moves} moves")
        return self._at(moves)


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """What moves cost and gain within a horizon, both in seconds.

    Parameters
    ----------
    moves : int
        The number that saves most; 0 where none saves anything.
    gain_s, transfer_s : float
        Of ``moves``, or where that is 0 of the cheapest number that gains anything.
    """

    moves: int
    gain_s: float
    transfer_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layers:
    """What the kernel found: of each layer the best slots within each number of moves."""

    best_LMRK: list[IntArray]
    share_LMRK: list[FloatArray] | None
    objective_LM: FloatArray


def replan(
    problem: Problem,
    placement: Placement,
    *,
    max_moves: int,
    max_moves_per_layer: int | None = None,
    seed: int = 0,
) -> Replan:
    """Search from a placement under a limit on moves.

    Parameters
    ----------
    problem : Problem
        Its profile is the past, oldest window first; its split rule, statistic and groups are kept.
    placement : Placement
        The one in force, of the profile's layers at least.
    max_moves : int
        Over all layers.
    max_moves_per_layer : int, optional
        Where left out, a layer takes up to half as much again as its part.
    seed : int
        Of the windows that are fitted beside recorded ones.

    Returns
    -------
    Replan
        Of the profile's layers.

    Raises
    ------
    InvalidInput
        A limit is negative, or ranks differ in speed.
    PlacementInvalid
        An expert is twice on a rank, which the search does not keep, or the placement does not fit
        the problem.
    """
    if max_moves < 0 or (max_moves_per_layer is not None and max_moves_per_layer < 0):
        raise InvalidInput("the limit on moves must be at least 0")
    if problem.topology.rank_speed is not None:
        raise InvalidInput(
            "moves are searched for ranks of one speed, and rank_speed says that they differ; "
            "leave it out of the topology"
        )
    part = reduced_problem(problem)
    if part is not problem:
        return _in_service(problem, part, placement, max_moves, max_moves_per_layer, seed)
    old = _of_layers(problem, placement)
    num_layers, num_slots = old.phys_to_log_LS.shape
    per_layer = max_moves_per_layer
    if per_layer is None:
        per_layer = -(-3 * max_moves // (2 * num_layers))
    per_layer = min(per_layer, max_moves, num_slots)
    num_ranks = problem.topology.num_ranks
    if problem.statistic == "mean":
        load_WLE, weight_WL = forecast_windows(problem.profile, num_ranks, seed=seed)
        layers = _repaired(problem, old, load_WLE, weight_WL, per_layer)
        moves_CL, points = _divide(layers.objective_LM, max_moves)
        found = [(point, layers, moves_L) for point, moves_L in zip(points, moves_CL, strict=True)]
    else:
        found = _coupled(problem, old, max_moves, per_layer, seed)

    def at(moves: int) -> Placement:
        _, layers, moves_L = next(entry for entry in found if entry[0].moves == moves)
        return _placement(old, layers, moves_L, num_ranks)

    last = found[-1][0].moves
    new = at(last)
    assert count_moves(old.phys_to_log_LS, new.phys_to_log_LS, num_ranks) == last
    return Replan(
        placement=new, num_moves=last, curve=tuple(point for point, _, _ in found), _at=at
    )


def _in_service(
    problem: Problem,
    part: Problem,
    placement: Placement,
    max_moves: int,
    max_moves_per_layer: int | None,
    seed: int,
) -> Replan:
    """Search on the ranks in service, and put what is found back among all ranks."""
    topology = problem.topology
    found = replan(
        part,
        reduced_placement(placement, topology),
        max_moves=max_moves,
        max_moves_per_layer=max_moves_per_layer,
        seed=seed,
    )
    return replace(
        found,
        placement=put_back(found.placement, topology),
        _at=lambda moves: put_back(found.at(moves), topology),
    )


def break_even(
    curve: Sequence[Point],
    *,
    step_s: float,
    horizon_steps: int,
    transfer_s: Callable[[int], float],
) -> BreakEven:
    """Return the number of moves that saves the most time within a horizon.

    Steps are taken to last as long as their imbalance says: one of imbalance 1 takes ``step_s``, of
    which only the expert layers should be meant. ``transfer_s`` tells what moves take.
    """
    before = curve[0].imbalance
    worth = [
        BreakEven(
            moves=point.moves,
            gain_s=(before - point.imbalance) * step_s * horizon_steps,
            transfer_s=transfer_s(point.moves),
        )
        for point in curve[1:]
    ]
    if not worth:
        return BreakEven(moves=0, gain_s=0.0, transfer_s=0.0)
    best = max(worth, key=lambda w: (w.gain_s - w.transfer_s, -w.moves))
    return best if best.gain_s > best.transfer_s else replace(best, moves=0)


def _of_layers(problem: Problem, placement: Placement) -> Placement:
    """Return the profile's layers of a placement that fits the problem."""
    topology, model = problem.topology, problem.model
    if (placement.num_slots, placement.num_experts) != (topology.num_slots, model.num_experts):
        raise PlacementInvalid(
            f"the plan has {placement.num_slots} slots for {placement.num_experts} experts, and "
            f"this one {topology.num_slots} for {model.num_experts}; plan anew for another model "
            "or topology"
        )
    rows = placement.rows(problem.profile.layer_ids)
    weights_LS = placement.split_weights_LS
    if problem.split != "weighted":
        weights_LS = None
    elif weights_LS is None:
        raise PlacementInvalid(
            "split weighted needs split_weights and this placement has none; plan with --split "
            "weighted"
        )
    old = Placement(
        phys_to_log_LS=placement.phys_to_log_LS[rows],
        layer_ids=problem.profile.layer_ids,
        num_experts=model.num_experts,
        split_weights_LS=None if weights_LS is None else weights_LS[rows],
    )
    by_rank = np.sort(old.phys_to_log_LS.reshape(len(rows), topology.num_ranks, -1), axis=2)
    if ((by_rank[:, :, 1:] == by_rank[:, :, :-1]) & (by_rank[:, :, 1:] >= 0)).any():
        raise PlacementInvalid(
            "the plan has replicas of an expert on one rank, which replan does not keep; plan "
            "anew without --shared-ranks"
        )
    return old


def _repaired(
    problem: Problem, old: Placement, load_WLE: FloatArray, weight_WL: FloatArray, per_layer: int
) -> _Layers:
    """Search every layer, in parallel."""
    # Numba takes a second to import, and not every command searches.
    from eplb.placement.anneal_kernel import RULES, WEIGHTED, Layer  # noqa: PLC0415
    from eplb.placement.repair_batch import repair_batch_layer  # noqa: PLC0415
    from eplb.placement.repair_kernel import repair_layer  # noqa: PLC0415

    topology, split = problem.topology, problem.split
    old_LRK = old.phys_to_log_LS.reshape(len(load_WLE[0]), topology.num_ranks, -1)
    total_L = np.maximum(weight_WL.sum(axis=0), np.finfo(float).tiny)

    def one(row: int) -> tuple[IntArray, FloatArray, FloatArray]:
        used_W = weight_WL[:, row] > 0
        share_RK = np.zeros(old_LRK[row].shape)
        if old.split_weights_LS is not None:
            share_RK = old.split_weights_LS[row].reshape(share_RK.shape).copy()
        layer = Layer(
            load_EW=np.ascontiguousarray(load_WLE[used_W, row].T, dtype=np.float64),
            weight_W=np.ascontiguousarray(weight_WL[used_W, row] / total_L[row]),
            node_E=_nodes(problem, old_LRK[row]),
            slot_RK=old_LRK[row].copy(),
            share_RK=share_RK,
            # Splits of batches are looked at by their mean fractions.
            rule=WEIGHTED if split == "batch" else RULES[split],
            ranks_per_node=topology.ranks_per_node,
            random=np.ones(1, np.uint64),
        )
        if split == "batch":
            best_MRK, objective_M = repair_batch_layer(layer, per_layer, DOUBLINGS, HOT_RANKS)
            return best_MRK, np.zeros(0), objective_M
        best_MRK, share_MRK, objective_M = repair_layer(layer, per_layer, DOUBLINGS, HOT_RANKS)
        return best_MRK, share_MRK, objective_M

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        found = list(threads.map(one, range(len(old_LRK))))
    return _Layers(
        best_LMRK=[best for best, _, _ in found],
        share_LMRK=[share for _, share, _ in found] if split == "weighted" else None,
        objective_LM=np.stack([objective for _, _, objective in found]),
    )


def _nodes(problem: Problem, slot_RK: IntArray) -> IntArray:
    """Return the node that each expert has to stay in, -1 where it may go anywhere."""
    node_E = np.full(problem.model.num_experts, -1)
    if problem.groups_in_nodes:
        rank, slot = np.nonzero(slot_RK >= 0)
        node_E[slot_RK[rank, slot]] = rank // problem.topology.ranks_per_node
    return node_E


def _divide(objective_LM: FloatArray, max_moves: int) -> tuple[list[IntArray], list[Point]]:
    """Divide moves over layers: those steps first that gain most for each move.

    Returns the moves of each layer at every point, and the points.
    """
    num_layers = len(objective_LM)
    steps = sorted(
        (-gain, layer, start, size)
        for layer, objective_M in enumerate(objective_LM)
        for gain, start, size in _steps(objective_M)
    )
    moves_L = np.zeros(num_layers, np.int64)
    total, value = 0, float(objective_LM[:, 0].mean())
    all_moves, points = [moves_L], [Point(moves=0, imbalance=value)]
    for negative_gain, layer, start, size in steps:
        # A step that is too large takes the later ones of its layer with it.
        if total + size > max_moves or moves_L[layer] != start:
            continue
        moves_L = moves_L.copy()
        moves_L[layer] += size
        total += size
        value += negative_gain * size / num_layers
        all_moves.append(moves_L)
        points.append(Point(moves=total, imbalance=value))
    return all_moves, points


def _steps(objective_M: FloatArray) -> list[tuple[float, int, int]]:
    """Return gain a move, start and size of the steps down the lower convex hull of a curve."""
    steps, now = [], 0
    while now + 1 < len(objective_M):
        ahead = objective_M[now] - objective_M[now + 1 :]
        gain = ahead / np.arange(1, len(ahead) + 1)
        size = int(gain.argmax()) + 1
        if gain[size - 1] <= 0:
            break
        steps.append((float(gain[size - 1]), now, size))
        now += size
    return steps


def _coupled(
    problem: Problem, old: Placement, max_moves: int, per_layer: int, seed: int
) -> list[tuple[Point, _Layers, IntArray]]:
    """Return the Pareto curve for a statistic that couples layers (``worst``, ``cvar``).

    Each round repairs for weighted windows, and weight then moves to the windows that cost most.
    """
    num_ranks = problem.topology.num_ranks
    windows = fit_windows(problem.profile, num_ranks, extend=False, seed=seed)
    load_WLE, loaded_WL = windows.load_WLE, windows.weight_WL > 0
    part_WL = loaded_WL / np.maximum(loaded_WL.sum(axis=1, keepdims=True), 1)
    window_W = np.full(len(load_WLE), 1.0 / len(load_WLE))
    statistic = np.max if problem.statistic == "worst" else tail_mean
    found: list[tuple[Point, _Layers, IntArray]] = []
    for number in range(ROUNDS):
        layers = _repaired(problem, old, load_WLE, window_W[:, np.newaxis] * part_WL, per_layer)
        moves_CL, points = _divide(layers.objective_LM, max_moves)
        cost_W = np.zeros(len(load_WLE))
        for point, moves_L in zip(points, moves_CL, strict=True):
            placement = _placement(old, layers, moves_L, num_ranks)
            cost_W = _step_costs(problem, placement, load_WLE)
            value = float(statistic(cost_W))
            found.append((replace(point, imbalance=value), layers, moves_L))
        spread = max(float(cost_W.max() - cost_W.mean()), 1e-9)
        toward_W = np.exp((cost_W - cost_W.max()) * (2.0 ** (number / 2 + 1) / spread))
        window_W = 0.5 * window_W + 0.5 * toward_W / toward_W.sum()
        if problem.statistic == "cvar":
            window_W = np.minimum(window_W, 1.0 / max(CVAR_TAIL * len(window_W), 1.0))
            window_W /= window_W.sum()
    curve: list[tuple[Point, _Layers, IntArray]] = []
    for entry in sorted(found, key=lambda entry: (entry[0].moves, entry[0].imbalance)):
        if not curve or entry[0].imbalance < curve[-1][0].imbalance:
            if curve and curve[-1][0].moves == entry[0].moves:
                curve.pop()
            curve.append(entry)
    return curve


def _step_costs(problem: Problem, placement: Placement, load_WLE: FloatArray) -> FloatArray:
    """Return what each window costs: its mean imbalance over layers."""
    from eplb.load_profile import LoadProfile  # noqa: PLC0415
    from eplb.metrics import rank_load  # noqa: PLC0415

    profile = LoadProfile.from_counts(load_WLE, layer_ids=placement.layer_ids)
    load_WLR = rank_load(profile, placement, problem.topology, problem.split)
    largest_WL = load_WLR.max(axis=2)
    loaded_WL = largest_WL > 0
    costs: FloatArray = largest_WL.sum(axis=1) / np.maximum(loaded_WL.sum(axis=1), 1)
    return costs


def _placement(old: Placement, layers: _Layers, moves_L: IntArray, num_ranks: int) -> Placement:
    """Return the slots within so many moves of each layer; experts that stay keep their slots."""
    if not moves_L.any():
        return old
    old_LRK = old.phys_to_log_LS.reshape(len(moves_L), num_ranks, -1)
    best_LRK = np.stack(
        [best_MRK[m] for best_MRK, m in zip(layers.best_LMRK, moves_L, strict=True)]
    )
    new_LRK = reorder_slots(best_LRK, old_LRK)
    weights_LS = None
    if layers.share_LMRK is not None:
        share_LRK = np.stack(
            [share_MRK[m] for share_MRK, m in zip(layers.share_LMRK, moves_L, strict=True)]
        )
        # No expert is twice on a rank, so a slot is told by its expert.
        slot_LRK = (new_LRK[..., np.newaxis] == best_LRK[:, :, np.newaxis]).argmax(axis=3)
        share_LRK = np.where(new_LRK >= 0, np.take_along_axis(share_LRK, slot_LRK, axis=2), 0.0)
        weights_LS = share_LRK.reshape(old.phys_to_log_LS.shape)
    return replace(
        old, phys_to_log_LS=new_LRK.reshape(old.phys_to_log_LS.shape), split_weights_LS=weights_LS
    )
