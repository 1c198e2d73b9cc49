"""Which replica each token takes: the split rules as the runtime carries them out.

:mod:`eplb.split` gives the fractions that a rule means in expectation; here tokens are counted out
by them. The n tokens that one rank sends to one expert in a step lie evenly on the unit interval,
shifted by an offset; the replicas own parts of the interval, as long as their fractions. So each
replica receives its fraction of the n to within one token, whatever n is, and because offsets run
over ranks and steps as multiples of irrational numbers do, what is rounded up here is rounded down
elsewhere. Integers of 30 bits keep it equal on every machine: the layer's form on the device
(:mod:`eplb.runtime.ep.tables`) gives the same slots.
Shape letters: T tokens, K top-k, P = T x K, E logical experts, S slots, X slots with a share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray, frozen_array
from eplb.errors import InvalidInput
from eplb.split import check_split
from eplb.topology import Topology

__all__ = [
    "STEP_STRIDE",
    "UNIT_BITS",
    "ReplicaBounds",
    "choose_slots",
    "replica_bounds",
    "source_share",
    "step_offset",
    "token_offset",
]

# The unit interval in whole numbers: a step of one rank may have 2**33 tokens before they overflow.
UNIT_BITS = 30
UNIT = 1 << UNIT_BITS
# Multiples of these modulo 1 are spread evenly: the golden ratio - 1, the square root of 2 - 1,
# and the inverse of the plastic number.
_RANK_STRIDE = round(0.6180339887498949 * UNIT)
STEP_STRIDE = round(0.4142135623730950 * UNIT)
_EXPERT_STRIDE = round(0.7548776662466927 * UNIT)


@dataclass(frozen=True, slots=True, eq=False)
class ReplicaBounds:
    """Where on the unit interval of its expert each slot begins, for the tokens of one rank.

    Parameters
    ----------
    bound_X : array of int64
        ``expert * 2**UNIT_BITS`` + where the slot's part begins; increasing.
    slot_X : array of int64
        The slot.
    """

    bound_X: IntArray
    slot_X: IntArray


def source_share(
    phys_to_log_S: IntArray,
    num_experts: int,
    topology: Topology,
    split: str,
    rank: int,
    split_weights_S: FloatArray | None = None,
) -> FloatArray:
    """Return which fraction of an expert's tokens on ``rank`` each slot receives, shape [S].

    The mean over all ranks is :func:`eplb.split.slot_share`.

    Raises
    ------
    InvalidInput
        The rule is unknown, is ``weighted`` without weights, or is ``batch``, whose fractions
        change with every step.
    """
    check_split(split, split_weights_S)
    if split == "batch":
        raise InvalidInput(
            "under split batch every step has fractions of its own; use even, nearest or weighted "
            "where one set of fractions is needed"
        )
    if split == "weighted":
        assert split_weights_S is not None
        return split_weights_S
    filled_S = phys_to_log_S >= 0
    allowed_S = filled_S
    if split == "nearest":
        rank_S = np.arange(len(phys_to_log_S)) // topology.slots_per_rank
        own_S = filled_S & (rank_S == rank)
        per_node = topology.ranks_per_node
        node_S = filled_S & (rank_S // per_node == rank // per_node)
        near_S = np.where(_held(own_S, phys_to_log_S, num_experts), own_S, node_S)
        allowed_S = np.where(_held(near_S, phys_to_log_S, num_experts), near_S, filled_S)
    count_E = np.bincount(phys_to_log_S[allowed_S], minlength=num_experts)
    share_S: FloatArray = np.where(allowed_S, 1.0 / np.maximum(count_E[phys_to_log_S], 1), 0.0)
    return share_S


def _held(
    part_S: NDArray[np.bool_], phys_to_log_S: IntArray, num_experts: int
) -> NDArray[np.bool_]:
    """Return for each slot whether its expert is in one of the slots of ``part_S``."""
    held_E = np.zeros(num_experts, dtype=bool)
    held_E[phys_to_log_S[part_S]] = True
    held_S: NDArray[np.bool_] = held_E[phys_to_log_S]
    return held_S


def replica_bounds(phys_to_log_S: IntArray, share_S: FloatArray) -> ReplicaBounds:
    """Return where each slot with a share begins on its expert's interval."""
    used = np.flatnonzero((phys_to_log_S >= 0) & (share_S > 0))
    slot_X = used[np.argsort(phys_to_log_S[used], kind="stable")]
    expert_X = phys_to_log_S[slot_X]
    end_X = np.cumsum(share_S[slot_X])
    first_X = np.searchsorted(expert_X, expert_X)
    before_X = np.concatenate([[0.0], end_X])[first_X]
    begin_X = np.concatenate([[0.0], end_X[:-1]]) - before_X
    begin_X = np.clip(np.rint(begin_X * UNIT).astype(np.int64), 0, UNIT - 1)
    return ReplicaBounds(
        frozen_array((expert_X << UNIT_BITS) + begin_X, np.int64), frozen_array(slot_X, np.int64)
    )


def token_offset(rank: int, layer_id: int, num_experts: int) -> IntArray:
    """Return by how much the tokens of each expert are shifted in step 0, shape [E]."""
    expert_E = layer_id * num_experts + np.arange(num_experts, dtype=np.int64)
    offset_E: IntArray = (expert_E * _EXPERT_STRIDE + rank * _RANK_STRIDE) % UNIT
    return offset_E


def step_offset(step: int) -> int:
    """Return what a step adds to the offsets."""
    return step * STEP_STRIDE % UNIT


def choose_slots(
    topk_TK: NDArray[np.integer],
    bounds: ReplicaBounds,
    offset_E: IntArray,
    step: int = 0,
) -> IntArray:
    """Return the slot that each token of one rank goes to for each of its experts, shape [T, K].

    Parameters
    ----------
    topk_TK : array of int
        Logical experts; below 0 for "none", which gives slot -1.
    bounds : ReplicaBounds
        Of the rank the tokens are on.
    offset_E : array of int
        Of :func:`token_offset`.
    step : int
        Number of the step.
    """
    num_experts = len(offset_E)
    expert_P = np.where(topk_TK < 0, num_experts, topk_TK).reshape(-1).astype(np.int64)
    order_P = np.argsort(expert_P, kind="stable")
    first_E = np.searchsorted(expert_P[order_P], np.arange(num_experts + 2))
    count_E = np.maximum(np.diff(first_E), 1)
    nth_P = np.empty_like(expert_P)
    nth_P[order_P] = np.arange(len(expert_P)) - first_E[expert_P[order_P]]
    shift_E = np.append((offset_E + step_offset(step)) % UNIT, 0)
    place_P = ((nth_P << UNIT_BITS) + shift_E[expert_P]) // count_E[expert_P]
    found_P = np.searchsorted(bounds.bound_X, (expert_P << UNIT_BITS) + place_P, side="right") - 1
    slot_P = np.where(expert_P < num_experts, bounds.slot_X[found_P], -1)
    return slot_P.reshape(topk_TK.shape)
