"""Where rows go between nodes, as far as expert counts tell.

Counts do not say on which rank a token was when its experts were chosen, so each rank in service is
taken to be the source of an equal part of every expert's rows. Tokens, of which several rows may
cross to a node together, need routings: :func:`receive_node_tokens`.
Shape letters: T tokens, L layers, K top-k, E logical experts, S slots, N nodes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray
from eplb.errors import InvalidInput
from eplb.receive import receive_tokens
from eplb.slots import Placement
from eplb.split import check_split
from eplb.topology import Topology

__all__ = ["node_traffic", "receive_node_tokens"]


def node_traffic(
    load_LE: FloatArray, placement: Placement, topology: Topology, split: str
) -> FloatArray:
    """Return which part of a layer's rows goes from node to node, shape [N, N]; adds up to 1.

    Parameters
    ----------
    load_LE : array of float64
        Load of each expert, for the layers of the placement in order; layers without any do not
        count, the others count alike.
    placement : Placement
    topology : Topology
    split : str
        ``even``, ``weighted``, or ``nearest``, under which rows stay in the node that they come
        from if it has a replica.

    Raises
    ------
    InvalidInput
        The split rule is unknown, or is ``batch``, which fixes rank loads and not who sends what.
    """
    check_split(split, placement.split_weights_LS)
    if split == "batch":
        raise InvalidInput(
            "split batch fixes what ranks receive and not from whom; use even, nearest or weighted"
        )
    num_nodes = topology.num_nodes
    serving = topology.ranks_in_service
    source_N = np.bincount(serving // topology.ranks_per_node, minlength=num_nodes) / len(serving)
    traffic_NN = np.zeros((num_nodes, num_nodes))
    node_S = np.arange(topology.num_slots) // (topology.slots_per_rank * topology.ranks_per_node)
    loaded = np.flatnonzero(load_LE.any(axis=1))
    for layer in loaded:
        part_E = load_LE[layer] / load_LE[layer].sum()
        expert_S = placement.phys_to_log_LS[layer]
        filled_S = expert_S >= 0
        weight_S = np.ones(len(expert_S))
        if split == "weighted":
            assert placement.split_weights_LS is not None
            weight_S = placement.split_weights_LS[layer]
        on_node_EN = np.bincount(
            expert_S[filled_S] * num_nodes + node_S[filled_S],
            weights=weight_S[filled_S],
            minlength=len(part_E) * num_nodes,
        ).reshape(len(part_E), num_nodes)
        share_EN = on_node_EN / on_node_EN.sum(axis=1, keepdims=True)
        stays_EN = (on_node_EN > 0) & (split == "nearest")
        traffic_NN += (part_E[:, np.newaxis] * ~stays_EN).T @ share_EN
        traffic_NN += np.diag(part_E @ stays_EN)
    traffic: FloatArray = source_N[:, np.newaxis] * traffic_NN / max(len(loaded), 1)
    return traffic


def receive_node_tokens(
    topk_TLK: NDArray[np.integer], placement: Placement, topology: Topology, split: str
) -> FloatArray:
    """Return the tokens each node is expected to receive, each counted once a node, shape [L, N].

    A node is to the network between nodes what a rank is to :func:`eplb.receive.receive_tokens`,
    and under each split rule a row goes to some rank of a node as often as it goes to the node.
    Under ``nearest`` each node is taken to be the source of an equal part of the tokens, also where
    some of its ranks are out of service.

    Raises
    ------
    InvalidInput
        As there.
    """
    nodes = Topology(
        num_nodes=1,
        ranks_per_node=topology.num_nodes,
        slots_per_rank=topology.ranks_per_node * topology.slots_per_rank,
    )
    return receive_tokens(topk_TLK, placement, nodes, split)
