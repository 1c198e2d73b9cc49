"""Other numbers of ranks or slots: a plan that moves few experts from the one in force.

Ranks keep their numbers: rank r of the new topology is rank r of the old one, ranks beyond are new
or leave. Some moves are forced: an expert that no rank which stays can keep has to be fetched once.
Everything else trades moves for balance, and each layer has several placements to choose from: the
forced moves alone, empty slots filled, few moves after that, and the free optimum with its ranks
numbered to keep the most. A limit on moves is spent on the layers in which it gains most.

Shape letters: L layers, E logical experts, S slots, R ranks, K slots of a rank, M moves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InfeasibleProblem, InvalidInput
from eplb.load_profile import LoadProfile
from eplb.metrics import evaluate
from eplb.placement.keep_slots import keep_slots
from eplb.placement.migration import Migration, find_migration
from eplb.placement.refill import layer_loads, refill
from eplb.placement.repair import improved, new_fractions
from eplb.placement.solve import Effort, solve
from eplb.plan import Plan
from eplb.problem import Problem, check_room
from eplb.slots import EMPTY, Placement
from eplb.topology import Topology

__all__ = ["Resize", "check_equal_ranks", "resize"]

# Parts of all slots that moves beyond filling are tried with.
MOVE_LEVELS = (0.02, 0.05, 0.1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Resize:
    """A plan for another topology, and what it takes to get there.

    Parameters
    ----------
    plan : Plan
    migration : Migration
        From the old plan, over the ranks of both sides.
    forced_moves : int
        Experts that no plan for this topology gets by without fetching.
    free_imbalance, free_moves : float, int
        ``imbalance_mean`` of the free optimum, and what it would move.
    curve : list of (int, float)
        Pareto curve: moves, and the ``imbalance_mean`` then reached.
    """

    plan: Plan
    migration: Migration
    forced_moves: int
    free_imbalance: float
    free_moves: int
    curve: list[tuple[int, float]]


def resize(
    plan: Plan,
    profile: LoadProfile,
    topology: Topology,
    *,
    max_moves: int | None = None,
    within: float = 0.01,
    solver: str = "search",
    effort: Effort | None = None,
) -> Resize:
    """Plan for another topology.

    Parameters
    ----------
    plan : Plan
        In force.
    profile : LoadProfile
        Of all layers of the plan.
    topology : Topology
        Where the plan is to go; ranks have equal slots and speed.
    max_moves : int, optional
        Experts that ranks may fetch, over all layers.
    within : float
        Without that limit, the plan of fewest moves whose ``imbalance_mean`` is at most this part
        above the lowest of the curve.
    solver, effort
        For the free optimum.

    Raises
    ------
    InvalidInput
        The limit is negative, layers have no load, or ranks are not alike.
    InfeasibleProblem
        The new ranks have fewer slots than there are experts, or more moves are forced than are
        allowed.
    """
    model, placement = plan.model, plan.placement
    if max_moves is not None and max_moves < 0:
        raise InvalidInput(f"max_moves must be at least 0, got {max_moves}")
    check_equal_ranks(plan.topology)
    check_equal_ranks(topology)
    if profile.layer_ids != placement.layer_ids:
        raise InvalidInput(
            f"{profile.source} has load in {profile.num_layers} layers and the plan has "
            f"{placement.num_layers}; give a profile with load in all layers of the plan"
        )
    check_room(topology, model.num_experts)
    old_LRK = placement.phys_to_log_LS.reshape(placement.num_layers, plan.topology.num_ranks, -1)
    held_LRK = _held(old_LRK, topology)
    problem = Problem(
        profile=profile,
        model=model,
        topology=topology,
        split=plan.split,
        statistic=plan.statistic,
    )
    free = solve(problem, solver, effort)
    options = [
        *_few_moves(plan, problem, held_LRK),
        _renumbered(free.placement.phys_to_log_LS, held_LRK, topology, plan.split),
    ]
    moves_LO = np.stack([_moves(held_LRK, slots_LRK) for slots_LRK in options], axis=1)
    value_LO = np.stack(
        [_imbalances(problem, slots_LRK.reshape(len(old_LRK), -1)) for slots_LRK in options], axis=1
    )
    forced = int(moves_LO[:, 0].sum())
    if max_moves is not None and forced > max_moves:
        raise InfeasibleProblem(
            f"{forced} experts have to be fetched at least, and {max_moves} moves are allowed; use "
            f"--max-moves {forced} or more"
        )
    choice_CL, curve = _spend(moves_LO, value_LO)
    allowed = (1 + within) * curve[-1][1]
    choice_L = choice_CL[
        max(c for c, (moves, _) in enumerate(curve) if moves <= max_moves)
        if max_moves is not None
        else next(c for c, (_, value) in enumerate(curve) if value <= allowed)
    ]
    new_LS = np.stack([options[o][layer].reshape(-1) for layer, o in enumerate(choice_L)])
    new_placement = replace(
        placement,
        phys_to_log_LS=new_LS,
        split_weights_LS=new_fractions(plan, new_LS, topology, profile),
    )
    return Resize(
        plan=replace(
            plan,
            topology=topology,
            placement=new_placement,
            quality=None,
            provenance={"solver": "resize"},
        ),
        migration=find_migration(old_LRK, new_LS.reshape(options[0].shape)),
        forced_moves=forced,
        free_imbalance=free.balance.imbalance_mean,
        free_moves=int(moves_LO[:, -1].sum()),
        curve=curve,
    )


def check_equal_ranks(topology: Topology) -> None:
    """Raise unless ranks have equal slots and speed.

    Raises
    ------
    InvalidInput
    """
    if topology.rank_slots or topology.rank_speed:
        raise InvalidInput(
            "resize knows ranks of equal slots and speed; leave rank_slots and rank_speed out of "
            "the topologies, or plan anew with eplb plan"
        )


def _few_moves(plan: Plan, problem: Problem, held_LRK: IntArray) -> list[IntArray]:
    """Return placements near what ranks hold: the forced moves, empty slots filled, and more."""
    profile, topology = problem.profile, problem.topology
    start_LRK = _kept(held_LRK, topology.slots_per_rank, profile.mean_load_LE())
    load_WLE = layer_loads(plan, profile, topology)
    filled = refill(load_WLE, start_LRK, topology, max_fills=topology.num_slots * len(held_LRK))
    placements = [filled.restored_LRK, filled.filled_LRK]
    if plan.split == "even":
        slots = topology.num_usable_slots * len(held_LRK)
        placements += [
            improved(filled.filled_LRK, plan, profile, topology, max_moves=int(level * slots))
            for level in MOVE_LEVELS
        ]
    return placements


def _held(old_LRK: IntArray, topology: Topology) -> IntArray:
    """Return what the ranks of the new topology hold, shape [L, R, K]; K is that of more slots.

    An expert that is on a rank twice counts once, as it will be there once at most.
    """
    num_ranks = min(old_LRK.shape[1], topology.num_ranks)
    per_rank = max(topology.slots_per_rank, old_LRK.shape[2])
    held_LRK = np.full((len(old_LRK), topology.num_ranks, per_rank), EMPTY)
    held_LRK[:, :num_ranks, : old_LRK.shape[2]] = old_LRK[:, :num_ranks]
    held_LRK[:, list(topology.ranks_out_of_service)] = EMPTY
    again_LRKK = held_LRK[..., np.newaxis] == held_LRK[:, :, np.newaxis]
    held_LRK[(again_LRKK & np.tri(per_rank, k=-1, dtype=bool)).any(axis=3)] = EMPTY
    return held_LRK


def _kept(held_LRK: IntArray, per_rank: int, load_LE: FloatArray) -> IntArray:
    """Return what the ranks can keep in so many slots each, shape [L, R, K]; the most experts.

    Where a rank has fewer slots than before, a maximum matching of experts to slots of the ranks
    that hold them decides; slots that are left go to the replicas of the most load.
    """
    kept_LRK = held_LRK.copy()
    if per_rank >= held_LRK.shape[2]:
        return kept_LRK
    for slots_RK, load_E in zip(kept_LRK, load_LE, strict=True):
        chosen = _matching(slots_RK, per_rank)
        count_E = np.bincount(slots_RK[slots_RK >= 0], minlength=len(load_E))
        for rank, row in enumerate(slots_RK.tolist()):
            wanted = sorted(
                (k for k, e in enumerate(row) if e >= 0),
                key=lambda k: (
                    (rank, row[k]) not in chosen, -load_E[row[k]] / count_E[row[k]], k,
                ),
            )[:per_rank]  # fmt: skip
            keep = set(wanted)
            slots_RK[rank] = [e if k in keep else EMPTY for k, e in enumerate(row)]
    return _narrowed(kept_LRK, per_rank)


def _narrowed(slots_LRK: IntArray, per_rank: int) -> IntArray:
    """Return the first slots of each rank; experts beyond them go into empty ones among them."""
    narrow_LRK = slots_LRK[:, :, :per_rank].copy()
    beyond = np.nonzero(slots_LRK[:, :, per_rank:] >= 0)
    for layer, rank, slot in zip(*(index.tolist() for index in beyond), strict=True):
        row_K = narrow_LRK[layer, rank]
        row_K[np.flatnonzero(row_K == EMPTY)[0]] = slots_LRK[layer, rank, per_rank + slot]
    return narrow_LRK


def _matching(slots_RK: IntArray, per_rank: int) -> set[tuple[int, int]]:
    """Return (rank, expert) pairs, at most ``per_rank`` a rank, that keep the most experts."""
    from scipy.sparse import coo_array  # noqa: PLC0415
    from scipy.sparse.csgraph import maximum_bipartite_matching  # noqa: PLC0415

    rank, slot = np.nonzero(slots_RK >= 0)
    expert = slots_RK[rank, slot]
    # Each slot of a rank is a vertex of its own.
    places = rank[:, np.newaxis] * per_rank + np.arange(per_rank)
    edges = coo_array(
        (
            np.ones(places.size, np.int8),
            (np.repeat(expert, per_rank), places.reshape(-1)),
        ),
        shape=(int(slots_RK.max()) + 1, len(slots_RK) * per_rank),
    ).tocsr()
    place_E = maximum_bipartite_matching(edges, perm_type="column")
    return {(int(p) // per_rank, e) for e, p in enumerate(place_E) if p >= 0}


def _renumbered(new_LS: IntArray, held_LRK: IntArray, topology: Topology, split: str) -> IntArray:
    """Return a placement with ranks numbered so that most of what they hold stays."""
    ranks, per_rank = topology.ranks_in_service, topology.slots_per_rank
    num_layers = len(new_LS)
    wide_LRK = np.full(held_LRK.shape, EMPTY)
    wide_LRK[:, :, :per_rank] = new_LS.reshape(num_layers, -1, per_rank)
    inner_LS, old_LS = (
        slots_LRK[:, ranks].reshape(num_layers, -1) for slots_LRK in (wide_LRK, held_LRK)
    )
    nodes = topology.num_nodes if split == "nearest" else 1
    kept_LS = keep_slots(inner_LS, old_LS, len(ranks), nodes)
    wide_LRK[:, ranks] = kept_LS.reshape(num_layers, len(ranks), -1)
    return _narrowed(wide_LRK, per_rank)


def _moves(held_LRK: IntArray, new_LRK: IntArray) -> IntArray:
    """Return the experts that ranks have to fetch in each layer."""
    migration = find_migration(held_LRK, new_LRK)
    return np.bincount(migration.layer_M, minlength=len(held_LRK))


def _imbalances(problem: Problem, slots_LS: IntArray) -> FloatArray:
    """Return ``imbalance_mean`` of each layer; under ``weighted`` that of even fractions."""
    placement = Placement(
        phys_to_log_LS=slots_LS,
        layer_ids=problem.profile.layer_ids,
        num_experts=problem.model.num_experts,
    )
    split = "even" if problem.split == "weighted" else problem.split
    found = evaluate(problem.profile, placement, problem.topology, split).by_layer
    return np.array([layer.imbalance_mean for layer in found.values()])


def _spend(
    moves_LO: IntArray, value_LO: FloatArray
) -> tuple[list[IntArray], list[tuple[int, float]]]:
    """Return the Pareto curve and the option of each layer at each of its points.

    From the forced option on, always the step that lowers a layer's value most for each move.
    """
    rows = np.arange(len(moves_LO))
    choice_L = np.zeros(len(moves_LO), np.int64)
    choices: list[IntArray] = []
    curve: list[tuple[int, float]] = []
    while True:
        now_moves_L, now_value_L = moves_LO[rows, choice_L], value_LO[rows, choice_L]
        point = int(now_moves_L.sum()), float(now_value_L.mean())
        while curve and curve[-1][0] >= point[0]:
            # A step that costs no move, or gives some back.
            choices.pop()
            curve.pop()
        choices.append(choice_L.copy())
        curve.append(point)
        gain_LO = now_value_L[:, np.newaxis] - value_LO
        price_LO = moves_LO - now_moves_L[:, np.newaxis]
        worth_LO = np.where(gain_LO > 0, gain_LO / np.maximum(price_LO, 1e-9), -np.inf)
        layer, option = divmod(int(worth_LO.argmax()), worth_LO.shape[1])
        if not worth_LO[layer, option] > 0:
            return choices, curve
        choice_L[layer] = option
