"""What a placement makes of loads: rank loads, imbalance, balancedness, dispatch receive.

Defined once, here. A *load* is in rows: token-expert pairs a rank receives (``receive_rows``).
Tokens received, each counted once a rank, need token routings: :mod:`eplb.receive`.
Shape letters: W windows, L layers, E logical experts, S slots, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.slots import Placement
from eplb.split import check_speeds, check_split, slot_share
from eplb.topology import Topology

__all__ = [
    "CVAR_TAIL",
    "Balance",
    "balance_of",
    "evaluate",
    "imbalance",
    "rank_load",
    "relative_load",
    "step_costs",
    "tail_mean",
]

# The part of the windows that conditional value at risk (CVaR) is the mean of.
CVAR_TAIL = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Figures of one placement on one set of windows.

    Parameters
    ----------
    imbalance_mean : float
        Mean over layers and windows of max / mean rank load (at least 1).
    imbalance_p95, imbalance_worst : float
        Over windows, each scored by its mean over layers: what a step costs.
    imbalance_worst_layer : float
        The largest value of one layer in one window.
    imbalance_cvar : float
        The mean over the worst tenth of the windows (``CVAR_TAIL``), each scored by its mean over
        layers.
    balancedness : float
        Sum of mean rank loads / sum of largest rank loads, over layers and windows (at most 1).
    max_receive_rows_mean, max_receive_rows_worst : float
        The largest dispatch receive over the ranks, in rows: its mean over layers and windows, and
        the largest. This is the figure that DeepSeek's expert-parallel balancer minimises.
    by_layer, by_scenario : mapping
        The same figures within one layer (by layer id) and one scenario with load (by name); empty
        inside these.
    """

    imbalance_mean: float
    imbalance_p95: float
    imbalance_worst: float
    imbalance_cvar: float
    imbalance_worst_layer: float
    balancedness: float
    max_receive_rows_mean: float
    max_receive_rows_worst: float
    by_layer: Mapping[int, Balance] = field(default_factory=dict)
    by_scenario: Mapping[str, Balance] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Return JSON values; layer ids become strings, as JSON keys do."""
        figures: dict[str, object] = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("by_layer", "by_scenario")
        }
        if self.by_layer:
            figures["by_layer"] = {str(k): v.to_dict() for k, v in self.by_layer.items()}
        if self.by_scenario:
            figures["by_scenario"] = {k: v.to_dict() for k, v in self.by_scenario.items()}
        return figures


def rank_load(
    profile: LoadProfile, placement: Placement, topology: Topology, split: str
) -> FloatArray:
    """Return the rows each rank receives, shape [W, L, R], for the profile's layers.

    Raises
    ------
    InvalidInput
        Profile, placement and topology do not fit each other, or the split rule is unknown, or
        does not know ranks of different speeds.
    PlacementInvalid
        A layer of the profile is not in the placement.
    """
    if placement.num_slots != topology.num_slots:
        raise InvalidInput(
            f"the placement has {placement.num_slots} slots a layer and the topology "
            f"{topology.num_slots} ({topology.label}); give the topology it was made for"
        )
    if profile.num_experts != placement.num_experts:
        raise InvalidInput(
            f"{profile.source} has {profile.num_experts} experts and the plan "
            f"{placement.num_experts}; give a profile of the plan's model"
        )
    check_split(split, placement.split_weights_LS)
    check_speeds(split, topology)
    rows = placement.rows(profile.layer_ids)
    phys_to_log_LS = placement.phys_to_log_LS[rows]
    if split == "batch":
        return _batch_rank_load(profile, phys_to_log_LS, topology)
    weights_LS = placement.split_weights_LS
    share_LS = slot_share(
        phys_to_log_LS,
        placement.num_experts,
        topology,
        split,
        None if weights_LS is None else weights_LS[rows],
    )
    load_WLR = np.empty((profile.num_windows, profile.num_layers, topology.num_ranks))
    # Layer by layer: the slots' loads of all layers at once would be the largest array around.
    for layer in range(profile.num_layers):
        load_WS = profile.counts_WLE[:, layer].take(phys_to_log_LS[layer], axis=1, mode="wrap")
        load_WS *= share_LS[layer]
        load_WLR[:, layer] = load_WS.reshape(len(load_WS), topology.num_ranks, -1).sum(axis=2)
    return load_WLR


def _batch_rank_load(
    profile: LoadProfile, phys_to_log_LS: IntArray, topology: Topology
) -> FloatArray:
    from eplb.batch_split import batch_rank_load  # noqa: PLC0415  (numba)

    return np.stack(
        [
            batch_rank_load(profile.counts_WLE[:, layer], row_S, topology.num_ranks)
            for layer, row_S in enumerate(phys_to_log_LS)
        ],
        axis=1,
    )


def step_costs(ratio_WL: FloatArray) -> FloatArray:
    """Return what each window costs: its mean imbalance over the layers with load, shape [W]."""
    costs: FloatArray = np.nanmean(ratio_WL, axis=1)
    return costs


def tail_mean(cost_W: FloatArray, tail: float = CVAR_TAIL) -> float:
    """Return the mean of the worst ``tail`` of the windows; a window can count in part.

    This is conditional value at risk (Rockafellar and Uryasev, J. Risk 2, 2000, eq. 4).
    """
    falling_W = np.sort(cost_W)[::-1]
    size = max(tail * len(falling_W), 1.0)
    weight_W = np.clip(size - np.arange(len(falling_W)), 0.0, 1.0)
    return float(falling_W @ weight_W / size)


def imbalance(rank_load_WLR: FloatArray, topology: Topology) -> FloatArray:
    """Return max / mean over the last axis; NaN where there is no load, which scores nothing.

    The load of a rank counts as load / speed, and the mean is what all would have if each rank had
    as much load as its speed: again the least that the largest can be. Ranks out of service are
    part of neither.
    """
    return _ratio(*_largest_and_mean(rank_load_WLR, topology))


def relative_load(rank_load_WLR: FloatArray, topology: Topology) -> FloatArray:
    """Return load / speed of each rank in service over the mean, whose maximum is the imbalance."""
    cost_WLR, mean_WL = _costs(rank_load_WLR, topology)
    return _ratio(cost_WLR, np.broadcast_to(mean_WL[..., np.newaxis], cost_WLR.shape))


def _largest_and_mean(
    rank_load_WLR: FloatArray, topology: Topology
) -> tuple[FloatArray, FloatArray]:
    cost_WLR, mean_WL = _costs(rank_load_WLR, topology)
    largest_WL: FloatArray = cost_WLR.max(axis=-1)
    return largest_WL, mean_WL


def _costs(rank_load_WLR: FloatArray, topology: Topology) -> tuple[FloatArray, FloatArray]:
    """Return load / speed of the ranks in service, and its mean weighted by their speed."""
    if topology.is_uniform:
        return rank_load_WLR, rank_load_WLR.mean(axis=-1)
    ranks, speed_R = topology.ranks_in_service, topology.speed_R
    mean_WL: FloatArray = rank_load_WLR.sum(axis=-1) / speed_R.sum()
    return rank_load_WLR[..., ranks] / speed_R[ranks], mean_WL


def _ratio(largest: FloatArray, mean: FloatArray) -> FloatArray:
    ratio = np.full(mean.shape, np.nan)
    np.divide(largest, mean, out=ratio, where=mean > 0)
    return ratio


def evaluate(profile: LoadProfile, placement: Placement, topology: Topology, split: str) -> Balance:
    """Score a placement on every window of a profile, without fitting anything.

    Raises
    ------
    InvalidInput, PlacementInvalid
        As :func:`rank_load`.
    """
    load_WLR = rank_load(profile, placement, topology, split)
    return balance_of(load_WLR, topology, profile.layer_ids, profile.scenario_W)


def balance_of(
    load_WLR: FloatArray, topology: Topology, layer_ids: Sequence[int], scenario_W: Sequence[str]
) -> Balance:
    """Return the figures of rank loads, for who needs the loads too.

    Parameters
    ----------
    load_WLR : array of float64
        From :func:`rank_load`; at least one window with load.
    topology : Topology
        Whose ranks they are.
    layer_ids, scenario_W : sequence
        Of the layers and of the windows.
    """
    max_WL, mean_WL = _largest_and_mean(load_WLR, topology)
    rows_WL = load_WLR.max(axis=2)
    figures = _ratio(max_WL, mean_WL), max_WL, mean_WL, rows_WL
    name_W = np.array(scenario_W)
    return _balance(
        *figures,
        by_layer={
            layer_id: _balance(*(a[:, [layer]] for a in figures))
            for layer, layer_id in enumerate(layer_ids)
            if max_WL[:, layer].any()
        },
        by_scenario={
            name: _balance(*(a[name_W == name] for a in figures))
            for name in dict.fromkeys(scenario_W)
            if max_WL[name_W == name].any()
        },
    )


def _balance(
    ratio_WL: FloatArray,
    max_WL: FloatArray,
    mean_WL: FloatArray,
    rows_WL: FloatArray,
    *,
    by_layer: Mapping[int, Balance] | None = None,
    by_scenario: Mapping[str, Balance] | None = None,
) -> Balance:
    # Windows in which these layers had no load are not steps and are not scored.
    scored_W = ~np.isnan(ratio_WL).all(axis=1)
    ratio_WL = ratio_WL[scored_W]
    step_W = step_costs(ratio_WL)
    return Balance(
        imbalance_mean=float(np.nanmean(ratio_WL)),
        imbalance_p95=float(np.percentile(step_W, 95)),
        imbalance_worst=float(step_W.max()),
        imbalance_cvar=tail_mean(step_W),
        imbalance_worst_layer=float(np.nanmax(ratio_WL)),
        balancedness=float(mean_WL.sum() / max_WL.sum()),
        max_receive_rows_mean=float(rows_WL[rows_WL > 0].mean()),
        max_receive_rows_worst=float(rows_WL.max()),
        by_layer=by_layer or {},
        by_scenario=by_scenario or {},
    )
