"""Integer programmes for rules that have a linear programme inside: weighted and batch.

``batch``: by the duality of flows and cuts, the best split of a window has a largest rank load of
the largest, over sets A of ranks, of the load that cannot leave A, over |A|. So one variable for
each expert and set says "all its replicas are in A", shared by all windows, and the splits
themselves drop out; all sets are written down, for few ranks and many windows
(:func:`place_by_cuts`, CP-SAT). Otherwise, and for ``weighted``, the fractions are variables beside
the placement (:func:`place_by_fractions`, HiGHS).
Shape letters: W windows, E logical experts, S slots, R ranks.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.placement.exact_model import LayerModel, slots_of
from eplb.topology import Topology

__all__ = ["place_by_cuts", "place_by_fractions"]

# HiGHS ends when its bound is this near to its objective.
_MIP_GAP = 1e-7


def place_by_cuts(
    load_WE: FloatArray,
    weight_W: FloatArray,
    topology: Topology,
    start_S: IntArray,
    start: float,
    low: float,
    time_limit_s: float | None,
    *,
    seed: int,
    workers: int,
) -> tuple[list[IntArray], float]:
    """Return the placements found (none, or one) and a bound, for ``batch``.

    Takes what :func:`eplb.placement.exact_shares.place_by_shares` takes.
    """
    num_experts, num_ranks = load_WE.shape[1], topology.num_ranks
    # Under batch split the nodes do not count.
    flat = Topology(num_nodes=1, ranks_per_node=num_ranks, slots_per_rank=topology.slots_per_rank)
    layer = LayerModel(load_WE, weight_W, flat, start_S, start, low)
    model = layer.model
    on_ER = [
        [layer.new_bool(bool(held)) for held in layer.start_ER[expert]]
        for expert in range(num_experts)
    ]
    for expert, on_R in enumerate(on_ER):
        model.add_at_least_one(on_R)
        layer.hold(expert, [[on] for on in on_R])
    for size in range(1, num_ranks):
        for cut in combinations(range(num_ranks), size):
            outside = [rank for rank in range(num_ranks) if rank not in cut]
            inside_E = []
            for expert in range(num_experts):
                inside = layer.new_bool(not layer.start_ER[expert, outside].any())
                # Or one of the replicas is outside.
                model.add_bool_or([inside, *(on_ER[expert][rank] for rank in outside)])
                inside_E.append(inside)
            for largest, load_E in zip(layer.largest_W, load_WE, strict=True):
                terms = [
                    layer.whole(load) * inside
                    for load, inside in zip(load_E, inside_E, strict=True)
                    if load > 0
                ]
                # The largest load is whole: what is left of the division is let off, or the bound
                # would be rounded up.
                model.add(sum(terms) <= size * largest + (size - 1))
    return layer.solve(time_limit_s, seed=seed, workers=workers)


def place_by_fractions(
    load_WE: FloatArray,
    weight_W: FloatArray,
    topology: Topology,
    low: float,
    time_limit_s: float | None,
    *,
    per_window: bool,
) -> tuple[list[IntArray], float]:
    """Return the placements found (none, or one) and a bound, by a mixed integer programme.

    Parameters
    ----------
    load_WE, weight_W : arrays of float64
    topology : Topology
    low : float
        A bound known before: with one window the search ends where it is met.
    time_limit_s : float, optional
    per_window : bool
        Fractions of each window's own (``batch``), or the same in all (``weighted``).
    """
    # scipy.optimize takes a second to import, and only exact solves need it.
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415
    from scipy.sparse import coo_array  # noqa: PLC0415

    num_windows, num_experts = load_WE.shape
    num_ranks = topology.num_ranks
    num_cells = num_experts * num_ranks
    num_splits = num_windows if per_window else 1
    # Variables: which ranks hold an expert [E, R], fractions [splits, E, R], largest loads [W].
    on_ER = np.arange(num_cells).reshape(num_experts, num_ranks)
    part_XER = num_cells + np.arange(num_splits * num_cells).reshape(
        num_splits, num_experts, num_ranks
    )
    largest_W = num_cells * (1 + num_splits) + np.arange(num_windows)
    num_variables = num_cells * (1 + num_splits) + num_windows

    def rows(*parts: tuple[IntArray, FloatArray]) -> coo_array:
        """Return a matrix: each part has variables and coefficients of the shape [rows, terms]."""
        index = np.concatenate([part[0] for part in parts], axis=1)
        value = np.concatenate([np.broadcast_to(part[1], part[0].shape) for part in parts], axis=1)
        row = np.broadcast_to(np.arange(len(index))[:, np.newaxis], index.shape)
        return coo_array(
            (value.reshape(-1), (row.reshape(-1), index.reshape(-1))),
            shape=(len(index), num_variables),
        )

    one, minus = np.array([[1.0]]), np.array([[-1.0]])
    part_of = [part_XER[w if per_window else 0] for w in range(num_windows)]
    load_index = np.concatenate([part.T for part in part_of])
    load_value = np.repeat(load_WE, num_ranks, axis=0)
    constraints = [
        # Room of a rank.
        LinearConstraint(rows((on_ER.T, one)), -np.inf, topology.slots_per_rank),
        # All of an expert, and only where it is held.
        LinearConstraint(rows((part_XER.reshape(-1, num_ranks), one)), 1, 1),
        LinearConstraint(
            rows(
                (part_XER.reshape(-1, 1), one),
                (np.tile(on_ER.reshape(-1, 1), (num_splits, 1)), minus),
            ),
            -np.inf,
            0,
        ),
        LinearConstraint(
            rows(
                (load_index, load_value),
                (np.repeat(largest_W, num_ranks)[:, np.newaxis], minus),
            ),
            -np.inf,
            0,
        ),
    ]
    # Ranks are alike: in falling order of whether they hold the hottest expert.
    hot_R = on_ER[np.argmax(weight_W @ load_WE)]
    if num_ranks > 1:
        constraints.append(
            LinearConstraint(rows((hot_R[1:, np.newaxis], one), (hot_R[:-1, np.newaxis], minus)),
                             -np.inf, 0)
        )  # fmt: skip
    lower = np.zeros(num_variables)
    lower[largest_W] = load_WE.sum(axis=1) / num_ranks
    if num_windows == 1:
        lower[largest_W] = np.maximum(lower[largest_W], low / weight_W)
    upper = np.ones(num_variables)
    upper[largest_W] = np.inf
    cost = np.zeros(num_variables)
    cost[largest_W] = weight_W
    integer = np.zeros(num_variables)
    integer[on_ER] = 1
    options: dict[str, float] = {"mip_rel_gap": _MIP_GAP}
    if time_limit_s is not None:
        options["time_limit"] = time_limit_s
    result = milp(
        cost,
        integrality=integer,
        bounds=Bounds(lower, upper),
        constraints=constraints,
        options=options,
    )
    bound = result.mip_dual_bound
    bound = 0.0 if bound is None or not np.isfinite(bound) else float(bound)
    if result.x is None:
        return [], bound
    return [slots_of(result.x[on_ER] > 0.5, topology.slots_per_rank)], bound
