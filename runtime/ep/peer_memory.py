"""Memory that the other processes of a node write to: kernels their tokens, copy engines experts.

torch's symmetric memory makes an allocation of each process of a group visible to all of them; a
copy into a peer's is then a plain copy between two addresses, which the copy engine carries out
without taking a multiprocessor from serving. Nothing here is a collective after the start, so
nothing can deadlock with serving's. Multicast is not used.
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist

from eplb.runtime.ep.group import EPGroup

__all__ = ["PeerMemory"]


class PeerMemory:
    """Allocations of the processes of a node that each of them can write to.

    Making it, and :meth:`allocate`, is collective. On CPUs, and for processes of other nodes, there
    is no such memory, and rows are fetched instead (:mod:`eplb.runtime.row_fetch`).

    Parameters
    ----------
    group : EPGroup
        Several nodes share memory within each only if it was made with ``nodes=True``.
    """

    def __init__(self, group: EPGroup) -> None:
        self._device = group.device
        self._group: dist.ProcessGroup | None = None
        if group.device.type == "cuda":
            # Only names and a store are asked of it, so it need not be NCCL's.
            self._group = group.control if group.num_nodes == 1 else group.node_group
        self._members: list[int] = []
        if self._group is not None and _is_known_by_another(self._group):
            warnings.warn(
                "torch knows another group by the name of this node's, from before processes were "
                "lost, and cannot share memory again: rows are fetched over TCP; restart the "
                "processes when it suits",
                RuntimeWarning,
                stacklevel=2,
            )
            self._group = None
        if self._group is not None:
            world = dist.get_process_group_ranks(group.process_group)
            self._members = [world.index(p) for p in dist.get_process_group_ranks(self._group)]
        self._views: dict[int, torch.Tensor] = {}

    def allocate(self, shape: tuple[int, int]) -> torch.Tensor:
        """Return memory of uint8, zeroed, that all of the node can write to. Collective."""
        if self._group is None or len(self._members) == 1:
            return torch.zeros(shape, dtype=torch.uint8, device=self._device)
        from torch.distributed import _symmetric_memory  # noqa: PLC0415  (slow, GPUs only)

        own = _symmetric_memory.empty(shape, dtype=torch.uint8, device=self._device)
        own.zero_()
        handle = _symmetric_memory.rendezvous(own, self._group)
        self._views = {
            process: handle.get_buffer(number, shape, torch.uint8)
            for number, process in enumerate(self._members)
        }
        return own

    def rows_of(self, process: int) -> torch.Tensor | None:
        """Return a peer's allocation, None where this process cannot write to it."""
        return self._views.get(process)

    def close(self) -> None:
        """Let go of the peers' memory."""
        self._views.clear()


# Groups that memory has been shared in, by name: torch keeps what it learnt of a name for good
# (torch 2.11, _symmetric_memory.enable_symm_mem_for_group), also when the group is gone.
_SHARED: dict[str, dist.ProcessGroup] = {}


def _is_known_by_another(group: dist.ProcessGroup) -> bool:
    return _SHARED.setdefault(group.group_name, group) is not group
