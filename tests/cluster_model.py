"""A model of the cluster on which schedules are lived through, independent of how they are made."""

from __future__ import annotations

import numpy as np


def lived_through(migration, schedule, spare):
    """Apply a schedule on a model of the cluster: slots that serve, and experts that wait.

    Asserts that every expert is live at all times, and that no rank holds more than its slots and
    ``spare`` experts. Returns the placement at the end.
    """
    serving = migration.old_LRK.copy()
    known = [set(layer.reshape(-1).tolist()) - {-1} for layer in serving]
    has_slot = (migration.old_LRK >= 0) | (migration.new_LRK >= 0)
    placements = schedule.in_force(migration)
    number = 0
    for batch in range(int(schedule.batch_M.max(initial=0)) + 1):
        of_batch = np.flatnonzero(schedule.batch_M == batch)
        waiting = np.zeros(migration.num_ranks, int)
        written = set()
        for number in np.unique(schedule.round_M[of_batch]).tolist():
            moves = np.flatnonzero(schedule.round_M == number)
            assert (schedule.batch_M[moves] == batch).all()
            assert len(set(schedule.source_M[moves].tolist())) == len(moves)
            assert len(set(migration.rank_M[moves].tolist())) == len(moves)
            for m in moves.tolist():
                layer, rank = int(migration.layer_M[m]), int(migration.rank_M[m])
                place = layer, rank, int(schedule.slot_M[m])
                assert migration.expert_M[m] in serving[layer, schedule.source_M[m]]
                assert has_slot[place]
                assert place not in written
                written.add(place)
                # An empty slot takes its expert in at once.
                waiting[rank] += serving[place] >= 0
                assert waiting.max() <= spare
        after = next(placements)
        for m in of_batch.tolist():
            serving[migration.layer_M[m], migration.rank_M[m], schedule.slot_M[m]] = (
                migration.expert_M[m]
            )
        for layer, experts in enumerate(known):
            assert set(after[layer].reshape(-1).tolist()) - {-1} >= experts
            for rank in range(migration.num_ranks):
                # Slots of a rank may be put in order, and what has no place any more may go.
                assert set(after[layer, rank].tolist()) - {-1} <= set(serving[layer, rank].tolist())
        serving = after
    assert next(placements, None) is None
    return serving
