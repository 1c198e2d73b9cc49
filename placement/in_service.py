"""Solve on the ranks in service alone: solvers see a smaller cluster, and the answer is put back.

Shape letters: L layers, S slots, R ranks of the topology, Q ranks in service, K slots of a rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import IntArray
from eplb.errors import InvalidInput
from eplb.problem import Problem
from eplb.slots import EMPTY, Placement
from eplb.topology import Topology

__all__ = ["put_back", "reduced_placement", "reduced_problem", "reduced_topology"]


def reduced_problem(problem: Problem) -> Problem:
    """Return the problem on the ranks in service; itself where that is all of them.

    Raises
    ------
    InvalidInput
        Nodes count, for the split rule or the policy, and have different numbers of ranks left.
    """
    if not problem.topology.ranks_out_of_service:
        return problem
    if problem.split == "nearest" or problem.groups_in_nodes:
        left_N = _ranks_left(problem.topology)
        if (left_N != left_N[0]).any():
            what = "--hierarchical" if problem.groups_in_nodes else "--split nearest"
            raise InvalidInput(
                f"{what} needs nodes with equal numbers of ranks in service; take whole nodes out "
                "of service, or leave it out"
            )
    return replace(problem, topology=reduced_topology(problem.topology))


def reduced_topology(topology: Topology) -> Topology:
    """Return the ranks in service as a topology: nodes where they are alike, else one node."""
    ranks = topology.ranks_in_service
    left_N = _ranks_left(topology)
    nodes = len(left_N) if (left_N == left_N[0]).all() else 1
    kept = [
        None if values is None else tuple(values[r] for r in ranks)
        for values in (topology.rank_slots, topology.rank_speed)
    ]
    return replace(
        topology,
        num_nodes=nodes,
        ranks_per_node=len(ranks) // nodes,
        rank_slots=kept[0],
        rank_speed=kept[1],
        ranks_out_of_service=(),
    )


def reduced_placement(placement: Placement, topology: Topology) -> Placement:
    """Return what the ranks in service hold.

    Raises
    ------
    PlacementInvalid
        An expert is on none of them.
    """

    def part(values_LS: NDArray[Any]) -> NDArray[Any]:
        by_rank = values_LS.reshape(len(values_LS), topology.num_ranks, -1)
        return by_rank[:, topology.ranks_in_service].reshape(len(values_LS), -1)

    weights_LS = placement.split_weights_LS
    return replace(
        placement,
        phys_to_log_LS=part(placement.phys_to_log_LS),
        split_weights_LS=None if weights_LS is None else part(weights_LS),
    )


def put_back(placement: Placement, topology: Topology) -> Placement:
    """Return a placement of the ranks in service on all ranks, the others empty."""

    def whole(values_LS: NDArray[Any], empty: float) -> NDArray[Any]:
        rows = len(values_LS)
        shape = rows, topology.num_ranks, topology.slots_per_rank
        by_rank: NDArray[Any] = np.full(shape, empty, values_LS.dtype)
        ranks = topology.ranks_in_service
        by_rank[:, ranks] = values_LS.reshape(rows, len(ranks), -1)
        return by_rank.reshape(rows, -1)

    weights_LS = placement.split_weights_LS
    return replace(
        placement,
        phys_to_log_LS=whole(placement.phys_to_log_LS, EMPTY),
        split_weights_LS=None if weights_LS is None else whole(weights_LS, 0.0),
    )


def _ranks_left(topology: Topology) -> IntArray:
    """Return the ranks in service of each node that has any."""
    left_N = np.bincount(topology.ranks_in_service // topology.ranks_per_node)
    return left_N[left_N > 0]
