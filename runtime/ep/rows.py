"""Gathering rows, and adding up several rows for each token, in float32 and in a fixed order.

On a GPU both are one pass over memory (:mod:`eplb.runtime.ep.kernels`); on the CPU they are plain
torch and the meaning of the kernels.
Shape letters: N rows, T tokens, J rows of a token, B bytes, H hidden size.
"""

from __future__ import annotations

import torch

__all__ = ["gather_rows", "sum_rows"]


def gather_rows(rows_NB: torch.Tensor, index_M: torch.Tensor, out_MB: torch.Tensor) -> None:
    """Write ``rows_NB[index_M]`` to ``out_MB``; both may be columns of wider rows of bytes."""
    if rows_NB.is_cuda:
        # Triton is there with GPUs only.
        from eplb.runtime.ep.kernels import gather_rows as gather  # noqa: PLC0415

        gather(rows_NB, index_M, out_MB)
    else:
        out_MB.copy_(rows_NB[index_M])


def sum_rows(
    rows_NH: torch.Tensor,
    index_TJ: torch.Tensor,
    weight_TJ: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return for each token the sum of its rows, times their weights, shape [T, H].

    Parameters
    ----------
    rows_NH : Tensor
    index_TJ : Tensor of int
        Rows of each token; below 0 for none.
    weight_TJ : Tensor of float32, optional
    dtype : dtype
        Of the result. The sum is in float32, over J in order.
    """
    if rows_NH.is_cuda:
        from eplb.runtime.ep.kernels import sum_rows as add_up  # noqa: PLC0415

        return add_up(rows_NH, index_TJ, weight_TJ, dtype)
    num_tokens, num_parts = index_TJ.shape
    total_TH = torch.zeros(num_tokens, rows_NH.shape[1], dtype=torch.float32)
    for j in range(num_parts if len(rows_NH) else 0):
        index_T = index_TJ[:, j]
        part_TH = rows_NH[index_T.clamp(min=0)].float()
        if weight_TJ is not None:
            part_TH *= weight_TJ[:, j, None]
        total_TH += torch.where(index_T[:, None] >= 0, part_TH, 0.0)
    return total_TH.to(dtype)
