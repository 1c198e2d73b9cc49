"""The best split of a window, against a linear programme and against all cuts."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from strategies import loads, rows

from eplb.batch_split import batch_max_load, batch_rank_load
from eplb.slots import initial_placement
from eplb.split import slot_share
from eplb.topology import Topology


@st.composite
def split_cases(draw, *, max_ranks: int = 6):
    """(counts_WE, phys_to_log_S, num_ranks); empty slots and replicas on one rank included."""
    num_ranks = draw(st.integers(1, max_ranks))
    slots_per_rank = draw(st.integers(1, 4))
    num_experts = draw(st.integers(1, num_ranks * slots_per_rank))
    topology = Topology(num_nodes=1, ranks_per_node=num_ranks, slots_per_rank=slots_per_rank)
    row = draw(rows(num_experts, topology))
    return draw(loads(draw(st.integers(1, 4)), num_experts)), row, num_ranks


def linear_programme(load_E, row, num_ranks):
    """Least largest rank load: one variable a filled slot, and the load itself."""
    filled = [slot for slot, expert in enumerate(row) if expert >= 0]
    upper = np.zeros((num_ranks, len(filled) + 1))
    equal = np.zeros((len(load_E), len(filled) + 1))
    upper[:, -1] = -1
    for column, slot in enumerate(filled):
        upper[slot * num_ranks // len(row), column] = 1
        equal[row[slot], column] = 1
    cost = [0.0] * len(filled) + [1.0]
    zero = np.zeros(num_ranks)
    return linprog(cost, upper, zero, equal, load_E, bounds=(0, None), method="highs").fun


def worst_cut(load_E, row, num_ranks):
    """Largest over all sets of ranks of the load that cannot leave them, a rank."""
    ranks_of = [
        {slot * num_ranks // len(row) for slot, held in enumerate(row) if held == expert}
        for expert in range(len(load_E))
    ]
    return max(
        sum(load for load, ranks in zip(load_E, ranks_of, strict=True) if ranks <= set(cut)) / size
        for size in range(1, num_ranks + 1)
        for cut in combinations(range(num_ranks), size)
    )


@settings(max_examples=150)
@given(split_cases())
def test_equals_linear_programme_and_worst_cut(case):
    counts_WE, row, num_ranks = case
    best_W = batch_max_load(counts_WE, row, num_ranks)
    for load_E, best in zip(counts_WE, best_W, strict=True):
        assert best == pytest.approx(worst_cut(load_E, row, num_ranks), rel=1e-10)
        scale = load_E.max()
        optimum = linear_programme(load_E / scale, row, num_ranks) * scale
        assert best == pytest.approx(optimum, rel=1e-6)


def test_thousands_of_small_windows_have_no_better_cut():
    random = np.random.default_rng(1)
    for _ in range(150):
        num_ranks, slots_per_rank = random.integers(2, 8), random.integers(1, 4)
        num_slots = num_ranks * slots_per_rank
        num_experts = random.integers(1, num_slots + 1)
        row = np.full(num_slots, -1)
        order = random.permutation(num_slots)
        row[order[:num_experts]] = np.arange(num_experts)
        row[order[num_experts:]] = random.integers(-1, num_experts, num_slots - num_experts)
        counts_WE = random.integers(0, 30, (20, num_experts)) * (
            random.random((20, num_experts)) < 0.8
        )
        expected = [worst_cut(load_E, row, num_ranks) for load_E in counts_WE]
        np.testing.assert_allclose(batch_max_load(counts_WE, row, num_ranks), expected, rtol=1e-10)


@given(split_cases(max_ranks=12))
def test_rank_loads_keep_every_token_and_stay_where_experts_are(case):
    counts_WE, row, num_ranks = case
    rank_load_WR = batch_rank_load(counts_WE, row, num_ranks)
    np.testing.assert_allclose(rank_load_WR.sum(axis=1), counts_WE.sum(axis=1), rtol=1e-9)
    np.testing.assert_array_equal(
        rank_load_WR.max(axis=1), batch_max_load(counts_WE, row, num_ranks)
    )
    held = row.reshape(num_ranks, -1)
    # Between what only this rank holds, and all that it holds.
    for rank in range(num_ranks):
        here = np.unique(held[rank][held[rank] >= 0])
        only = [e for e in here if not (np.delete(held, rank, axis=0) == e).any()]
        most_W = counts_WE[:, here].sum(axis=1)
        assert (rank_load_WR[:, rank] <= most_W * (1 + 1e-9)).all()
        assert (rank_load_WR[:, rank] >= counts_WE[:, only].sum(axis=1) * (1 - 1e-9)).all()


@given(split_cases(max_ranks=12))
def test_never_above_even_split(case):
    counts_WE, row, num_ranks = case
    topology = Topology(num_nodes=1, ranks_per_node=num_ranks, slots_per_rank=len(row) // num_ranks)
    num_experts = counts_WE.shape[1]
    share_S = slot_share(row[np.newaxis], num_experts, topology, "even")[0]
    even_WR = (counts_WE[:, row] * share_S).reshape(len(counts_WE), num_ranks, -1).sum(axis=2)
    best_W = batch_max_load(counts_WE, row, num_ranks)
    assert (best_W <= even_WR.max(axis=1) * (1 + 1e-9)).all()


def test_without_replicas_it_is_the_load_of_the_fullest_rank():
    row = initial_placement([0], 12, 12).phys_to_log_LS[0]
    counts = np.arange(24.0).reshape(2, 12)
    expected = counts.reshape(2, 4, 3).sum(axis=2)
    np.testing.assert_array_equal(batch_rank_load(counts, row, 4), expected)


def test_a_window_without_load_stays_empty():
    row = np.array([0, 1, 1, 2])
    assert batch_max_load(np.zeros((2, 3)), row, 2).tolist() == [0, 0]


def test_a_ring_of_shared_experts_carries_overflow_from_hop_to_hop():
    # Ranks r and r + 1 share expert r. Eight hot neighbours lie on nine ranks and nowhere else;
    # the relaxation alone does not level a chain of that length.
    num_ranks = 64
    row = np.stack([np.arange(num_ranks), np.roll(np.arange(num_ranks), 1)], axis=1).reshape(-1)
    counts = np.ones((1, num_ranks))
    counts[0, :8] = 16.0
    assert batch_max_load(counts, row, num_ranks)[0] == pytest.approx(8 * 16 / 9, rel=1e-12)
