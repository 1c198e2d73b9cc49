"""Chunk sizes: equal time, level tokens, and progress whatever happens."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb.errors import InvalidInput
from eplb.runtime.requests import ChunkPlanner, PrefillCost
from eplb.runtime.requests.chunks import equal_tokens

COST = PrefillCost(token_s=2e-5, pair_s=8e-9, context_s=3e-6, shared_s=3e-5, send_s=9e-5)


@st.composite
def queues(draw):
    """Requests of some ranks: (remaining, position) of each, rank by rank."""
    one = st.tuples(st.integers(1, 120_000), st.integers(0, 150_000))
    ranks = draw(st.lists(st.lists(one, max_size=6), min_size=1, max_size=6))
    first = np.cumsum([0, *map(len, ranks)])
    flat = [request for rank in ranks for request in rank]
    remaining = np.array([r for r, _ in flat], np.int64)
    position = np.array([p for _, p in flat], np.int64)
    return first, remaining, position


def per_rank(first, values):
    return np.array([values[a:b].sum() for a, b in itertools.pairwise(first)])


@given(queue=queues(), skew=st.sampled_from([1.0, 1.5, 3.0]), least=st.sampled_from([1, 128]))
def test_chunks_are_in_range_and_the_oldest_always_gets_on(queue, skew, least):
    first, remaining, position = queue
    planner = ChunkPlanner(cost=COST, token_skew=skew, least_tokens=least)
    speed = np.ones(len(first) - 1)
    chunk = planner.plan(first, remaining, position, speed)
    assert ((chunk >= 0) & (chunk <= remaining)).all()
    tokens = per_rank(first, chunk)
    floor = planner.budget_tokens / skew
    assert tokens.max() <= max(skew * tokens.mean(), floor) * 1.01 + 2
    for a, b in itertools.pairwise(first):
        if a < b:
            assert chunk[a] >= min(least, remaining[a])


def test_a_deep_prompt_gets_fewer_tokens_than_short_ones_and_the_same_time():
    # Rank 0 works deep in a long prompt and has short ones too; the others have a like mix.
    first = np.arange(0, 20, 5)
    remaining = np.array([30_000, 4000, 4000, 4000, 4000] * 3)
    position = np.array([90_000, 0, 0, 0, 0, 60_000, 0, 0, 0, 0, 30_000, 0, 0, 0, 0])
    chunk = ChunkPlanner(cost=COST).plan(first, remaining, position, np.ones(3))
    time = per_rank(first, np.array([COST.chunk_s(c, p)
                                     for c, p in zip(chunk, position, strict=True)]))  # fmt: skip
    assert time.mean() / time.max() > 0.99
    tokens = per_rank(first, chunk)
    assert tokens.max() / tokens.mean() <= 1.5
    even = equal_tokens(first, remaining, 8192)
    even_s = per_rank(first, np.array([COST.chunk_s(c, p)
                                       for c, p in zip(even, position, strict=True)]))  # fmt: skip
    assert even_s.mean() / even_s.max() < 0.9


def test_sums_of_chunks_cost_the_pairs_of_the_whole_prompt():
    whole = COST.pair_s * (9000 * 9001 / 2)
    at, parts = 0, 0.0
    for size in (1000, 128, 7000, 872):
        parts += COST.attention_s(size, at) - COST.context_s * (at + size)
        at += size
    assert parts == pytest.approx(whole)


def test_dead_ranks_compute_nothing_and_slow_ones_less():
    first = np.array([0, 1, 2, 3])
    chunk = ChunkPlanner(cost=COST).plan(
        first, np.full(3, 50_000), np.full(3, 80_000), np.array([0.0, 0.5, 1.0])
    )
    assert chunk[0] == 0
    assert 0 < chunk[1] < chunk[2]


@given(queue=queues(), budget=st.integers(1, 9000))
def test_equal_tokens_is_first_come_first_served(queue, budget):
    first, remaining, _ = queue
    chunk = equal_tokens(first, remaining, budget)
    for a, b in itertools.pairwise(first):
        assert chunk[a:b].sum() == min(budget, remaining[a:b].sum())
        begun = np.flatnonzero(chunk[a:b] < remaining[a:b])
        if len(begun):
            assert not chunk[a:b][begun[0] + 1 :].any()


def test_no_request_is_no_chunk():
    empty = np.zeros(0, np.int64)
    assert len(ChunkPlanner(cost=COST).plan(np.zeros(3, np.int64), empty, empty, np.ones(2))) == 0


@pytest.mark.parametrize("wrong", [{"budget_tokens": 0}, {"least_tokens": 0}, {"token_skew": 0.9}])
def test_bad_settings_are_named(wrong):
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        ChunkPlanner(cost=COST, **wrong)
