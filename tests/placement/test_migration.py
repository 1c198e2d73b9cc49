"""A schedule lived through on a model of the cluster, and the moves against brute force."""

from itertools import permutations

import numpy as np
import pytest
from cluster_model import lived_through
from hypothesis import given
from hypothesis import strategies as st

from eplb.errors import InvalidInput, MigrationFailed
from eplb.placement.keep_slots import count_moves, keep_slots
from eplb.placement.migration import find_migration
from eplb.placement.schedule import schedule_moves
from eplb.topology import Topology


def placed(random, layers, ranks, per_rank, experts):
    """Every expert at least once, the rest at random; doubled experts on a rank too."""
    slots = ranks * per_rank
    rows = [
        random.permutation(
            np.concatenate([np.arange(experts), random.integers(0, experts, slots - experts)])
        )
        for _ in range(layers)
    ]
    return np.array(rows).reshape(layers, ranks, per_rank)


@st.composite
def sides(draw):
    """(old, new, ranks of a node): also of different numbers of ranks and slots."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts, layers = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    both = []
    for _ in range(2):
        ranks = draw(st.integers(1, 6))
        least = -(-experts // ranks)
        both.append(placed(random, layers, ranks, draw(st.integers(least, least + 2)), experts))
    return *both, draw(st.integers(1, 3))


@given(sides(), st.none() | st.integers(0, 8))
def test_round_by_round_the_old_placement_becomes_the_new_one(case, spare):
    old, new, per_node = case
    migration = find_migration(old, new)
    try:
        schedule = schedule_moves(migration, per_node, spare_slots=spare)
    except MigrationFailed:
        received = np.zeros(migration.old_LRK.shape[:2], int)
        np.add.at(received, (migration.layer_M, migration.rank_M), 1)
        assert spare is not None
        assert received.max() > spare
        return
    assert schedule.num_rounds == schedule.min_rounds
    live = [[set(rank) - {-1} for rank in layer] for layer in migration.old_LRK.tolist()]
    final = [[set(rank) - {-1} for rank in layer] for layer in migration.new_LRK.tolist()]
    experts = [set().union(*layer) for layer in live]
    waiting = [[] for _ in range(migration.num_ranks)]
    arrived = [[set() for _ in layer] for layer in live]
    for number in range(schedule.num_rounds):
        moves = np.flatnonzero(schedule.round_M == number)
        assert len(moves) > 0
        sources, targets = schedule.source_M[moves], migration.rank_M[moves]
        assert len(set(sources.tolist())) == len(moves) == len(set(targets.tolist()))
        for m, source, target in zip(moves, sources, targets, strict=True):
            layer, expert = int(migration.layer_M[m]), int(migration.expert_M[m])
            assert expert in live[layer][source]
            waiting[target].append((layer, expert))
            arrived[layer][target].add(expert)
        assert max(map(len, waiting)) <= schedule.staging_slots
        assert spare is None or schedule.staging_slots <= spare
        batch = int(schedule.batch_M[moves[0]])
        if number + 1 == schedule.num_rounds or (
            schedule.batch_M[schedule.round_M == number + 1][0] != batch
        ):
            for layer in set(migration.layer_M[schedule.batch_M == batch].tolist()):
                for rank, wanted in enumerate(final[layer]):
                    assert wanted <= live[layer][rank] | arrived[layer][rank]
                    live[layer][rank] = set(wanted)
            waiting = [[] for _ in waiting]
        for layer, known in zip(live, experts, strict=True):
            assert set().union(*layer) == known
    moved = set(migration.layer_M.tolist())
    for layer in range(len(live)):
        for rank, wanted in enumerate(final[layer]):
            # Layers without transfers change over for free.
            assert wanted <= live[layer][rank]
            assert layer not in moved or wanted == live[layer][rank]


@given(sides(), st.integers(0, 3))
def test_layers_change_over_in_parts_within_any_spare_slot(case, spare):
    old, new, per_node = case
    migration = find_migration(old, new)
    try:
        schedule = schedule_moves(migration, per_node, spare_slots=spare, in_parts=True)
    except MigrationFailed as error:
        assert spare == 0, error  # noqa: PT017
        return
    assert schedule.num_rounds == schedule.min_rounds
    assert schedule.staging_slots <= spare
    end = lived_through(migration, schedule, spare)
    assert np.array_equal(end, migration.new_LRK)


@given(sides())
def test_in_parts_nothing_is_split_that_fits(case):
    old, new, per_node = case
    migration = find_migration(old, new)
    schedule = schedule_moves(migration, per_node, spare_slots=99, in_parts=True)
    assert (schedule.batch_M == 0).all()
    received = np.zeros(migration.num_ranks, int)
    into = migration.old_LRK[migration.layer_M, migration.rank_M, schedule.slot_M] >= 0
    np.add.at(received, migration.rank_M[into], 1)
    assert schedule.staging_slots == received.max()


def test_a_ring_of_single_replicas_needs_one_spare_slot_and_no_more():
    """Three ranks hand everything on: each part is a ring of three transfers."""
    old = np.array([[[0, 1], [2, 3], [4, 5]]])
    new = np.array([[[4, 5], [0, 1], [2, 3]]])
    migration = find_migration(old, new)
    schedule = schedule_moves(migration, 1, spare_slots=1, in_parts=True)
    assert sorted(np.bincount(schedule.batch_M).tolist()) == [3, 3]
    assert np.array_equal(lived_through(migration, schedule, 1), new)
    with pytest.raises(MigrationFailed, match="give at least 1"):
        schedule_moves(migration, 1, spare_slots=0, in_parts=True)


def test_new_ranks_fill_without_spare_slots():
    old = np.array([[[0, 1], [2, 3]]])
    new = np.array([[[0, 1], [2, 3], [0, 2], [1, 3]]])
    migration = find_migration(old, new)
    schedule = schedule_moves(migration, 2, spare_slots=0, in_parts=True)
    assert schedule.staging_slots == 0
    assert np.array_equal(lived_through(migration, schedule, 0), new)


@given(sides())
def test_rounds_are_the_largest_degree(case):
    old, new, per_node = case
    migration = find_migration(old, new)
    schedule = schedule_moves(migration, per_node)
    degrees = [np.bincount(x) for x in (schedule.source_M, migration.rank_M) if len(x)]
    assert schedule.num_rounds == max((int(d.max()) for d in degrees), default=0)


@given(sides())
def test_a_placement_and_itself_differ_in_nothing(case):
    old, _, per_node = case
    migration = find_migration(old, old[:, :, ::-1])
    assert migration.num_moves == 0
    assert schedule_moves(migration, per_node).num_rounds == 0


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3))
def test_matched_ranks_move_the_fewest_of_all_numberings(seed, ranks, per_rank):
    random = np.random.default_rng(seed)
    experts = int(random.integers(1, ranks * per_rank + 1))
    old, new = (placed(random, 1, ranks, per_rank, experts) for _ in range(2))
    kept = keep_slots(new.reshape(1, -1), old.reshape(1, -1), ranks)
    found = find_migration(old, kept.reshape(old.shape)).num_moves
    assert found == count_moves(old.reshape(1, -1), kept, ranks)

    def distinct(order):
        pairs = zip(new[0][list(order)].tolist(), old[0].tolist(), strict=True)
        return sum(len(set(a) - set(b)) for a, b in pairs)

    fewest = min(map(distinct, permutations(range(ranks))))
    pairs = zip(kept.reshape(ranks, -1).tolist(), old[0].tolist(), strict=True)
    assert sum(len(set(a) - set(b)) for a, b in pairs) == fewest


def test_the_same_node_sends_first_and_the_seconds_are_those_of_its_link():
    old = np.array([[[0, 1], [0, 2], [1, 3], [3, 2]]])
    new = np.array([[[0, 1], [1, 2], [1, 3], [3, 0]]])
    migration = find_migration(old, new)
    schedule = schedule_moves(migration, 2)
    assert migration.rank_M.tolist() == [1, 3]
    assert schedule.source_M[0] == 0
    topology = Topology(
        num_nodes=2,
        ranks_per_node=2,
        slots_per_rank=2,
        intra_node_bytes_per_s=100.0,
        inter_node_bytes_per_s=10.0,
    )
    assert sum(schedule.round_seconds(migration, topology, 50)) == pytest.approx(5.0)
    assert schedule.num_rounds == 1
    unknown = Topology(num_nodes=2, ranks_per_node=2, slots_per_rank=2)
    assert schedule.round_seconds(migration, unknown, 50) is None


def test_what_cannot_be_staged_is_refused_with_the_remedy():
    old, new = np.array([[[0, 1], [2, 3]]]), np.array([[[2, 3], [0, 1]]])
    migration = find_migration(old, new)
    with pytest.raises(MigrationFailed, match="give 2"):
        schedule_moves(migration, 1, spare_slots=1)
    assert schedule_moves(migration, 1, spare_slots=2).num_rounds == 2
    with pytest.raises(InvalidInput, match="at least 0"):
        schedule_moves(migration, 1, spare_slots=-1)


def test_an_expert_without_a_live_replica_is_named():
    migration = find_migration(np.array([[[0, -1], [0, 1]]]), np.array([[[0, 2], [0, 1]]]))
    with pytest.raises(MigrationFailed, match="expert 2 has no live replica"):
        schedule_moves(migration, 1)
