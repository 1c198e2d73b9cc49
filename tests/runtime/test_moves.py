"""Batches of a swap, applied to a model of the processes' memory that knows nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb.errors import MigrationFailed
from eplb.runtime.moves import CHECKPOINT, find_arrivals, layer_batches, swap_batches


@st.composite
def swaps(draw):
    per_rank, ranks_per_process = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    processes, layers = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_slots = per_rank * ranks_per_process * processes
    num_experts = draw(st.integers(1, num_slots))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def placement():
        rows = rng.integers(-1, num_experts, (layers, num_slots))
        for row in rows:
            row[rng.permutation(num_slots)[:num_experts]] = rng.permutation(num_experts)
        return rows

    return placement(), placement(), per_rank, ranks_per_process


@given(swaps(), st.integers(0, 3))
def test_batches_bring_every_slot_what_the_new_placement_wants(swap, more):
    old, new, per_rank, ranks_per_process = swap
    per_process = per_rank * ranks_per_process
    changed = (new != old) & (new >= 0)
    spare = max(1, int(changed.reshape(len(old), -1, per_process).sum(axis=2).max())) + more
    made = swap_batches(
        old, new, slots_per_rank=per_rank, ranks_per_process=ranks_per_process,
        ranks_per_node=ranks_per_process, spare_rows=spare,
    )  # fmt: skip
    batches = list(made)
    held = old.copy()
    assert sorted(layer for batch in batches for layer in batch.layers) == list(range(len(old)))
    for batch in batches:
        waiting = {}
        busy = set()
        for m in range(batch.num_rows):
            layer, slot, source = batch.layer_M[m], batch.slot_M[m], batch.source_M[m]
            assert held[layer, source] == batch.expert_M[m]
            place = slot // per_process, int(batch.row_M[m])
            assert place not in waiting, "two rows in one place"
            assert 0 <= place[1] < spare
            waiting[place] = layer, slot, batch.expert_M[m]
            same_rank = slot // per_rank == source // per_rank
            assert (batch.round_M[m] < 0) == same_rank
            if not same_rank:
                for end in (("to", slot // per_rank), ("from", source // per_rank)):
                    assert (*end, batch.round_M[m]) not in busy, "a rank is busy twice in a round"
                    busy.add((*end, batch.round_M[m]))
        # All change over at once, from what all sources were read from.
        for layer, slot, expert in waiting.values():
            held[layer, slot] = expert
        received = [
            set(batch.received_by(p, per_process)) for p in range(old.shape[1] // per_process)
        ]
        assert sum(map(len, received)) == batch.num_rows == len(set().union(*received))
    assert (held[new >= 0] == new[new >= 0]).all()


@given(swaps())
def test_experts_without_a_replica_come_from_the_checkpoint(swap):
    old, new, per_rank, ranks_per_process = swap
    lost = old[0, 0]
    old = np.where(old == lost, -1, old)
    arrivals = find_arrivals(
        old, new, [range(len(old))], slots_per_rank=per_rank,
        slots_per_process=per_rank * ranks_per_process, ranks_per_node=1,
    )  # fmt: skip
    is_lost = arrivals.expert_M == lost
    assert ((arrivals.source_M == CHECKPOINT) == is_lost).all()


def test_a_layer_that_does_not_fit_is_refused_with_what_would_do():
    changed = np.ones((2, 6), bool)
    with pytest.raises(MigrationFailed, match="give spare_rows=3"):
        layer_batches(changed, 3, 2)
    assert layer_batches(changed, 3, 3) == [[[0]], [[1]]]
    assert layer_batches(changed, 3, 6) == [[[0, 1]]]
    assert layer_batches(changed, 3, 6, 5) == [[[0], [1]]]
    assert layer_batches(changed, 3, 6, 6) == [[[0, 1]]]
    assert layer_batches(changed & False, 3, 1, 1) == [[[0, 1]]]
