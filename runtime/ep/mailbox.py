"""The tensors of one exchange over peer memory.

Shape letters: C processes, Q ranks and S slots of a process, N rows from a process, T tokens, K
top-k, J rows that return for a token, H hidden size, B bytes, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Mailbox"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mailbox:
    """What one exchange at a time uses.

    Parameters
    ----------
    rows : Tensor of uint8, shape [C, N, B]
        Written by the peers, each to its own part: activations, slots, weights, return place.
    back : Tensor, shape [T * J, H]
        Written by the peers: results.
    headers : Tensor of int64, shape [2, C, Q + S + 2]
        Written by the peers: counts and words.
    experts : Tensor of int64, shape [2, C, E]
        Written by the peers: counts of experts.
    flags : Tensor of int64, shape [C]
        Written by the peers: how far each has come.
    rows_at, back_at, headers_at, experts_at, flags_at : Tensor of int64, shape [C]
        Addresses of the same in the memory of each peer: of ``rows`` and ``flags`` this process'
        place, of the others the beginning.
    epoch : Tensor of int64, shape [1]
        How far this process has come.
    counters : Tensor of int32
        Of the dispatch under way (:func:`eplb.runtime.ep.peer_kernels.dispatch`).
    targets : Tensor of int64, shape [T, K]
    index : Tensor of int32, shape [C * N, K]
        Places of received rows' pairs.
    rows_C, end_S, cursor_S : Tensor of int32
        Rows from each process; where each slot's pairs end, and where the next one goes.
    """

    rows: torch.Tensor
    back: torch.Tensor
    headers: torch.Tensor
    experts: torch.Tensor
    flags: torch.Tensor
    rows_at: torch.Tensor
    back_at: torch.Tensor
    headers_at: torch.Tensor
    experts_at: torch.Tensor
    flags_at: torch.Tensor
    epoch: torch.Tensor
    counters: torch.Tensor
    targets: torch.Tensor
    index: torch.Tensor
    rows_C: torch.Tensor
    end_S: torch.Tensor
    cursor_S: torch.Tensor
