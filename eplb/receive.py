"""Dispatch receive in tokens: each token counts once a rank, however many of its experts are there.

Counts of experts cannot tell this; it takes routings (which experts each token chose). Rows, the
other figure called receive, are in :mod:`eplb.metrics`.
Shape letters: T tokens, L layers, K top-k, E logical experts, S slots, R ranks, M ranks of a node.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput
from eplb.slots import Placement
from eplb.split import check_split
from eplb.topology import Topology

__all__ = ["receive_tokens"]

_TOKENS_AT_ONCE = 4096


def receive_tokens(
    topk_TLK: NDArray[np.integer], placement: Placement, topology: Topology, split: str
) -> FloatArray:
    """Return the tokens each rank is expected to receive, shape [L, R].

    Each rank in service is the source of an equal part of the tokens, and each token-expert pair
    takes one of the replicas its rule allows, independently of the token's other experts.

    Parameters
    ----------
    topk_TLK : array of int
        Logical experts each token chose, for the layers of the placement in order.
    placement : Placement
    topology : Topology
    split : str

    Raises
    ------
    InvalidInput
        Shapes or expert ids do not fit the placement, or the split rule is unknown.
    """
    check_split(split, placement.split_weights_LS)
    if split == "batch":
        raise InvalidInput(
            "tokens received depend on which token goes where, which split batch does not fix; "
            "use even, nearest or weighted"
        )
    if topk_TLK.ndim != 3 or 0 in topk_TLK.shape or topk_TLK.dtype.kind not in "iu":
        raise InvalidInput(
            "routings must be whole numbers of the shape [tokens, layers, top_k], got "
            f"{topk_TLK.dtype} of {list(topk_TLK.shape)}"
        )
    if topk_TLK.shape[1] != placement.num_layers:
        raise InvalidInput(
            f"routings have {topk_TLK.shape[1]} layers and the plan {placement.num_layers}; give "
            "routings of the plan's model"
        )
    if topk_TLK.min() < 0 or topk_TLK.max() >= placement.num_experts:
        strange = topk_TLK.min() if topk_TLK.min() < 0 else topk_TLK.max()
        raise InvalidInput(
            f"routings name expert {int(strange)}; the plan has experts 0 to "
            f"{placement.num_experts - 1}"
        )
    # Under `even` where a token comes from makes no difference.
    sources = topology.ranks_in_service.tolist() if split == "nearest" else [0]
    received_LR = np.zeros((placement.num_layers, topology.num_ranks))
    for layer in range(placement.num_layers):
        weights_LS = placement.split_weights_LS if split == "weighted" else None
        on_rank_ER = _replicas_on_rank(
            placement.phys_to_log_LS[layer],
            placement,
            topology,
            None if weights_LS is None else weights_LS[layer],
        )
        for source in sources:
            share_ER = _share_from(source, on_rank_ER, topology, split)
            for start in range(0, len(topk_TLK), _TOKENS_AT_ONCE):
                topk_TK = topk_TLK[start : start + _TOKENS_AT_ONCE, layer]
                missed_TR = 1.0 - share_ER[topk_TK[:, 0]]
                for k in range(1, topk_TK.shape[1]):
                    missed_TR *= 1.0 - share_ER[topk_TK[:, k]]
                received_LR[layer] += (1.0 - missed_TR).sum(axis=0)
    return received_LR / len(sources)


def _replicas_on_rank(
    phys_to_log_S: IntArray,
    placement: Placement,
    topology: Topology,
    weight_S: FloatArray | None,
) -> FloatArray:
    """Return the replicas of each expert on each rank, or their fractions together, [E, R]."""
    filled = phys_to_log_S >= 0
    rank_S = np.arange(len(phys_to_log_S)) // topology.slots_per_rank
    cell = phys_to_log_S[filled] * topology.num_ranks + rank_S[filled]
    count = np.bincount(
        cell,
        weights=None if weight_S is None else weight_S[filled],
        minlength=placement.num_experts * topology.num_ranks,
    )
    return count.reshape(placement.num_experts, topology.num_ranks).astype(np.float64)


def _share_from(source: int, on_rank_ER: FloatArray, topology: Topology, split: str) -> FloatArray:
    """Return where the tokens of rank ``source`` go: parts of each expert's, shape [E, R]."""
    reachable_ER = on_rank_ER
    if split == "nearest":
        first = source // topology.ranks_per_node * topology.ranks_per_node
        node = slice(first, first + topology.ranks_per_node)
        own_ER, node_ER = np.zeros_like(on_rank_ER), np.zeros_like(on_rank_ER)
        own_ER[:, source] = on_rank_ER[:, source]
        node_ER[:, node] = on_rank_ER[:, node]
        in_node = node_ER.any(axis=1, keepdims=True)
        on_own = own_ER.any(axis=1, keepdims=True)
        reachable_ER = np.where(on_own, own_ER, np.where(in_node, node_ER, on_rank_ER))
    share: FloatArray = reachable_ER / reachable_ER.sum(axis=1, keepdims=True)
    return share
