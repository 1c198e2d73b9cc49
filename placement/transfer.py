"""What moving to a placement takes, in seconds: what ``replan`` and ``replay`` charge for moves.

The schedule of :mod:`eplb.placement.schedule` at the topology's bandwidths, as in ``eplb diff``.
"""

from __future__ import annotations

from eplb.errors import InvalidInput
from eplb.placement.migration import find_migration
from eplb.placement.schedule import schedule_moves
from eplb.slots import Placement
from eplb.topology import Topology

__all__ = ["transfer_seconds"]


def transfer_seconds(
    old: Placement, new: Placement, topology: Topology, expert_bytes: int | None
) -> float:
    """Return the seconds in which ranks fetch what the new placement asks of them.

    Raises
    ------
    InvalidInput
        The size of an expert or a bandwidth that matters is not known.
    """
    if expert_bytes is None:
        raise InvalidInput(
            "the size of an expert is not known, so moves cannot be charged; give --expert-bytes "
            "or a --model"
        )
    old_LRK, new_LRK = (
        placement.phys_to_log_LS.reshape(placement.num_layers, topology.num_ranks, -1)
        for placement in (old, new)
    )
    migration = find_migration(old_LRK, new_LRK)
    if not migration.num_moves:
        return 0.0
    schedule = schedule_moves(migration, topology.ranks_per_node)
    seconds = schedule.round_seconds(migration, topology, expert_bytes)
    if seconds is None:
        raise InvalidInput(
            "the bandwidths of links are not known, so moves cannot be charged; give --topology"
        )
    return sum(seconds)
