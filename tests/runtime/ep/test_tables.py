"""Tables on the device: the slots that the shared function gives, for every rank of a process."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import plans

torch = pytest.importorskip("torch")

from eplb.errors import InvalidInput, PlacementInvalid  # noqa: E402
from eplb.replicas import (  # noqa: E402
    choose_slots,
    replica_bounds,
    source_share,
    token_offset,
)
from eplb.runtime.ep.group import EPGroup  # noqa: E402
from eplb.runtime.ep.tables import PlacementTables  # noqa: E402


def group_of(plan, num_processes=1, process=0):
    """A group without processes, for tables of any topology."""
    group = object.__new__(EPGroup)
    group.num_ranks = plan.topology.num_ranks
    group.ranks_per_node = plan.topology.ranks_per_node
    group.ranks_per_process = group.num_ranks // num_processes
    group.first_rank = process * group.ranks_per_process
    group.device = torch.device("cpu")
    return group


@given(
    plans(splits=("even", "nearest", "weighted")),
    st.integers(0, 2**32 - 1),
    st.integers(0, 10_000),
    st.booleans(),
)
def test_slots_are_those_of_the_shared_function(plan, seed, step, alone):
    rng = np.random.default_rng(seed)
    num_ranks = plan.topology.num_ranks
    num_processes = 1 if alone else num_ranks
    process = int(rng.integers(num_processes))
    group = group_of(plan, num_processes, process)
    layer_id = plan.placement.layer_ids[-1]
    tables = PlacementTables.of_plan(plan, layer_id, group)
    topk_TK = rng.integers(-1, plan.model.num_experts, (int(rng.integers(0, 30)), 3))
    slot_TK = tables.choose_slots(torch.from_numpy(topk_TK), step).numpy()
    slots_S = plan.placement.phys_to_log_LS[-1]
    weights = plan.placement.split_weights_LS
    # Tokens belong to the ranks of a process in equal parts.
    source_T = np.arange(len(topk_TK)) * group.ranks_per_process // max(len(topk_TK), 1)
    for source in range(group.ranks_per_process):
        rank = group.first_rank + source
        share_S = source_share(
            slots_S, plan.model.num_experts, plan.topology, plan.split, rank,
            None if weights is None else weights[-1],
        )  # fmt: skip
        expected = choose_slots(
            topk_TK[source_T == source],
            replica_bounds(slots_S, share_S),
            token_offset(rank, layer_id, plan.model.num_experts),
            step,
        )
        assert np.array_equal(slot_TK[source_T == source], expected)


@given(plans(), st.integers(0, 2**32 - 1))
def test_a_batch_is_divided_among_the_replicas_of_its_experts(plan, seed):
    rng = np.random.default_rng(seed)
    group = group_of(plan)
    tables = PlacementTables.of_plan(plan, plan.placement.layer_ids[0], group, split="batch")
    for step in range(3):
        topk_TK = rng.integers(-1, plan.model.num_experts, (int(rng.integers(0, 30)), 3))
        count_E = np.bincount(topk_TK[topk_TK >= 0], minlength=plan.model.num_experts)
        tables.fit_batch(torch.from_numpy(count_E))
        slot_TK = tables.choose_slots(torch.from_numpy(topk_TK), step).numpy()
        slots_S = plan.placement.phys_to_log_LS[0]
        assert (slot_TK[topk_TK < 0] == -1).all()
        assert (slots_S[slot_TK[topk_TK >= 0]] == topk_TK[topk_TK >= 0]).all()
        assert np.array_equal(np.sort(tables.block[0].numpy(), axis=1), tables.block[0].numpy())


@given(plans(splits=("even", "nearest", "weighted")))
def test_tables_are_installed_in_place_and_only_where_they_fit(plan):
    group = group_of(plan)
    first, last = plan.placement.layer_ids[0], plan.placement.layer_ids[-1]
    tables = PlacementTables.of_plan(plan, first, group, split="even").clone()
    other = PlacementTables.of_plan(plan, first, group)
    address = tables.block.data_ptr()
    tables.install(other)
    assert tables.block.data_ptr() == address != other.block.data_ptr()
    assert torch.equal(tables.block, other.block)
    assert tables.split == plan.split
    if last != first:
        with pytest.raises(InvalidInput, match=f"tables of layer {last} .* cannot replace"):
            tables.install(PlacementTables.of_plan(plan, last, group))
    with pytest.raises(PlacementInvalid, match="layer 1000 is not in the plan"):
        PlacementTables.of_plan(plan, 1000, group)
