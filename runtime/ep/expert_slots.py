"""Slot-major weights: every tensor of an expert in one row of bytes, one row a slot.

A swap moves, checks and replaces rows without knowing what is in them; the layer computes with
strided views of the tensors. What one expert consists of is an :class:`ExpertLayout`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from eplb.errors import InvalidInput

__all__ = ["ALIGNMENT_BYTES", "ExpertLayout", "ExpertSlots"]

# Grouped GEMMs want operands at 16 bytes and copies do best at full cache lines.
ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """Shape and type of one tensor of an expert, and where it lies in the expert's row."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """All tensors of one expert, in order: weights, scales, biases.

    Parameters
    ----------
    tensors : mapping of str to (shape, dtype)
        Such as ``{"w13": ((4096, 7168), torch.bfloat16), "w2": ((7168, 2048), torch.bfloat16)}``.

    Attributes
    ----------
    fields : dict of str to ExpertTensor
        The same with the offset of each, a multiple of :data:`ALIGNMENT_BYTES`.
    row_bytes : int
        Bytes of an expert, padding included.

    Raises
    ------
    InvalidInput
        No tensor, or one without a size.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    fields: dict[str, ExpertTensor] = field(init=False)
    row_bytes: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        tensors = {name: (tuple(shape), dtype) for name, (shape, dtype) in self.tensors.items()}
        object.__setattr__(self, "tensors", tensors)
        if not tensors:
            raise InvalidInput("an expert needs at least one tensor; name its weights")
        for name, (shape, _) in tensors.items():
            if not shape or any(type(size) is not int or size < 1 for size in shape):
                raise InvalidInput(
                    f"tensor {name!r} of an expert must have sizes from 1 on, got {list(shape)}"
                )
        ends = list(
            accumulate(
                -(-math.prod(shape) * dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                for shape, dtype in tensors.values()
            )
        )
        fields = {
            name: ExpertTensor(shape, dtype, offset)
            for (name, (shape, dtype)), offset in zip(tensors.items(), [0, *ends[:-1]], strict=True)
        }
        object.__setattr__(self, "fields", fields)
        object.__setattr__(self, "row_bytes", ends[-1])

    def digest(self) -> str:
        """Return ``sha256:`` and a digest that is equal where rows mean the same."""
        content = [
            [name, list(shape), str(dtype).removeprefix("torch.")]
            for name, (shape, dtype) in self.tensors.items()
        ]
        text = json.dumps([ALIGNMENT_BYTES, content], separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode("ascii")).hexdigest()


class ExpertSlots:
    """The slots of one layer that a process holds.

    Parameters
    ----------
    layout : ExpertLayout
    num_slots : int
        Slots of all ranks of this process.
    device : device

    Attributes
    ----------
    rows : Tensor of uint8, shape [num_slots, row_bytes]
        One contiguous row a slot. It is never replaced, so addresses are fixed.
    """

    def __init__(
        self, layout: ExpertLayout, num_slots: int, device: torch.device | str = "cpu"
    ) -> None:
        if num_slots < 1:
            raise InvalidInput(f"num_slots ({num_slots}) must be at least 1")
        self.layout = layout
        self.num_slots = num_slots
        self.rows = torch.zeros(num_slots, layout.row_bytes, dtype=torch.uint8, device=device)
        self._views = {name: self._view(name) for name in layout.fields}

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor of all slots, shape [num_slots, ...], as a view of the rows.

        Raises
        ------
        InvalidInput
            The layout has no tensor of that name.
        """
        if name not in self._views:
            raise InvalidInput(
                f"experts have no tensor {name!r}; they have {', '.join(self._views)}"
            )
        return self._views[name]

    def part(self, first: int, number: int) -> ExpertSlots:
        """Return some of the slots, over the same memory."""
        some = ExpertSlots.__new__(ExpertSlots)
        some.layout, some.num_slots = self.layout, number
        some.rows = self.rows[first : first + number]
        some._views = {name: some._view(name) for name in self.layout.fields}
        return some

    def load(self, slot: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put one expert into a slot: all of its tensors, or nothing happens.

        Raises
        ------
        InvalidInput
            A tensor is missing, unknown, or of another shape or type.
        """
        self._check_slot(slot)
        fields = self.layout.fields
        if set(tensors) != set(fields):
            missing, unknown = sorted(fields.keys() - tensors), sorted(tensors - fields.keys())
            raise InvalidInput(
                f"an expert consists of {', '.join(fields)}; missing {missing}, unknown {unknown}"
            )
        for name, value in tensors.items():
            if tuple(value.shape) != fields[name].shape or value.dtype != fields[name].dtype:
                raise InvalidInput(
                    f"tensor {name!r} must be {fields[name].dtype} of {list(fields[name].shape)}, "
                    f"got {value.dtype} of {list(value.shape)}"
                )
        for name, value in tensors.items():
            self._views[name][slot].copy_(value)

    def checksum(self, slot: int) -> int:
        """Return an integer sum over the row; equal bytes have equal sums. Waits for the device."""
        self._check_slot(slot)
        return int(self.checksums(self.rows[slot : slot + 1])[0])

    @staticmethod
    def checksums(rows: torch.Tensor) -> torch.Tensor:
        """Return the sum of each row, int64, on the device of ``rows``; waits for nothing.

        The sum of the row's 64-bit words and, shifted, that of its words at odd places, both modulo
        2**64: exchanged neighbours are seen, and the order of addition does not matter.
        """
        words = rows.view(torch.int64)
        return words.sum(1) + (words[:, 1::2].sum(1) << 8)

    def _view(self, name: str) -> torch.Tensor:
        tensor = self.layout.fields[name]
        flat = self.rows[:, tensor.offset_bytes : tensor.offset_bytes + tensor.num_bytes]
        return flat.view(tensor.dtype).view(self.num_slots, *tensor.shape)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise InvalidInput(
                f"slot {slot} is not on this process, which has 0 to {self.num_slots - 1}"
            )
