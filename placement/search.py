"""The ``search`` solver: annealing of every layer over all windows, layers in parallel.

Starts from ``greedy`` or a given plan and never ends worse. The inner loops are compiled
(:mod:`eplb.placement.annealing`, :mod:`eplb.placement.batch_annealing`); here is what surrounds
them: which windows are fitted, how the budget is spent, and the statistics that couple layers.

``mean`` is a sum over layers, each solved by itself. ``worst`` and ``cvar`` are not: they are the
largest of weighted means over the weights that windows can get, so after a first search for the
mean, weights move to the windows whose steps cost most, and the layers are searched again.

Shape letters: W windows, L layers, E logical experts, S slots, R ranks, K slots of a rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray
from eplb.batch_split import batch_max_load
from eplb.load_profile import replace_windows
from eplb.metrics import CVAR_TAIL, tail_mean
from eplb.placement.anneal_kernel import RULES, Layer
from eplb.placement.annealing import anneal
from eplb.placement.batch_annealing import anneal_batch
from eplb.placement.graph import ring_placement
from eplb.placement.windows import FitWindows, fit_windows, scaled_windows
from eplb.problem import Problem
from eplb.slots import Placement
from eplb.split import slot_share

__all__ = ["DEFAULT_SWEEPS", "SearchResult", "search"]

# Sweeps a layer without a time limit; each is as many proposals as there are slots.
DEFAULT_SWEEPS = 4000
# Relaxing splits makes a proposal under `batch` dearer by an order of magnitude.
BATCH_SWEEPS_PART = 0.06

# The first part of a budget brings the start down to where annealing makes sense; temperatures
# follow from the excess over balance that is left then.
_QUENCH_PART, _QUENCH_TEMPERATURES = 0.1, (3e-4, 1e-4)
_FIRST_TEMPERATURE, _FALL, _LEAST_TEMPERATURE = 0.01, 30.0, 1e-4
# Powers of the norm that stands for the largest rank load, as exponents of 2.
_DOUBLINGS = (5, 6, 7)
_BATCH_DOUBLINGS = (4, 5, 6)
_CHUNKS = 30
_ROUNDING = 1e-9
# How much better a free search has to fit under `batch` than a ring does.
_RING_MARGIN = 1e-3

# The part of a time limit in which the windows to fit may be refined.
_WINDOWS_PART = 0.1

# Rounds of new window weights for `worst` and `cvar`, and the part of the budget they take.
_ROUNDS, _ROUNDS_PART = 20, 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What the search found.

    Parameters
    ----------
    phys_to_log_LS : array of int64
    split_weights_LS : array of float64 or None
        Under ``weighted``.
    weight_WL : array of float64
        Weights of the recorded windows under which the layers were searched last: the bound for
        these weights is the bound for the statistic.
    stop_reason : str
    notes : dict
    """

    phys_to_log_LS: IntArray
    split_weights_LS: FloatArray | None
    weight_WL: FloatArray
    stop_reason: str
    notes: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """A layer's slots and the fractions they receive."""

    slot_RK: IntArray
    share_RK: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Budget:
    """Sweeps a layer, or seconds of one thread a layer."""

    sweeps: int
    seconds: float | None

    def part(self, fraction: float) -> _Budget:
        return _Budget(
            sweeps=max(1, round(self.sweeps * fraction)),
            seconds=None if self.seconds is None else self.seconds * fraction,
        )

    def chunks(self, run: Callable[[float, float, int], None]) -> None:
        """Call ``run`` with where each chunk starts and ends (0 to 1) and its sweeps."""
        for start, end, sweeps in self._by_sweeps() if self.seconds is None else self._by_time():
            run(start, end, sweeps)

    def _by_sweeps(self) -> Iterator[tuple[float, float, int]]:
        edges = np.unique(np.linspace(0, self.sweeps, _CHUNKS + 1).round().astype(int))
        for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            yield a / self.sweeps, b / self.sweeps, b - a

    def _by_time(self) -> Iterator[tuple[float, float, int]]:
        assert self.seconds is not None
        begin = time.perf_counter()
        done, sweeps = 0.0, 1
        while done < 1.0:
            elapsed = time.perf_counter() - begin
            spent = elapsed / self.seconds if self.seconds > 0 else 1.0
            yield done, min(1.0, max(done, spent)), sweeps
            now = time.perf_counter() - begin
            done = now / self.seconds if self.seconds > 0 else 1.0
            # As many sweeps as a chunk's part of the time allows, at the pace of the last chunk.
            pace = max(now - elapsed, 1e-9) / sweeps
            sweeps = max(1, int(self.seconds / _CHUNKS / pace))


def search(
    problem: Problem,
    starts: Sequence[Placement],
    *,
    seed: int = 0,
    sweeps: int = DEFAULT_SWEEPS,
    time_limit_s: float | None = None,
    extend: bool = True,
) -> SearchResult:
    """Search a placement for a problem.

    Parameters
    ----------
    problem : Problem
    starts : sequence of Placement
        Of the profile's layers; they keep the problem's constraints, with replicas on distinct
        ranks. Each layer starts from the best for it, and what is found is not worse than any.
        Under ``weighted`` a start without fractions means even ones.
    seed : int
        The same seed and number of sweeps give the same bytes.
    sweeps : int
        The budget of each layer, unless a time limit is given.
    time_limit_s : float, optional
        Wall time for all layers; compiling, once a machine, is not counted.
    extend : bool
        Fit also windows that may come (:mod:`eplb.placement.windows`); for the mean only.
    """
    warm_up(problem.split)
    deadline = None if time_limit_s is None else time.perf_counter() + time_limit_s
    num_ranks = problem.topology.num_ranks
    # Windows without any load are no steps.
    used_W: NDArray[np.bool_] = np.any(problem.profile.counts_WLE, axis=(1, 2))
    profile = problem.profile if used_W.all() else replace_windows(problem.profile, used_W)
    recorded_WLE = scaled_windows(profile, num_ranks)
    windows = fit_windows(
        profile,
        num_ranks,
        extend=extend and problem.statistic == "mean",
        seed=seed,
        time_limit_s=None if time_limit_s is None else _WINDOWS_PART * time_limit_s,
    )
    candidates = [_layouts(start, problem) for start in starts]
    start = candidates[0]
    for candidate in candidates[1:]:
        start = _better_layers(problem.split, recorded_WLE, start, candidate)
    layers = _Layers(problem, start, windows.load_WLE, seed)
    remaining = None if deadline is None else max(deadline - time.perf_counter(), 0.0)
    budget = layers.budget(sweeps, remaining)
    if problem.statistic == "mean":
        layers.improve(windows.weight_WL, budget)
        weight_WL = windows.weight_WL
    else:
        layers.improve(windows.weight_WL, budget.part(1 - _ROUNDS_PART))
        weight_WL = _couple(layers, windows.weight_WL, problem.statistic, budget)
    found = layers.layouts
    for candidate in (start, *candidates):
        found = _not_worse(problem, recorded_WLE, candidate, found)
    recorded_weight_WL = np.zeros((len(used_W), len(found)))
    recorded_weight_WL[used_W] = _of_recorded(windows, weight_WL, recorded_WLE, problem.statistic)
    num_slots = problem.topology.num_slots
    return SearchResult(
        phys_to_log_LS=np.stack([layout.slot_RK.reshape(num_slots) for layout in found]),
        split_weights_LS=(
            np.stack([layout.share_RK.reshape(num_slots) for layout in found])
            if problem.split == "weighted"
            else None
        ),
        weight_WL=recorded_weight_WL,
        stop_reason="finished" if time_limit_s is None else "time_limit",
        notes={**windows.notes, **({} if time_limit_s is not None else {"sweeps": sweeps})},
    )


def warm_up(split: str) -> None:
    """Compile the inner loops, or read them from numba's cache."""
    layer = _layer_arguments(
        np.ones((2, 1)), np.ones(1), np.full(2, -1), np.ones(1, np.uint64), split, 1
    )
    layout = _Layout(slot_RK=np.array([[0, 1], [1, 0]]), share_RK=np.full((2, 2), 0.5))
    _run(layer, layout, split, 1e-3, 1e-3, 1, 1, layout, np.inf, fixed=False)


def _of_recorded(
    windows: FitWindows, weight_WL: FloatArray, recorded_WLE: FloatArray, statistic: str
) -> FloatArray:
    """Return weights of the recorded windows in place of those of the windows kept."""
    weights = np.zeros(recorded_WLE.shape[:2])
    weights[windows.kept] = weight_WL[: len(windows.kept)]
    if statistic == "cvar":
        # A window kept for many has only its own part in the tail of all.
        cap = 1.0 / max(CVAR_TAIL * len(weights), 1.0)
        weights /= np.maximum(weights.sum(axis=1, keepdims=True) / cap, 1.0)
    return weights


class _Layers:
    """The layers of a problem, their layouts so far, and the threads that improve them."""

    def __init__(
        self,
        problem: Problem,
        start: list[_Layout],
        load_WLE: FloatArray,
        seed: int,
    ) -> None:
        self.problem = problem
        self.load_LEW = np.ascontiguousarray(load_WLE.transpose(1, 2, 0))
        self.layouts = start
        self.node_LE = [_nodes(problem, layout) for layout in start]
        # A stream of random numbers for each layer, whichever thread works on it; xorshift stands
        # still at 0.
        self.random_L = np.random.SeedSequence(seed % 2**64).generate_state(
            len(start), np.uint64
        ) | np.uint64(1)
        self.num_threads = min(len(os.sched_getaffinity(0)), len(start))

    def budget(self, sweeps: int, seconds: float | None) -> _Budget:
        """Return the budget of one layer."""
        if self.problem.split == "batch":
            sweeps = max(1, round(sweeps * BATCH_SWEEPS_PART))
        if seconds is not None:
            # What the slowest thread does decides: some have a layer more than others.
            seconds = 0.95 * seconds / -(-len(self.layouts) // self.num_threads)
        return _Budget(sweeps=sweeps, seconds=seconds)

    def improve(self, weight_WL: FloatArray, budget: _Budget, *, cold: bool = False) -> None:
        """Search every layer for the lowest weighted mean of its largest rank loads.

        ``cold`` stays near the layouts so far, which were fitted to weights like these.
        """

        def one(row: int) -> _Layout:
            weight_W = weight_WL[:, row]
            used_W = weight_W > 0
            if not used_W.any():
                return self.layouts[row]
            load_EW = np.ascontiguousarray(self.load_LEW[row][:, used_W])
            layer = _layer_arguments(
                load_EW,
                weight_W[used_W] / weight_W.sum(),
                self.node_LE[row],
                self.random_L[row : row + 1],
                self.problem.split,
                self.problem.topology.ranks_per_node,
            )
            if cold:
                return _anneal(
                    layer, self.layouts[row], self.problem.split, budget, fixed=False, cold=True
                )[0]
            return _improve_layer(layer, self.layouts[row], self.problem.split, budget)

        with ThreadPoolExecutor(self.num_threads) as threads:
            self.layouts = list(threads.map(one, range(len(self.layouts))))

    def ratio_WL(self) -> FloatArray:
        """Return the imbalance of the fitted windows, NaN where there is no load."""
        return _ratios(self.load_LEW.transpose(2, 0, 1), self.layouts, self.problem.split)


def _layouts(start: Placement, problem: Problem) -> list[_Layout]:
    weights_LS = start.split_weights_LS if problem.split == "weighted" else None
    return [
        _layout(row_S, None if weights_LS is None else weights_LS[row], problem)
        for row, row_S in enumerate(start.phys_to_log_LS)
    ]


def _layout(row_S: IntArray, weights_S: FloatArray | None, problem: Problem) -> _Layout:
    slot_RK = row_S.reshape(problem.topology.num_ranks, -1).astype(np.int64)
    if weights_S is None:
        rule = "nearest" if problem.split == "nearest" else "even"
        share_LS = slot_share(row_S[np.newaxis], problem.model.num_experts, problem.topology, rule)
        share_RK = share_LS.reshape(slot_RK.shape)
    else:
        share_RK = weights_S.reshape(slot_RK.shape).astype(np.float64)
    return _Layout(slot_RK=slot_RK, share_RK=share_RK)


def _nodes(problem: Problem, layout: _Layout) -> IntArray:
    """Return the node that each expert has to stay in, -1 where it may go anywhere."""
    node_E = np.full(problem.model.num_experts, -1)
    if problem.groups_in_nodes:
        node_R = np.arange(problem.topology.num_ranks) // problem.topology.ranks_per_node
        node_RK = np.broadcast_to(node_R[:, np.newaxis], layout.slot_RK.shape)
        filled_RK = layout.slot_RK >= 0
        node_E[layout.slot_RK[filled_RK]] = node_RK[filled_RK]
    return node_E


def _layer_arguments(
    load_EW: FloatArray,
    weight_W: FloatArray,
    node_E: IntArray,
    random: NDArray[np.uint64],
    split: str,
    ranks_per_node: int,
) -> Layer:
    # Slots and shares are filled in by each run.
    nothing = np.zeros((1, 1))
    return Layer(
        load_EW=load_EW,
        weight_W=np.ascontiguousarray(weight_W),
        node_E=node_E,
        slot_RK=nothing.astype(np.int64),
        share_RK=nothing,
        rule=RULES[split],
        ranks_per_node=ranks_per_node,
        random=random,
    )


def _improve_layer(layer: Layer, start: _Layout, split: str, budget: _Budget) -> _Layout:
    if split != "batch":
        return _anneal(layer, start, split, budget, fixed=False)[0]
    slots_per_rank = start.slot_RK.shape[1]
    ring = None
    if not (layer.node_E >= 0).any():
        mean_E = layer.load_EW @ layer.weight_W
        ring = ring_placement(mean_E, len(start.slot_RK), slots_per_rank)
    if ring is None:
        return _anneal(layer, start, split, budget, fixed=False)[0]
    # The ring keeps its shape, from the start anything goes. Of two that fit alike the ring is
    # kept: its shape holds on loads that are not fitted, too.
    ring_layout = _Layout(slot_RK=ring, share_RK=np.zeros(ring.shape))
    in_ring, in_ring_value = _anneal(layer, ring_layout, split, budget.part(0.7), fixed=True)
    free, free_value = _anneal(layer, start, split, budget.part(0.3), fixed=False)
    return free if free_value < in_ring_value - _RING_MARGIN else in_ring


def _anneal(
    layer: Layer,
    start: _Layout,
    split: str,
    budget: _Budget,
    *,
    fixed: bool,
    cold: bool = False,
) -> tuple[_Layout, float]:
    """Spend a budget on one layer; return the best layout and its objective on what is fitted."""
    doublings = _BATCH_DOUBLINGS if split == "batch" else _DOUBLINGS
    current = _Layout(slot_RK=start.slot_RK.copy(), share_RK=start.share_RK.copy())
    best = _Layout(slot_RK=start.slot_RK.copy(), share_RK=start.share_RK.copy())
    value = np.inf
    first, last = _QUENCH_TEMPERATURES

    def chunk(begin: float, end: float, sweeps: int) -> None:
        nonlocal value, first, last
        if begin < _QUENCH_PART:
            a, b, power = *_QUENCH_TEMPERATURES, doublings[0]
            value = _run(layer, current, split, a, b, power, sweeps, best, value, fixed=fixed)
            first = max(_FIRST_TEMPERATURE * (value - 1.0), _LEAST_TEMPERATURE)
            last = first / _FALL
            if cold:
                first = last
            return
        begin, end = ((x - _QUENCH_PART) / (1 - _QUENCH_PART) for x in (begin, end))
        a, b = (first * (last / first) ** min(x, 1.0) for x in (begin, end))
        power = doublings[min(int(begin * len(doublings)), len(doublings) - 1)]
        value = _run(layer, current, split, a, b, power, sweeps, best, value, fixed=fixed)

    budget.chunks(chunk)
    return best, float(value)


def _run(
    layer: Layer,
    current: _Layout,
    split: str,
    first: float,
    last: float,
    doublings: int,
    sweeps: int,
    best: _Layout,
    value: float,
    *,
    fixed: bool,
) -> float:
    layer = layer._replace(slot_RK=current.slot_RK, share_RK=current.share_RK)
    if split == "batch":
        found: float = anneal_batch(
            layer, first, last, doublings, sweeps, best.slot_RK, value, fixed
        )
    else:
        found = anneal(layer, first, last, doublings, sweeps, best.slot_RK, best.share_RK, value)
    return found


def _ratios(load_WLE: FloatArray, layouts: list[_Layout], split: str) -> FloatArray:
    """Return the imbalance of layouts, [W, L]; loads are scaled, so it is the largest rank load."""
    ratio_WL = np.empty(load_WLE.shape[:2])
    for row, layout in enumerate(layouts):
        load_WE = load_WLE[:, row]
        if split == "batch":
            ratio_WL[:, row] = batch_max_load(
                load_WE, layout.slot_RK.reshape(-1), len(layout.slot_RK)
            )
        else:
            share_RK = np.where(layout.slot_RK >= 0, layout.share_RK, 0.0)
            load_WRK = load_WE[:, layout.slot_RK] * share_RK
            ratio_WL[:, row] = load_WRK.sum(axis=2).max(axis=1)
    ratio_WL[~load_WLE.any(axis=2)] = np.nan
    return ratio_WL


def _couple(layers: _Layers, weight_WL: FloatArray, statistic: str, budget: _Budget) -> FloatArray:
    """Move weight to the windows that cost most, and search again; keeps the best layouts.

    The costliest of weighted means over the weights that the statistic allows (all of the weight
    on one window for ``worst``, at most 1 / (tail W) on each for ``cvar``) is the statistic.
    Weights follow the costs by exponentiated gradients, ever closer to the maximum.
    """
    loaded_WL = weight_WL > 0
    layer_part_WL = loaded_WL / np.maximum(loaded_WL.sum(axis=1, keepdims=True), 1)
    window_W = np.ones(len(weight_WL)) / len(weight_WL)
    best_value, best = np.inf, layers.layouts
    best_weight_WL = weight_WL
    for step in range(_ROUNDS + 1):
        cost_W = np.nanmean(layers.ratio_WL(), axis=1)
        value = float(cost_W.max()) if statistic == "worst" else tail_mean(cost_W)
        if value < best_value:
            best_value, best, best_weight_WL = (
                value,
                layers.layouts,
                window_W[:, None] * layer_part_WL,
            )
        if step == _ROUNDS:
            break
        spread = max(float(cost_W.max() - cost_W.mean()), 1e-9)
        toward_W = np.exp((cost_W - cost_W.max()) * (2.0 ** (step / 2 + 1) / spread))
        window_W = 0.5 * window_W + 0.5 * toward_W / toward_W.sum()
        if statistic == "cvar":
            window_W = _capped(window_W, 1.0 / max(CVAR_TAIL * len(window_W), 1.0))
        layers.improve(
            window_W[:, np.newaxis] * layer_part_WL, budget.part(_ROUNDS_PART / _ROUNDS), cold=True
        )
    layers.layouts = best
    return best_weight_WL


def _capped(weight_W: FloatArray, cap: float) -> FloatArray:
    """Return weights of at most ``cap`` that add up to 1, in proportion below it."""
    weight_W = weight_W / weight_W.sum()
    for _ in range(len(weight_W)):
        over_W = weight_W > cap
        if not over_W.any():
            break
        room = 1.0 - cap * np.count_nonzero(weight_W >= cap)
        below_W = weight_W < cap
        weight_W = np.where(below_W, weight_W * room / max(weight_W[below_W].sum(), 1e-300), cap)
    return weight_W


def _better_layers(
    split: str, load_WLE: FloatArray, ours: list[_Layout], theirs: list[_Layout]
) -> list[_Layout]:
    """Return of each layer the layout whose imbalance is lower in the mean; ours if equal.

    Where perfect balance is within reach both may have it, up to rounding.
    """
    mean_L, other_L = (
        np.nanmean(_ratios(load_WLE, side, split), axis=0) for side in (ours, theirs)
    )
    better_L = mean_L <= other_L + _ROUNDING
    return [a if better else b for a, b, better in zip(ours, theirs, better_L, strict=True)]


def _not_worse(
    problem: Problem, recorded_WLE: FloatArray, start: list[_Layout], found: list[_Layout]
) -> list[_Layout]:
    """Return the layouts found, or the start's where these are better on the recorded windows."""
    if problem.statistic == "mean":
        return _better_layers(problem.split, recorded_WLE, found, start)
    statistic = np.max if problem.statistic == "worst" else tail_mean
    before, after = (
        float(statistic(np.nanmean(_ratios(recorded_WLE, side, problem.split), axis=1)))
        for side in (start, found)
    )
    return found if after <= before else start
