"""Two slots a rank: pairs, their search, their proof, and the bound by prices."""

import numpy as np
import pytest
from exhaustive import single_loads
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import optimal_max_rank_load

from eplb.placement.pair_bound import THOROUGH, pair_bound
from eplb.placement.pairs import counts_within, pair_up, search_pairs, solve_pairs


def largest_pair(load_E, row):
    """Largest rank load, checking the placement on the way."""
    pairs = row.reshape(-1, 2)
    count_E = np.bincount(row[row >= 0], minlength=len(load_E))
    assert (count_E >= 1).all()
    assert not ((pairs[:, 0] == pairs[:, 1]) & (pairs[:, 0] >= 0)).any()
    return max(sum(load_E[e] / count_E[e] for e in pair if e >= 0) for pair in pairs)


@settings(max_examples=40)
@given(st.data())
def test_search_proof_and_bounds_against_brute_force(data):
    num_ranks = data.draw(st.integers(2, 4))
    load_E = data.draw(single_loads(5, 2 * num_ranks))
    best = float(optimal_max_rank_load(load_E.tolist(), num_ranks, 2, distinct_ranks=True))
    found = largest_pair(load_E, search_pairs(load_E, num_ranks, evaluations=200))
    solved = solve_pairs(load_E, num_ranks)
    assert found >= best * (1 - 1e-9)
    assert solved.objective == pytest.approx(largest_pair(load_E, solved.phys_to_log_S))
    assert solved.objective >= best * (1 - 1e-9)
    assert solved.bound <= best * (1 + 1e-9)
    mean = load_E.sum() / num_ranks
    priced = pair_bound(load_E, num_ranks, mean, mean * 4, THOROUGH)
    assert priced <= best * (1 + 1e-9)
    # Within the optimum there are counts.
    counts, _ = counts_within(load_E, num_ranks, best * (1 + 1e-6))
    assert counts is not None
    assert counts.sum() <= 2 * num_ranks


@given(st.data())
def test_any_counts_pair_up_on_distinct_ranks(data):
    num_ranks = data.draw(st.integers(1, 12))
    load_E = data.draw(single_loads(24, 2 * num_ranks))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count_E = np.ones(len(load_E), np.int64)
    for expert in random.integers(0, len(load_E), 2 * num_ranks):
        if count_E[expert] < num_ranks and count_E.sum() < 2 * num_ranks:
            count_E[expert] += 1
    row = pair_up(load_E, count_E, num_ranks)
    largest_pair(load_E, row)
    np.testing.assert_array_equal(np.bincount(row[row >= 0], minlength=len(load_E)), count_E)


def test_more_work_is_never_worse_and_a_seed_gives_one_answer():
    load_E = np.random.default_rng(0).lognormal(0, 0.8, 60)
    short, long, again = (
        search_pairs(load_E, 34, evaluations=n, seed=3) for n in (100, 5000, 5000)
    )
    assert largest_pair(load_E, long) <= largest_pair(load_E, short)
    np.testing.assert_array_equal(long, again)


def test_sixty_experts_are_proven():
    load_E = np.random.default_rng(0).lognormal(0, 0.8, 60)
    load_E *= 34 / load_E.sum()
    solved = solve_pairs(load_E, 34)
    assert solved.bound == pytest.approx(solved.objective, rel=2e-6)
    priced = pair_bound(load_E, 34, 1.0, solved.objective, THOROUGH)
    assert 1 <= priced <= solved.objective
    assert priced >= solved.objective * 0.98


def test_no_time_leaves_what_the_search_found():
    load_E = np.random.default_rng(1).lognormal(0, 0.8, 60)
    solved = solve_pairs(load_E, 34, time_limit_s=0.0, low=1.0)
    assert 0 < solved.bound <= solved.objective
    assert solved.objective == pytest.approx(largest_pair(load_E, solved.phys_to_log_S))


def test_greedy_counts_are_not_the_best_pairs():
    # Greedy minimises the largest replica; where it shares a rank, the largest pair counts.
    load_E = np.array([10.0, 9, 9, 4, 4, 4])
    best = float(optimal_max_rank_load(load_E.tolist(), 4, 2, distinct_ranks=True))
    assert solve_pairs(load_E, 4).objective == pytest.approx(best)
