"""In what order experts move: rounds in which each rank sends at most one and receives at most one.

Transfers are the edges between ranks that send and ranks that receive, and rounds the colours of
their edges; a bipartite multigraph needs as many as its largest degree (Koenig, Math. Ann. 77,
1916), which is what exchanging colours along alternating paths reaches.

While a layer's experts arrive they wait in spare slots, and the old placement serves and is what
all sends read; then the layer changes over on all ranks at once. So no expert is ever without a
live replica. Spare slots are what limits how many layers move together.

Shape letters: L layers, R ranks, K slots of a rank, M moves, B batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eplb.arrays import IntArray, frozen_array
from eplb.errors import InvalidInput, MigrationFailed
from eplb.placement.migration import Migration
from eplb.topology import Topology

__all__ = ["Schedule", "schedule_moves"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schedule:
    """Who sends what to whom, and when.

    Parameters
    ----------
    source_M, round_M, batch_M : array of int64, shape [M]
        Of each move of the migration: the rank that sends, the round, and the batch of layers that
        change over together, after the last round of the batch.
    num_rounds : int
    min_rounds : int
        The largest number of sends or receives of a rank, within each batch and added up: no order
        of these transfers takes fewer.
    staging_slots : int
        Most experts that wait in spare slots of one rank.
    """

    source_M: IntArray
    round_M: IntArray
    batch_M: IntArray
    num_rounds: int
    min_rounds: int
    staging_slots: int

    def __post_init__(self) -> None:
        for name in ("source_M", "round_M", "batch_M"):
            object.__setattr__(self, name, frozen_array(getattr(self, name), np.int64))

    def round_seconds(
        self, migration: Migration, topology: Topology, expert_bytes: int
    ) -> list[float] | None:
        """Return what each round takes at the topology's bandwidths; None where they are not known.

        A round takes what its slowest transfer takes; latencies are left out.
        """
        same = (
            self.source_M // topology.ranks_per_node == migration.rank_M // topology.ranks_per_node
        )
        speeds = topology.intra_node_bytes_per_s, topology.inter_node_bytes_per_s
        if (speeds[0] is None and same.any()) or (speeds[1] is None and (~same).any()):
            return None
        inside, across = (0.0 if speed is None else expert_bytes / speed for speed in speeds)
        seconds = np.zeros(self.num_rounds)
        np.maximum.at(seconds, self.round_M, np.where(same, inside, across))
        return [float(x) for x in seconds]


def schedule_moves(
    migration: Migration, ranks_per_node: int, *, spare_slots: int | None = None
) -> Schedule:
    """Choose sources and rounds.

    Parameters
    ----------
    migration : Migration
    ranks_per_node : int
        Sources of the same node are taken before others, and of these the least busy.
    spare_slots : int, optional
        Experts that a rank can hold beyond its slots while they wait; no limit where left out.

    Raises
    ------
    InvalidInput
        ``spare_slots`` is negative.
    MigrationFailed
        A layer cannot be staged in the spare slots, or an expert has no replica to be sent from.
    """
    if spare_slots is not None and spare_slots < 0:
        raise InvalidInput(f"spare_slots must be at least 0, got {spare_slots}")
    batch_M, staging = _batches(migration, spare_slots)
    source_M = np.full(migration.num_moves, -1, np.int64)
    round_M = np.full(migration.num_moves, -1, np.int64)
    num_rounds = least = 0
    for batch in np.unique(batch_M):
        index = np.flatnonzero(batch_M == batch)
        source_M[index] = _sources(migration, index, ranks_per_node)
        source, target = source_M[index], migration.rank_M[index]
        degree = int(max(np.bincount(source).max(), np.bincount(target).max()))
        colour = _colour(source, target, migration.num_ranks, degree)
        round_M[index] = colour + num_rounds
        num_rounds += int(colour.max()) + 1
        least += degree
    return Schedule(
        source_M=source_M,
        round_M=round_M,
        batch_M=batch_M,
        num_rounds=num_rounds,
        min_rounds=least,
        staging_slots=staging,
    )


def _batches(migration: Migration, spare_slots: int | None) -> tuple[IntArray, int]:
    """Return the batch of each move, layers in their order, and the most that a rank stages."""
    num_layers, num_ranks = migration.old_LRK.shape[:2]
    received_LR = np.zeros((num_layers, num_ranks), np.int64)
    np.add.at(received_LR, (migration.layer_M, migration.rank_M), 1)
    if spare_slots is None:
        return np.zeros(migration.num_moves, np.int64), int(received_LR.sum(axis=0).max())
    batch_L = np.zeros(num_layers, np.int64)
    waiting_R = np.zeros(num_ranks, np.int64)
    most = 0
    for layer, received_R in enumerate(received_LR):
        if received_R.max() > spare_slots:
            raise MigrationFailed(
                f"rank {int(received_R.argmax())} receives {int(received_R.max())} experts of one "
                f"layer (row {layer}) and has {spare_slots} spare slots for them to wait in; give "
                f"{int(received_LR.max())}, or move fewer experts at a time"
            )
        fits = (waiting_R + received_R).max() <= spare_slots
        batch_L[layer] = batch_L[layer - 1] + (not fits) if layer else 0
        waiting_R = waiting_R + received_R if fits else received_R
        most = max(most, int(waiting_R.max()))
    return batch_L[migration.layer_M], most


def _sources(migration: Migration, index: IntArray, ranks_per_node: int) -> IntArray:
    """Return the rank that sends each of these moves: same node first, then the least busy."""
    ranks = _holders(migration, index)
    sent = [0] * migration.num_ranks
    source = np.empty(len(index), np.int64)
    # Moves with the fewest sources to choose from first: the others can make way for them.
    for i in sorted(range(len(index)), key=lambda i: (len(ranks[i]), i)):
        node = migration.rank_M[index[i]] // ranks_per_node
        source[i] = min(ranks[i], key=lambda r: (r // ranks_per_node != node, sent[r], r))
        sent[source[i]] += 1
    return source


def _holders(migration: Migration, index: IntArray) -> list[list[int]]:
    """Return the ranks that hold the expert of each of these moves in the old placement."""
    of: dict[tuple[int, int], list[int]] = {}
    for layer in np.unique(migration.layer_M[index]).tolist():
        for rank, row in enumerate(migration.old_LRK[layer].tolist()):
            for expert in set(row):
                of.setdefault((layer, expert), []).append(rank)
    keys = zip(migration.layer_M[index].tolist(), migration.expert_M[index].tolist(), strict=True)
    holders = []
    for layer, expert in keys:
        if (layer, expert) not in of:
            raise MigrationFailed(
                f"expert {expert} has no live replica in row {layer} of the layers to be sent "
                "from; load it from the checkpoint first"
            )
        holders.append(of[layer, expert])
    return holders


def _colour(source: IntArray, target: IntArray, num_ranks: int, num_colours: int) -> IntArray:
    """Return a colour of each edge, no two alike at a sender or at a receiver.

    An edge takes a colour free at both ends. Where there is none, a colour that is free at the
    receiver is made free at the sender by exchanging two colours along a path, which cannot come
    back to the receiver since the graph is bipartite.
    """
    # Senders and receivers as vertices of one array: the edge of each colour, or -1.
    edge_of = [[-1] * num_colours for _ in range(2 * num_ranks)]
    ends = list(zip(source.tolist(), (target + num_ranks).tolist(), strict=True))
    colour = [-1] * len(ends)
    for edge, (u, v) in enumerate(ends):
        at_u, at_v = edge_of[u], edge_of[v]
        a = at_u.index(-1)
        if at_v[a] >= 0:
            b = at_v.index(-1)
            _exchange(edge_of, ends, colour, v, a, b)
        at_u[a] = at_v[a] = edge
        colour[edge] = a
    return np.array(colour, np.int64)


def _exchange(
    edge_of: list[list[int]],
    ends: list[tuple[int, int]],
    colour: list[int],
    vertex: int,
    a: int,
    b: int,
) -> None:
    """Exchange colours a and b along the path that leaves a vertex by a; b is free there."""
    path, old = [], a
    while (edge := edge_of[vertex][old]) >= 0:
        path.append(edge)
        u, v = ends[edge]
        vertex = v if vertex == u else u
        old = b if old == a else a
    for edge in path:
        for end in ends[edge]:
            edge_of[end][colour[edge]] = -1
    for edge in path:
        colour[edge] = b if colour[edge] == a else a
        for end in ends[edge]:
            edge_of[end][colour[edge]] = edge
