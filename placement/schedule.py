"""In what order experts move: rounds in which each rank sends at most one and receives at most one.

Transfers are the edges between ranks that send and ranks that receive, and rounds the colours of
their edges; a bipartite multigraph needs as many as its largest degree (Koenig, Math. Ann. 77,
1916), which is what exchanging colours along alternating paths reaches.

While a layer's experts arrive they wait in spare slots, and the old placement serves and is what
all sends read; then the layer changes over on all ranks at once. So no expert is ever without a
live replica. Spare slots are what limits how many layers move together. A layer that exceeds them
can change over in parts (:mod:`eplb.placement.parts`), each from the placement that the part before
it left.

Shape letters: L layers, R ranks, K slots of a rank, M moves, B batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from eplb.arrays import IntArray, frozen_array
from eplb.errors import InvalidInput, MigrationFailed
from eplb.placement.migration import Migration
from eplb.placement.parts import split_layer
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
    slot_M : array of int64, shape [M]
        The slot within its rank that the expert lies in once its batch has changed over: that of
        the new placement, but where a layer that changes over in parts has another one till its
        last part.
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
    slot_M: IntArray
    num_rounds: int
    min_rounds: int
    staging_slots: int

    def __post_init__(self) -> None:
        for name in ("source_M", "round_M", "batch_M", "slot_M"):
            object.__setattr__(self, name, frozen_array(getattr(self, name), np.int64))

    def in_force(self, migration: Migration) -> Iterator[IntArray]:
        """Give the placement after each batch, shape [L, R, K]; the last one is the new one.

        A layer is in its final order of slots after its last batch, and layers without moves are
        so from the first one on.
        """
        now_LRK = migration.old_LRK.copy()
        last_L = np.zeros(len(now_LRK), np.int64)
        np.maximum.at(last_L, migration.layer_M, self.batch_M)
        for batch in range(int(self.batch_M.max(initial=0)) + 1):
            m = self.batch_M == batch
            now_LRK[migration.layer_M[m], migration.rank_M[m], self.slot_M[m]] = migration.expert_M[
                m
            ]
            now_LRK[last_L <= batch] = migration.new_LRK[last_L <= batch]
            yield now_LRK.copy()

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
    migration: Migration,
    ranks_per_node: int,
    *,
    spare_slots: int | None = None,
    in_parts: bool = False,
) -> Schedule:
    """Choose sources and rounds.

    Parameters
    ----------
    migration : Migration
    ranks_per_node : int
        Sources of the same node are taken before others, and of these the least busy.
    spare_slots : int, optional
        Experts that a rank can hold beyond its slots while they wait; no limit where left out.
    in_parts : bool
        Let an expert whose slot is empty arrive there and not wait, and let a layer that exceeds
        the spare slots change over in parts. Without it all experts of a layer wait, and the layer
        changes over once.

    Raises
    ------
    InvalidInput
        ``spare_slots`` is negative.
    MigrationFailed
        A layer cannot be staged in the spare slots, or an expert has no replica to be sent from.
    """
    if spare_slots is not None and spare_slots < 0:
        raise InvalidInput(f"spare_slots must be at least 0, got {spare_slots}")
    slot_M = migration.slot_M
    if in_parts and spare_slots is not None:
        batch_M, slot_M, staging = _batches_of_parts(migration, spare_slots)
    else:
        batch_M, staging = _batches(migration, spare_slots)
    source_M = np.full(migration.num_moves, -1, np.int64)
    round_M = np.full(migration.num_moves, -1, np.int64)
    num_rounds = least = 0
    now_LRK = migration.old_LRK.copy()
    for batch in np.unique(batch_M):
        index = np.flatnonzero(batch_M == batch)
        source_M[index] = _sources(migration, now_LRK, index, ranks_per_node)
        source, target = source_M[index], migration.rank_M[index]
        # Transfers between nodes first, so that the slow ones share rounds as far as they can.
        slow = source // ranks_per_node != target // ranks_per_node
        order = np.argsort(~slow, kind="stable")
        degree = int(max(np.bincount(source).max(), np.bincount(target).max()))
        colour = np.empty(len(index), np.int64)
        colour[order] = _colour(source[order], target[order], migration.num_ranks, degree)
        round_M[index] = colour + num_rounds
        num_rounds += int(colour.max()) + 1
        least += degree
        layer, rank = migration.layer_M[index], migration.rank_M[index]
        now_LRK[layer, rank, slot_M[index]] = migration.expert_M[index]
    return Schedule(
        source_M=source_M,
        round_M=round_M,
        batch_M=batch_M,
        slot_M=slot_M,
        num_rounds=num_rounds,
        min_rounds=least,
        staging_slots=staging,
    )


def _batches_of_parts(migration: Migration, spare_slots: int) -> tuple[IntArray, IntArray, int]:
    """Return batch and slot of each move, and the most that a rank stages.

    Each part of a layer goes into the first batch after that of the part before it that has room.
    """
    batch_M = np.zeros(migration.num_moves, np.int64)
    slot_M = migration.slot_M.copy()
    waiting_BR = [np.zeros(migration.num_ranks, np.int64)]
    first_L = np.searchsorted(migration.layer_M, np.arange(len(migration.old_LRK) + 1))
    for layer, (start, stop) in enumerate(itertools.pairwise(first_L.tolist())):
        moves = slice(start, stop)
        rank_M = migration.rank_M[moves]
        parts = split_layer(
            migration.old_LRK[layer],
            migration.new_LRK[layer],
            rank_M,
            migration.slot_M[moves],
            migration.expert_M[moves],
            spare_slots,
        )
        if parts is None:
            raise MigrationFailed(
                f"experts of row {layer} of the layers can only take the place of others, and "
                "ranks have no spare slot for them to wait in; give at least 1"
            )
        batch = -1
        for part in parts:
            waits = [rank_M[move] for move, _, waits in part if waits]
            needs_R = np.bincount(waits, minlength=migration.num_ranks)
            batch += 1
            while batch < len(waiting_BR) and (waiting_BR[batch] + needs_R).max() > spare_slots:
                batch += 1
            if batch == len(waiting_BR):
                waiting_BR.append(np.zeros(migration.num_ranks, np.int64))
            waiting_BR[batch] += needs_R
            for move, slot, _ in part:
                batch_M[start + move] = batch
                slot_M[start + move] = slot
    return batch_M, slot_M, max(int(waiting_R.max()) for waiting_R in waiting_BR)


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
                f"{int(received_LR.max())}, let the layer change over in parts, or move fewer "
                "experts at a time"
            )
        fits = (waiting_R + received_R).max() <= spare_slots
        batch_L[layer] = batch_L[layer - 1] + (not fits) if layer else 0
        waiting_R = waiting_R + received_R if fits else received_R
        most = max(most, int(waiting_R.max()))
    return batch_L[migration.layer_M], most


def _sources(
    migration: Migration, now_LRK: IntArray, index: IntArray, ranks_per_node: int
) -> IntArray:
    """Return the rank that sends each of these moves: same node first, then the least busy."""
    rank_H, first_M, end_M = _holders(migration, now_LRK, index)
    source_M = rank_H[first_M]
    # Moves with the fewest sources to choose from first: the others can make way for them.
    sent = np.bincount(source_M[end_M == first_M + 1], minlength=migration.num_ranks).tolist()
    ranks, node_M = rank_H.tolist(), (migration.rank_M[index] // ranks_per_node).tolist()
    for i in np.argsort(end_M - first_M, kind="stable").tolist():
        if end_M[i] - first_M[i] > 1:
            source_M[i] = min(
                ranks[first_M[i] : end_M[i]],
                key=lambda r: (r // ranks_per_node != node_M[i], sent[r], r),
            )
            sent[source_M[i]] += 1
    return source_M


def _holders(
    migration: Migration, now_LRK: IntArray, index: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Return the ranks that hold experts, and each move's first and end among them.

    The ranks are those of the placement in force, expert by expert.
    """
    layers = np.unique(migration.layer_M[index])
    held = now_LRK[layers]
    num_experts = int(max(held.max(), migration.expert_M[index].max())) + 1
    row_H, rank_H, slot_H = np.nonzero(held >= 0)
    expert_H = row_H * num_experts + held[row_H, rank_H, slot_H]
    expert_H, rank_H = np.divmod(
        np.unique(expert_H * migration.num_ranks + rank_H), migration.num_ranks
    )
    expert_M = (
        np.searchsorted(layers, migration.layer_M[index]) * num_experts + migration.expert_M[index]
    )
    first_M = np.searchsorted(expert_H, expert_M)
    end_M = np.searchsorted(expert_H, expert_M, side="right")
    if (first_M == end_M).any():
        move = index[first_M == end_M][0]
        raise MigrationFailed(
            f"expert {migration.expert_M[move]} has no live replica in row "
            f"{migration.layer_M[move]} of the layers to be sent from; load it from the "
            "checkpoint first"
        )
    return rank_H, first_M, end_M


def _colour(source: IntArray, target: IntArray, num_ranks: int, num_colours: int) -> IntArray:
    """Return a colour of each edge, no two alike at a sender or at a receiver.

    An edge takes the first colour free at both ends. Where there is none, a colour that is free at
    the sender is made free at the receiver by exchanging two colours along a path, which cannot
    come back to the sender since the graph is bipartite.
    """
    # Senders and receivers as vertices of one list: the edge of each colour, or -1, and a bit for
    # each colour that is free.
    edge_of = [[-1] * num_colours for _ in range(2 * num_ranks)]
    free = [(1 << num_colours) - 1] * (2 * num_ranks)
    ends = list(zip(source.tolist(), (target + num_ranks).tolist(), strict=True))
    for edge, (u, v) in enumerate(ends):
        common = free[u] & free[v]
        colour = _first(common or free[u])
        if not common:
            _exchange(edge_of, ends, free, v, colour, _first(free[v]))
        edge_of[u][colour] = edge_of[v][colour] = edge
        free[u] ^= 1 << colour
        free[v] ^= 1 << colour
    edges = np.array(edge_of[:num_ranks])
    sender, colours = np.nonzero(edges >= 0)
    colour_M = np.empty(len(ends), np.int64)
    colour_M[edges[sender, colours]] = colours
    return colour_M


def _first(bits: int) -> int:
    """Return the number of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1


def _exchange(
    edge_of: list[list[int]],
    ends: list[tuple[int, int]],
    free: list[int],
    vertex: int,
    a: int,
    b: int,
) -> None:
    """Exchange colours a and b along the path that leaves a vertex by a; b is free there."""
    changed = 1 << a | 1 << b
    free[vertex] ^= changed
    way, other = a, b
    while True:
        edges = edge_of[vertex]
        edge = edges[way]
        edges[a], edges[b] = edges[b], edges[a]
        if edge < 0:
            break
        u, v = ends[edge]
        vertex = v if vertex == u else u
        way, other = other, way
    free[vertex] ^= changed
