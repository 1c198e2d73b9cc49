"""The experts of a process' slots, computed together on rows sorted by slot.

An expert is a gated feed-forward network: ``w2 @ (act(g) * u)`` with ``[g, u] = w13 @ x``. Its
tensors are ``w13`` [2 x I, H] and ``w2`` [H, I]; optional are biases ``b13``, ``b2``, and scales
``w13_scale``, ``w2_scale`` of FP8 weights, one for each block of 128 x 128 (as DeepSeek-V3 ships).
Shape letters: P rows (token-expert pairs), H hidden size, I intermediate size, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from eplb.errors import InvalidInput
from eplb.runtime.ep.expert_slots import ExpertLayout, ExpertSlots
from eplb.runtime.ep.payload import BLOCK

__all__ = ["Activation", "compute_experts", "gated_layout", "gated_silu", "whole_weight"]

Activation = Callable[[torch.Tensor], torch.Tensor]


def gated_layout(
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    biases: bool = False,
) -> ExpertLayout:
    """Return the layout of a gated expert; FP8 weights come with their scales."""
    shapes = {"w13": (2 * intermediate_size, hidden_size), "w2": (hidden_size, intermediate_size)}
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        name: (shape, dtype) for name, shape in shapes.items()
    }
    if dtype.itemsize == 1:
        for name, (rows, columns) in shapes.items():
            tensors[f"{name}_scale"] = (
                (-(-rows // BLOCK), -(-columns // BLOCK)), torch.float32,
            )  # fmt: skip
    if biases:
        wide = torch.bfloat16 if dtype.itemsize == 1 else dtype
        tensors["b13"] = ((2 * intermediate_size,), wide)
        tensors["b2"] = ((hidden_size,), wide)
    return ExpertLayout(tensors)


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(g) * u`` of rows ``[g, u]``."""
    if gate_up.is_cuda:
        from eplb.runtime.ep import kernels  # noqa: PLC0415  (Triton is there with GPUs only)

        return kernels.gated_silu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _run_expert(
    x: torch.Tensor, tensors: dict[str, torch.Tensor], activation: Activation
) -> torch.Tensor:
    """Return what one expert makes of rows, in their type."""
    hidden = functional.linear(x, whole_weight(tensors, "w13", x.dtype), _bias(tensors, "b13", x))
    weight = whole_weight(tensors, "w2", x.dtype)
    return functional.linear(activation(hidden), weight, _bias(tensors, "b2", x))


def compute_experts(
    x_PH: torch.Tensor,
    end_S: torch.Tensor,
    slots: ExpertSlots,
    activation: Activation,
) -> torch.Tensor:
    """Return what the experts of the rows' slots make of them, [P, H].

    Parameters
    ----------
    x_PH : Tensor
        Rows of the slots, one slot's after the other's. What is behind the last slot's end is not
        computed.
    end_S : Tensor of int32
        Where each slot's rows end.
    slots : ExpertSlots
    activation : callable
        Of ``[g, u]``, shape [P, 2 x I], to [P, I].
    """
    if not len(x_PH):
        return x_PH
    tensors = {name: slots.tensor(name) for name in slots.layout.fields}
    # Grouped GEMMs of torch 2.11 take BF16 on GPUs.
    if not x_PH.is_cuda or x_PH.dtype != torch.bfloat16:
        return _one_by_one(x_PH, end_S.tolist(), tensors, activation)
    w13 = whole_weight(tensors, "w13", x_PH.dtype).transpose(1, 2)
    hidden = functional.grouped_mm(x_PH, w13, offs=end_S)
    if "b13" in tensors:
        hidden += tensors["b13"][_slot_of_rows(end_S, len(x_PH))]
    w2 = whole_weight(tensors, "w2", x_PH.dtype).transpose(1, 2)
    out = functional.grouped_mm(activation(hidden), w2, offs=end_S)
    if "b2" in tensors:
        out += tensors["b2"][_slot_of_rows(end_S, len(x_PH))]
    return out


def _slot_of_rows(end_S: torch.Tensor, num_rows: int) -> torch.Tensor:
    row_P = torch.arange(num_rows, dtype=end_S.dtype, device=end_S.device)
    return torch.searchsorted(end_S, row_P, right=True).clamp_(max=len(end_S) - 1)


def _one_by_one(
    x_PH: torch.Tensor,
    end_S: list[int],
    tensors: dict[str, torch.Tensor],
    activation: Activation,
) -> torch.Tensor:
    out_PH = torch.empty_like(x_PH)
    begin = 0
    for slot, end in enumerate(end_S):
        if end > begin:
            of_slot = {name: tensor[slot] for name, tensor in tensors.items()}
            out_PH[begin:end] = _run_expert(x_PH[begin:end], of_slot, activation)
        begin = end
    return out_PH


def _bias(tensors: dict[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor | None:
    return tensors[name].to(like.dtype) if name in tensors else None


def whole_weight(
    tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype
) -> torch.Tensor:
    """Return a weight as it is multiplied: FP8 is multiplied out with its scales."""
    weight = tensors[name]
    if weight.dtype == dtype:
        return weight
    if f"{name}_scale" not in tensors:
        raise InvalidInput(
            f"weights {name!r} are {weight.dtype} and activations {dtype}; give the layer a "
            f"payload of the weights' type, or {name}_scale with FP8 weights"
        )
    scale = tensors[f"{name}_scale"]
    scale = scale.repeat_interleave(BLOCK, -2)[..., : weight.shape[-2], :]
    scale = scale.repeat_interleave(BLOCK, -1)[..., : weight.shape[-1]]
    return (weight.float() * scale).to(dtype)
