"""What a solver is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from eplb.arrays import FloatArray
from eplb.errors import InfeasibleProblem, InvalidInput, unknown_name
from eplb.load_profile import LoadProfile
from eplb.metrics import Balance
from eplb.model import MoEModel
from eplb.slots import Placement
from eplb.split import SPLIT_RULES, check_speeds
from eplb.topology import Topology

__all__ = ["OBJECTIVES", "Problem", "Solution", "check_room"]

# Statistics over windows, of what a step costs (its mean imbalance over layers).
OBJECTIVES = ("mean", "worst", "cvar")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Loads, the machine to place experts on, and what counts.

    Parameters
    ----------
    profile : LoadProfile
    model : MoEModel
        Of the profile's layers and experts.
    topology : Topology
    split : str
        How an expert's tokens divide over its replicas: ``even``, ``nearest``, ``weighted`` or
        ``batch``.
    statistic : str
        Over windows, of what a step costs: ``mean`` minimises ``imbalance_mean``, ``worst`` and
        ``cvar`` the figures of these names in :class:`eplb.metrics.Balance`.
    distinct_ranks : bool
        No two replicas of an expert on one rank.
    groups_in_nodes : bool
        Experts of a routing group share a node (the hierarchical policy).

    Raises
    ------
    InvalidInput
        The parts do not fit each other.
    InfeasibleProblem
        No placement exists: too few slots, or more replicas than ranks.
    """

    profile: LoadProfile
    model: MoEModel
    topology: Topology
    split: str = "even"
    statistic: str = "mean"
    distinct_ranks: bool = True
    groups_in_nodes: bool = False

    def __post_init__(self) -> None:
        model, topology, profile = self.model, self.topology, self.profile
        if self.split not in SPLIT_RULES:
            raise unknown_name("split rule", self.split, SPLIT_RULES)
        if self.statistic not in OBJECTIVES:
            raise unknown_name("objective", self.statistic, OBJECTIVES)
        if profile.num_experts != model.num_experts:
            raise InvalidInput(
                f"{profile.source} has {profile.num_experts} experts and {model.name} has "
                f"{model.num_experts}; choose the model the loads were recorded from"
            )
        if profile.layer_ids != model.layer_ids:
            raise InvalidInput(
                f"{profile.source} has load in {profile.num_layers} layers ({profile.layer_ids[0]} "
                f"to {profile.layer_ids[-1]}) and {model.name} has experts in "
                f"{len(model.layer_ids)} ({model.layer_ids[0]} to {model.layer_ids[-1]}); choose "
                "the model the loads were recorded from"
            )
        check_room(topology, model.num_experts)
        check_speeds(self.split, topology)
        if self.groups_in_nodes:
            self._check_groups()
        ranks = topology.ranks_per_node if self.groups_in_nodes else topology.num_ranks
        experts = model.num_experts // (topology.num_nodes if self.groups_in_nodes else 1)
        if self.distinct_ranks and topology.slots_per_rank > experts:
            where = f"the {ranks} ranks of a node" if self.groups_in_nodes else f"{ranks} ranks"
            raise InfeasibleProblem(
                f"{topology.slots_per_rank} slots a rank ask for more replicas than ranks: "
                f"{experts} experts on {where} have at most {ranks} replicas each; use "
                f"--slots-per-rank {experts} or less"
            )

    def _check_groups(self) -> None:
        groups, nodes = self.model.num_groups, self.topology.num_nodes
        if groups % nodes:
            allowed = ", ".join(str(n) for n in range(1, groups + 1) if groups % n == 0)
            raise InvalidInput(
                f"--hierarchical places whole groups on nodes, and {groups} groups cannot be "
                f"divided over {nodes} nodes; use {allowed} nodes, or leave --hierarchical out"
            )


def check_room(topology: Topology, num_experts: int) -> None:
    """Raise unless the ranks in service have a slot for each expert.

    Raises
    ------
    InfeasibleProblem
        They have fewer.
    """
    if topology.num_usable_slots >= num_experts:
        return
    num_ranks = len(topology.ranks_in_service)
    in_service = " in service" if topology.ranks_out_of_service else ""
    slots = (
        f"x {topology.slots_per_rank} slots are {topology.num_usable_slots}"
        if topology.rank_slots is None
        else f"have {topology.num_usable_slots}"
    )
    raise InfeasibleProblem(
        f"{num_ranks} ranks{in_service} {slots} slots for {num_experts} experts, and each expert "
        f"needs one; use --slots-per-rank {-(-num_experts // num_ranks)} or more"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A placement with its worth and the proof of how good it is.

    Parameters
    ----------
    placement : Placement
        With split weights under the rule ``weighted``.
    balance : Balance
        Its figures on the problem's profile under the problem's split rule.
    objective, bound, gap : float
        What was minimised, a value no placement is below, and (objective - bound) / bound.
    bound_mean : float
        A value that no placement's ``imbalance_mean`` is below, whatever was minimised.
    bound_L : array of float64, shape [L]
        The same for each layer.
    status : str
        ``optimal`` (the gap is closed) or ``feasible``.
    stop_reason : str
        Why the solver ended: ``finished``, ``time_limit`` or ``proven``.
    solver : str
    seed : int
    time_s : float
        Wall time of the solver, without evaluation and bound.
    notes : mapping
        What the solver made of the windows it was given, as JSON values.
    """

    placement: Placement
    balance: Balance
    objective: float
    bound: float
    gap: float
    bound_mean: float
    bound_L: FloatArray
    status: str
    stop_reason: str
    solver: str
    seed: int
    time_s: float
    notes: Mapping[str, object] = field(default_factory=dict)
