"""Where the rows of tokens go among the rows that are sent: in order of part and token.

On a GPU all of it is a few kernels (:mod:`eplb.runtime.ep.place_kernels`), because at small batches
a launch costs more than the work; here is the meaning of them in plain torch.
Shape letters: T tokens, K top-k, P parts, N rows, B bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Places", "pack_rows", "place_rows"]


@dataclass(frozen=True, slots=True)
class Places:
    """Rows of a batch; a token has one for each part that it goes to.

    Parameters
    ----------
    part_TK : Tensor of int32
        Part of each of a token's slots; P for none.
    order_TK, index_TK : Tensor of int32 and int64
        A token's parts in increasing order, and its row for each; the index is -1 behind them.
    rows_P, pairs_P : Tensor of int64
        Rows, and token-expert pairs, for each part.
    """

    part_TK: torch.Tensor
    order_TK: torch.Tensor
    index_TK: torch.Tensor
    rows_P: torch.Tensor
    pairs_P: torch.Tensor


def place_rows(
    slot_TK: torch.Tensor, first_slot: int, slots_per_part: int, num_parts: int
) -> Places:
    """Find the rows of a batch; nothing waits for the device.

    Parameters
    ----------
    slot_TK : Tensor of int
        Slots that tokens go to, -1 for none.
    first_slot, slots_per_part, num_parts : int
        Slots of the parts.
    """
    if slot_TK.is_cuda:
        from eplb.runtime.ep.place_kernels import place_rows as place  # noqa: PLC0415

        return place(slot_TK, first_slot, slots_per_part, num_parts)
    T, P = len(slot_TK), num_parts
    part_TK = torch.where(slot_TK >= 0, (slot_TK - first_slot) // slots_per_part, P).long()
    order_TK = part_TK.sort(dim=1).values
    again_TK = torch.zeros_like(order_TK, dtype=torch.bool)
    again_TK[:, 1:] = order_TK[:, 1:] == order_TK[:, :-1]
    # Each part once, then none.
    order_TK = order_TK.masked_fill(again_TK, P).sort(dim=1).values
    needed_TP = torch.zeros(T, P + 1, dtype=torch.bool).scatter_(1, part_TK, value=True)
    needed_PT = needed_TP[:, :P].t()
    row_PT = needed_PT.flatten().cumsum(0).view(P, T) - 1
    index_TK = row_PT.t().gather(1, order_TK.clamp(max=P - 1))
    return Places(
        part_TK=part_TK.int(),
        order_TK=order_TK.int(),
        index_TK=torch.where(order_TK < P, index_TK, -1),
        rows_P=needed_PT.sum(1),
        pairs_P=torch.bincount(part_TK.flatten(), minlength=P + 1)[:P],
    )


def pack_rows(
    places: Places,
    bytes_TB: torch.Tensor,
    slot_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    bytes_NB: torch.Tensor,
    slot_NK: torch.Tensor,
    weight_NK: torch.Tensor,
) -> None:
    """Write every row: its token's bytes, the slots of its part (-1 for others), the weights.

    The last three arguments are written to; they may be columns of wider rows.
    """
    if bytes_TB.is_cuda:
        from eplb.runtime.ep.place_kernels import pack_rows as pack  # noqa: PLC0415

        pack(places, bytes_TB, slot_TK, weight_TK, bytes_NB, slot_NK, weight_NK)
        return
    token_N, k_N = torch.nonzero(places.index_TK >= 0, as_tuple=True)
    row_N = places.index_TK[token_N, k_N]
    bytes_NB[row_N] = bytes_TB[token_N]
    own_NK = places.part_TK[token_N] == places.order_TK[token_N, k_N, None]
    slot_NK[row_N] = torch.where(own_NK, slot_TK[token_N], -1).int()
    weight_NK[row_N] = weight_TK[token_N]
