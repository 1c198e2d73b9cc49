"""The prefill balancer: bounds, brute force, room, ageing, caches, and words for bad input."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb.errors import InvalidInput
from eplb.runtime.requests import PrefillBalancer, PrefillCost, PrefillRequest, RankState
from eplb.runtime.requests.bounds import level_bound
from eplb.runtime.requests.oracle import best_assignment

COST = PrefillCost(token_s=2e-5, pair_s=8e-9, context_s=3e-6, shared_s=3e-5, send_s=9e-5)


def requests_of(prompts, cached=0, arrival=0.0):
    return [
        PrefillRequest(request_id=q, prompt_tokens=n, cached_tokens=cached, arrival_s=arrival)
        for q, n in enumerate(prompts)
    ]


def levels(rank_Q, prompts, ranks):
    """Tokens and attention seconds of each rank, derived anew with plain loops."""
    tokens, work = [r.tokens for r in ranks], [r.work_s for r in ranks]
    for rank, n in zip(rank_Q, prompts, strict=True):
        if rank >= 0:
            tokens[rank] += n
            work[rank] += COST.attention_s(n, 0)
    return np.array(tokens), np.array(work)


prompt_lists = st.lists(st.integers(1, 60_000), min_size=1, max_size=40)


@given(prompts=prompt_lists, num_ranks=st.integers(1, 6), residual=st.integers(0, 50_000),
       emphasis=st.sampled_from([0.0, 0.3, 0.5, 1.0]))  # fmt: skip
def test_every_request_is_assigned_once_and_the_figures_are_right(
    prompts, num_ranks, residual, emphasis
):
    ranks = [RankState(tokens=residual, work_s=residual * 1e-5)]
    ranks += [RankState() for _ in range(num_ranks - 1)]
    balancer = PrefillBalancer(cost=COST, emphasis=emphasis)
    result = balancer.assign(requests_of(prompts), ranks)
    assert ((result.rank_Q >= 0) & (result.rank_Q < num_ranks)).all()
    assert len(result.rank_Q) == len(prompts)
    tokens, work = levels(result.rank_Q, prompts, ranks)
    if emphasis < 1:
        assert result.tokens_max == pytest.approx(tokens.max())
    if emphasis > 0:
        assert result.work_max_s == pytest.approx(work.max())
    assert tokens.max() >= result.tokens_bound * (1 - 1e-9)
    assert work.max() >= result.work_bound_s * (1 - 1e-9)
    assert result.objective >= result.bound * (1 - 1e-9)


@given(prompts=st.lists(st.integers(1, 60_000), min_size=1, max_size=6),
       num_ranks=st.integers(1, 3), residual=st.integers(0, 100_000))  # fmt: skip
def test_no_assignment_is_below_the_bound(prompts, num_ranks, residual):
    ranks = [RankState(tokens=residual, work_s=residual * 3e-5)]
    ranks += [RankState() for _ in range(num_ranks - 1)]
    result = PrefillBalancer(cost=COST).assign(requests_of(prompts), ranks)
    best = min(
        max(
            tokens.max() / result.tokens_bound,
            work.max() / result.work_bound_s,
        )
        for placed in itertools.product(range(num_ranks), repeat=len(prompts))
        for tokens, work in [levels(placed, prompts, ranks)]
    )
    assert result.bound <= best * (1 + 1e-9)
    assert result.objective >= best * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_oracle_agrees_with_the_bound_and_is_hardly_better(seed):
    rng = np.random.default_rng(seed)
    prompts = (rng.pareto(1.5, 18) * 1500 + 20).astype(int).tolist()
    ranks = [RankState() for _ in range(3)]
    result = PrefillBalancer(cost=COST).assign(requests_of(prompts), ranks)
    size = np.array([[n / result.tokens_bound, COST.attention_s(n, 0) / result.work_bound_s]
                     for n in prompts])  # fmt: skip
    best = best_assignment(size, np.zeros((3, 2)), time_limit_s=5)
    assert best.bound >= result.bound - 1e-3
    assert best.objective <= result.objective + 1e-4
    assert result.objective <= 1.08 * best.objective


def test_the_oracle_equals_brute_force():
    rng = np.random.default_rng(5)
    size = rng.uniform(0.1, 1, (6, 2))
    level = np.array([[0.3, 0.0], [0.0, 0.5], [0.0, 0.0]])
    found = []
    for placed in itertools.product(range(3), repeat=6):
        end = level.copy()
        np.add.at(end, list(placed), size)
        if max(np.bincount(placed, minlength=3)) <= 2:
            found.append(end.max())
    best = best_assignment(size, level, max_requests=2)
    assert best.status == "optimal"
    assert best.objective == pytest.approx(min(found), rel=1e-5)


@given(sizes=st.lists(st.floats(0.1, 100), max_size=6), num_ranks=st.integers(1, 3),
       data=st.data())  # fmt: skip
def test_single_bounds_hold_with_residuals_and_speeds(sizes, num_ranks, data):
    level = np.array(data.draw(st.lists(st.floats(0, 50), min_size=num_ranks, max_size=num_ranks)))
    speed = np.array(
        data.draw(st.lists(st.floats(0.25, 2), min_size=num_ranks, max_size=num_ranks))
    )
    best = np.inf
    for placed in itertools.product(range(num_ranks), repeat=len(sizes)):
        end = level.copy()
        np.add.at(end, np.array(placed, int), np.array(sizes))
        best = min(best, (end / speed).max())
    assert level_bound(np.array(sizes), level, speed) <= best * (1 + 1e-9)


@given(prompts=prompt_lists, rooms=st.lists(st.integers(0, 90_000), min_size=1, max_size=5),
       places=st.integers(0, 8))  # fmt: skip
def test_room_is_never_exceeded_and_nobody_waits_who_would_fit(prompts, rooms, places):
    ranks = [RankState(kv_free_tokens=room, free_requests=places) for room in rooms]
    rank_Q = PrefillBalancer(cost=COST).assign(requests_of(prompts), ranks).rank_Q
    for r, room in enumerate(rooms):
        mine = [n for n, rank in zip(prompts, rank_Q, strict=True) if rank == r]
        assert sum(mine) <= room
        assert len(mine) <= places
    if (rank_Q < 0).all():
        assert places == 0 or min(prompts) > max(rooms)


def test_a_prompt_larger_than_any_cache_is_refused_with_the_reason():
    balancer = PrefillBalancer(cost=COST, kv_capacity_tokens=1000)
    result = balancer.assign(requests_of([10, 1001, 20, 30]), [RankState(), RankState()])
    (refused,) = result.refused
    assert refused.request_id == 1
    assert "1001 tokens is larger than the KV cache of a rank (1000 tokens)" in refused.reason
    assert result.rank_Q[1] == -1
    assert (np.delete(result.rank_Q, 1) >= 0).all()


def test_dead_ranks_get_nothing_and_slow_ones_less():
    ranks = [RankState(speed=0.0, tokens=9.0), RankState(speed=0.5), RankState()]
    rank_Q = PrefillBalancer(cost=COST).assign(requests_of([500] * 60), ranks).rank_Q
    counts = np.bincount(rank_Q, minlength=3)
    assert counts[0] == 0
    assert counts.tolist()[1:] == [20, 40]


def test_a_prefix_in_a_cache_draws_a_request_to_its_rank():
    cached = (0, 6000, 0)
    request = PrefillRequest(request_id="a", prompt_tokens=8000, cached_tokens=cached)
    ranks = [RankState(), RankState(tokens=500), RankState()]
    assert PrefillBalancer(cost=COST).assign([request], ranks).rank_Q.tolist() == [1]


@given(seed=st.integers(0, 1000), capacity=st.integers(600, 2000))
def test_the_ageing_bound_holds(seed, capacity):
    """Small requests never stop coming; one of any size is placed within the documented time."""
    rng = np.random.default_rng(seed)
    lasts, max_wait = 3, 4.0
    balancer = PrefillBalancer(cost=COST, max_wait_s=max_wait, kv_capacity_tokens=capacity)
    waiting, running, placed_after = [], [], {}
    for now in range(60):
        waiting += [
            PrefillRequest(request_id=(now, i), prompt_tokens=int(n), arrival_s=float(now))
            for i, n in enumerate(rng.integers(1, capacity + 1, 1 if now % 3 else 4))
        ]
        running = [(q, r, end) for q, r, end in running if end > now]
        ranks = [
            RankState(kv_free_tokens=capacity - sum(q.prompt_tokens for q, r, _ in running
                                                    if r == rank))
            for rank in range(2)
        ]  # fmt: skip
        overdue_ahead = {
            q.request_id: sum(p.arrival_s < q.arrival_s for p in waiting) for q in waiting
        }
        result = balancer.assign(waiting, ranks, now_s=float(now))
        for q, rank in zip(waiting, result.rank_Q.tolist(), strict=True):
            placed_after.setdefault(q.request_id, [overdue_ahead[q.request_id], None])
            if rank >= 0:
                running.append((q, rank, now + lasts))
                placed_after[q.request_id][1] = now - q.arrival_s
        waiting = [q for q, rank in zip(waiting, result.rank_Q, strict=True) if rank < 0]
    for ahead, waited in placed_after.values():
        if waited is not None:
            # Older ones, those that came in the same second, and a second for the clock's step.
            assert waited <= max_wait + (ahead + 4 + 1) * lasts + 1


def test_equal_calls_give_equal_bytes():
    prompts = np.random.default_rng(0).integers(1, 9000, 200).tolist()
    ranks = [RankState() for _ in range(8)]
    first, second = (PrefillBalancer(cost=COST).assign(requests_of(prompts), ranks)
                     for _ in range(2))  # fmt: skip
    assert first.rank_Q.tobytes() == second.rank_Q.tobytes()


def test_a_clock_that_went_back_makes_nobody_overdue():
    requests = requests_of([100, 200], arrival=1e6)
    result = PrefillBalancer(cost=COST, max_wait_s=0.0).assign(requests, [RankState()], now_s=5.0)
    assert (result.rank_Q == 0).all()


def test_no_requests_are_no_work():
    result = PrefillBalancer(cost=COST).assign([], [RankState(tokens=5.0)])
    assert len(result.rank_Q) == 0
    assert result.tokens_max == 5.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PrefillBalancer(cost=COST).assign(requests_of([5]), []), "no rank in service"),
        (lambda: PrefillBalancer(cost=COST).assign(requests_of([5]), [RankState(speed=0.0)]),
         "no rank in service"),
        (lambda: PrefillBalancer(emphasis=1.5), "emphasis must be from 0"),
        (lambda: PrefillBalancer(max_wait_s=float("nan")), "max_wait_s"),
        (lambda: PrefillRequest(request_id=1, prompt_tokens=0), "at least 1"),
        (lambda: PrefillRequest(request_id=1, prompt_tokens=5, cached_tokens=-1), "cached tokens"),
        (lambda: RankState(tokens=-1.0), "must not be negative"),
        (lambda: RankState(speed=-1.0), "speed of a rank"),
        (lambda: PrefillBalancer(cost=COST).assign(
            requests_of([5], cached=(1, 2)), [RankState()]), "for 2 ranks of 1"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


@pytest.mark.parametrize("seed", range(3))
def test_emphasis_on_one_objective_levels_that_one_best(seed):
    prompts = (np.random.default_rng(seed).pareto(1.5, 60) * 2000 + 20).astype(int).tolist()
    ranks = [RankState() for _ in range(8)]
    found = [PrefillBalancer(cost=COST, emphasis=e).assign(requests_of(prompts), ranks).rank_Q
             for e in (0, 1)]  # fmt: skip
    (tokens, _), (_, work) = (levels(rank_Q, prompts, ranks) for rank_Q in found)
    (_, other_work), (other_tokens, _) = (levels(rank_Q, prompts, ranks) for rank_Q in found)
    assert tokens.max() <= other_tokens.max()
    assert work.max() <= other_work.max()
