"""A placement: which logical expert each slot of each layer holds.

One array says it all; replica counts and the inverse map are derived from it.
Shape letters: L layers, E logical experts, S slots, R ranks, X replicas of the most replicated
expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray, frozen_array
from eplb.errors import PlacementInvalid
from eplb.model import is_layer_ids

__all__ = ["EMPTY", "Placement", "initial_placement", "log_to_phys", "replica_count"]

EMPTY = -1
# Files and sums round fractions.
WEIGHT_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """Logical expert of each slot.

    Parameters
    ----------
    phys_to_log_LS : array of int, shape [L, S]
        Logical expert in each slot, -1 for an empty slot. Every expert has at least one slot.
    layer_ids : sequence of int, length L
        Absolute decoder layer id of each row.
    num_experts : int
        E, logical experts of a layer.
    split_weights_LS : array of float, shape [L, S], optional
        The fraction of its expert's tokens that each slot receives, for the split rule
        ``weighted``. Fractions of an expert add up to 1; an empty slot has 0.

    Raises
    ------
    PlacementInvalid
        A slot holds an expert that does not exist, an expert has no slot, or shapes disagree.
    """

    phys_to_log_LS: IntArray
    layer_ids: tuple[int, ...]
    num_experts: int
    split_weights_LS: FloatArray | None = None

    def __post_init__(self) -> None:
        slots = np.asarray(self.phys_to_log_LS)
        if slots.ndim != 2 or slots.dtype.kind not in "iu" or 0 in slots.shape:
            raise PlacementInvalid(
                "a placement must be whole numbers of the shape [layers, slots], got "
                f"{slots.dtype} of {list(slots.shape)}"
            )
        if len(self.layer_ids) != slots.shape[0]:
            raise PlacementInvalid(
                f"{len(self.layer_ids)} layer ids for {slots.shape[0]} layers of slots"
            )
        ids = tuple(self.layer_ids)
        if not is_layer_ids(ids):
            raise PlacementInvalid(
                "layer ids must be whole numbers from 0 on, increasing, at least one; got "
                f"{list(ids[:6])}"
            )
        # Before it is cast: a number too large for int64 would come out negative.
        if slots.max() > np.iinfo(np.int64).max:
            raise PlacementInvalid(f"unknown expert {int(slots.max())}")
        object.__setattr__(self, "phys_to_log_LS", frozen_array(slots, np.int64))
        object.__setattr__(self, "layer_ids", ids)
        unknown = (self.phys_to_log_LS < EMPTY) | (self.phys_to_log_LS >= self.num_experts)
        if unknown.any():
            layer, slot = (int(i) for i in np.argwhere(unknown)[0])
            raise PlacementInvalid(
                f"layer {self.layer_ids[layer]}, slot {slot}: unknown expert "
                f"{int(self.phys_to_log_LS[layer, slot])}; experts are 0 to "
                f"{self.num_experts - 1}, or -1 for an empty slot"
            )
        if self.num_experts > slots.shape[1]:
            # Said before counting: a file can claim more experts than there is memory for.
            held = set(slots[0].tolist())
            raise _missing(ids[0], next(e for e in count() if e not in held))
        missing = replica_count(self.phys_to_log_LS, self.num_experts) == 0
        if missing.any():
            layer, expert = (int(i) for i in np.argwhere(missing)[0])
            raise _missing(self.layer_ids[layer], expert)
        if self.split_weights_LS is not None:
            weights_LS = frozen_array(self.split_weights_LS, np.float64)
            _check_weights(weights_LS, self)
            object.__setattr__(self, "split_weights_LS", weights_LS)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return (
            self.num_experts == other.num_experts
            and self.layer_ids == other.layer_ids
            and np.array_equal(self.phys_to_log_LS, other.phys_to_log_LS)
            and (self.split_weights_LS is None) == (other.split_weights_LS is None)
            and (
                self.split_weights_LS is None
                or other.split_weights_LS is None
                or np.array_equal(self.split_weights_LS, other.split_weights_LS)
            )
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.phys_to_log_LS.shape[0])

    @property
    def num_slots(self) -> int:
        """S, over all ranks."""
        return int(self.phys_to_log_LS.shape[1])

    def of_layers(self, layer_ids: Sequence[int]) -> IntArray:
        """Return the rows of ``phys_to_log_LS`` for these layers, in this order.

        Raises
        ------
        PlacementInvalid
            A layer is not part of this placement.
        """
        rows: IntArray = self.phys_to_log_LS[self.rows(layer_ids)]
        return rows

    def rows(self, layer_ids: Sequence[int]) -> list[int]:
        """Return where the rows of these layers are.

        Raises
        ------
        PlacementInvalid
            A layer is not part of this placement.
        """
        row_of = {layer_id: row for row, layer_id in enumerate(self.layer_ids)}
        absent = [i for i in layer_ids if i not in row_of]
        if absent:
            raise PlacementInvalid(
                f"layer {absent[0]} has load and is not in the plan, whose layers are "
                f"{self.layer_ids[0]} to {self.layer_ids[-1]}; plan it, or use the profile of "
                "this plan's model"
            )
        return [row_of[i] for i in layer_ids]


def _missing(layer_id: int, expert: int) -> PlacementInvalid:
    return PlacementInvalid(
        f"layer {layer_id}: expert {expert} is missing; every logical expert needs a slot, or its "
        "tokens would be lost"
    )


def _check_weights(weights_LS: FloatArray, placement: Placement) -> None:
    slots_LS, layer_ids = placement.phys_to_log_LS, placement.layer_ids
    if weights_LS.shape != slots_LS.shape:
        raise PlacementInvalid(
            f"split weights of the shape {list(weights_LS.shape)} for slots of "
            f"{list(slots_LS.shape)}; give one a slot"
        )
    if not (weights_LS >= 0).all() or weights_LS[slots_LS < 0].any():
        raise PlacementInvalid(
            "split weights must be numbers from 0 on, and 0 for empty slots; plan again"
        )
    total_LE = np.zeros((len(layer_ids), placement.num_experts))
    layer, slot = np.nonzero(slots_LS >= 0)
    np.add.at(total_LE, (layer, slots_LS[layer, slot]), weights_LS[layer, slot])
    wrong = np.abs(total_LE - 1) > WEIGHT_TOLERANCE
    if wrong.any():
        row, expert = (int(i) for i in np.argwhere(wrong)[0])
        raise PlacementInvalid(
            f"layer {layer_ids[row]}: the split weights of expert {expert} add up to "
            f"{total_LE[row, expert]:.6g} instead of 1"
        )


def replica_count(phys_to_log_LS: IntArray, num_experts: int) -> IntArray:
    """Return the number of slots each expert holds, shape [L, E]. Empty slots do not count."""
    num_layers = phys_to_log_LS.shape[0]
    filled = phys_to_log_LS >= 0
    cell = phys_to_log_LS + np.arange(num_layers)[:, np.newaxis] * num_experts
    count = np.bincount(cell[filled], minlength=num_layers * num_experts)
    return count.reshape(num_layers, num_experts)


def log_to_phys(phys_to_log_LS: IntArray, num_experts: int) -> IntArray:
    """Return the slots of each expert in increasing order, padded with -1, shape [L, E, X]."""
    count_LE = replica_count(phys_to_log_LS, num_experts)
    inverse = np.full((*count_LE.shape, int(count_LE.max())), EMPTY, dtype=np.int64)
    by_expert_LS: NDArray[np.intp] = np.argsort(phys_to_log_LS, axis=1, kind="stable")
    for layer, slots in enumerate(by_expert_LS):
        filled = slots[np.count_nonzero(phys_to_log_LS[layer] < 0) :]
        expert = phys_to_log_LS[layer, filled]
        first = np.cumsum(count_LE[layer]) - count_LE[layer]
        inverse[layer, expert, np.arange(len(filled)) - first[expert]] = filled
    return inverse


def initial_placement(layer_ids: Sequence[int], num_experts: int, num_slots: int) -> Placement:
    """Return what engines start with: experts in order of id, and again from 0 on.

    vLLM 0.33 and SGLang 0.5.23 both fill slot ``s`` with expert ``s % num_experts``.

    Raises
    ------
    PlacementInvalid
        Fewer slots than experts.
    """
    row = np.arange(num_slots) % num_experts
    return Placement(
        phys_to_log_LS=np.tile(row, (len(layer_ids), 1)),
        layer_ids=tuple(layer_ids),
        num_experts=num_experts,
    )
