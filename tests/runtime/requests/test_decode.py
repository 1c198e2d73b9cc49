"""The decode balancer: caps, bands, ageing, acknowledgements, dead ranks, swaps, bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from eplb.errors import InvalidInput
from eplb.runtime.requests import (
    DecodeBalancer,
    DecodeOptions,
    DecodeRequest,
    GuardedDecodeBalancer,
    decode_cost,
)
from eplb.runtime.requests.oracle import best_assignment

RANKS, CAPACITY, MOST = 4, 2000, 5
OPTIONS = DecodeOptions(reserve_tokens=10, max_wait_steps=3, exposed=0.0)


def arrivals(*kv, start=0):
    return [DecodeRequest(request_id=start + i, kv_tokens=n) for i, n in enumerate(kv)]


def balancer(ranks=RANKS, **options):
    return DecodeBalancer(
        ranks, kv_capacity_tokens=CAPACITY, max_requests=MOST, cost=decode_cost(),
        options=DecodeOptions(**{"reserve_tokens": 10, "max_wait_steps": 3, "exposed": 0.0,
                                 **options}),
    )  # fmt: skip


class Life(RuleBasedStateMachine):
    """Whatever is done to a balancer, its account equals a plain one kept beside it."""

    def __init__(self):
        super().__init__()
        self.balancer = balancer()
        self.running = {}
        self.waiting = {}
        self.dead = set()
        self.next_id = 0

    @rule(sizes=st.lists(st.integers(1, CAPACITY + 50), max_size=6))
    def place(self, sizes):
        requests = arrivals(*sizes, start=self.next_id)
        self.next_id += len(sizes)
        before = {r: self.load(r) for r in range(RANKS)}
        placed, refused = self.balancer.place(requests)
        self.waiting |= {q.request_id: q.kv_tokens for q in requests}
        for one in refused:
            assert self.waiting.pop(one.request_id) > CAPACITY - 10
            assert "larger than that of any rank" in one.reason
        for one in placed:
            assert one.rank not in self.dead
            self.running[one.request_id] = [one.rank, self.waiting.pop(one.request_id)]
        for rank in {one.rank for one in placed}:
            count, kv = self.load(rank)
            assert count <= MOST
            assert kv + 10 * count <= CAPACITY
            assert count > before[rank][0]

    @rule(data=st.data())
    @precondition(lambda self: self.running or self.waiting)
    def finish(self, data):
        one = data.draw(st.sampled_from(sorted([*self.running, *self.waiting])))
        self.balancer.finished(one)
        self.running.pop(one, None)
        self.waiting.pop(one, None)
        with pytest.raises(InvalidInput, match="is not known"):
            self.balancer.finished(one)

    @rule(steps=st.integers(0, 3))
    def advance(self, steps):
        self.balancer.advance(steps)
        for request in self.running.values():
            request[1] += steps

    @rule()
    def swap(self):
        counts = self.balancer.num_requests_R.copy()
        for one in self.balancer.plan_swaps():
            assert self.running[one.high_id][0] == one.high_rank
            assert self.running[one.low_id][0] == one.low_rank
            moved = self.running[one.high_id][1] + self.running[one.low_id][1]
            assert one.kv_tokens == moved
            assert self.balancer.swapped(one)
            self.running[one.high_id][0], self.running[one.low_id][0] = one.low_rank, one.high_rank
        assert (self.balancer.num_requests_R == counts).all()

    @rule(rank=st.integers(0, RANKS - 1))
    @precondition(lambda self: len(self.dead) < RANKS - 1)
    def lose(self, rank):
        lost = self.balancer.set_speed(rank, 0.0)
        mine = {i for i, (at, _) in self.running.items() if at == rank}
        assert set(lost) == mine
        for one in mine:
            del self.running[one]
        self.dead.add(rank)

    @rule(data=st.data())
    @precondition(lambda self: self.dead)
    def revive(self, data):
        rank = data.draw(st.sampled_from(sorted(self.dead)))
        self.balancer.set_speed(rank, 1.0)
        self.dead.remove(rank)

    def load(self, rank):
        mine = [kv for at, kv in self.running.values() if at == rank]
        return len(mine), sum(mine)

    @invariant()
    def accounts_agree(self):
        for rank in range(RANKS):
            count, kv = self.load(rank)
            assert self.balancer.num_requests_R[rank] == count
            assert self.balancer.kv_tokens_R[rank] == kv
        assert set(self.balancer.waiting) == set(self.waiting)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_counts_stay_in_the_band(sizes):
    one = balancer(ranks=3, count_slack=0.0)
    one.place(arrivals(*sizes[:15]))
    counts = one.num_requests_R
    assert counts.max() <= -(-counts.sum() // 3)


def test_arrivals_of_a_step_go_largest_first_to_the_rank_with_least_kv():
    one = balancer(ranks=2, count_slack=0.0)
    placed, _ = one.place(arrivals(100, 400, 300, 200))
    rank = {p.request_id: p.rank for p in placed}
    assert rank[1] == rank[0] != rank[2] == rank[3]
    assert one.kv_tokens_R.tolist() == [500, 500]


@pytest.mark.parametrize("seed", range(3))
def test_one_step_of_arrivals_is_near_the_oracle(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 400, 12).tolist()
    one = balancer(ranks=3, count_slack=0.0)
    one.place(arrivals(*sizes))
    best = best_assignment(np.array(sizes, float)[:, None], np.zeros((3, 1)), max_requests=4,
                           time_limit_s=5)  # fmt: skip
    assert best.objective <= one.kv_tokens_R.max() <= 1.1 * best.objective


def test_what_waits_is_placed_when_there_is_room_and_in_time():
    """Small requests keep coming; a large one gets in within the documented time all the same."""
    one = balancer(ranks=2)
    lasts, ends, step, large = 4, {}, 0, "large"
    one.place([DecodeRequest(request_id=("first", i), kv_tokens=450) for i in range(8)])
    ends = dict.fromkeys([("first", i) for i in range(8)], lasts)
    one.place([DecodeRequest(request_id=large, kv_tokens=1900)])
    assert one.waiting == (large,)
    while large in one.waiting:
        step += 1
        one.advance()
        for request_id in [i for i, end in ends.items() if end <= step]:
            one.finished(request_id)
            del ends[request_id]
        placed, _ = one.place(
            [DecodeRequest(request_id=(step, i), kv_tokens=200) for i in range(3)]
        )
        ends |= {p.request_id: step + lasts for p in placed}
        assert step <= 3 + lasts + 1


def test_stale_reports_overwrite_nothing():
    one = balancer(ranks=1)
    first, _ = one.place(arrivals(100))
    second, _ = one.place(arrivals(200, start=1))
    # The rank had not got the second one when it wrote this.
    assert one.report(0, sequence=first[0].sequence, kv_tokens=130, num_requests=1)
    assert one.kv_tokens_R[0] == 330
    assert one.num_requests_R[0] == 2
    assert one.report(0, sequence=second[0].sequence, kv_tokens=300, num_requests=2)
    assert one.kv_tokens_R[0] == 300
    # A late one of before is told by its sequence number.
    assert not one.report(0, sequence=first[0].sequence, kv_tokens=0, num_requests=0)
    assert one.kv_tokens_R[0] == 300


def test_a_slow_rank_gets_its_part():
    one = DecodeBalancer(2, kv_capacity_tokens=10**6, max_requests=100)
    one.set_speed(0, 0.5)
    one.place(arrivals(*[100] * 30))
    assert one.num_requests_R.tolist() == [10, 20]


def test_swaps_level_kv_keep_counts_and_are_worth_it():
    one = balancer(ranks=2, count_slack=1.0)
    one.place(arrivals(700, 100))
    one.place(arrivals(600, 90, start=2))
    for i in (0, 1, 2, 3):
        one.finished(i)
    # Put a full and a light rank there by hand: two large on one rank, two small on the other.
    one.place(arrivals(500, start=10))
    one.place(arrivals(100, start=11))
    one.place(arrivals(110, start=12))
    one.place(arrivals(490, start=13))
    before = one.kv_tokens_R.copy()
    swaps = one.plan_swaps()
    for swap in swaps:
        assert one.swapped(swap)
    assert one.kv_tokens_R.max() <= before.max()
    assert one.kv_tokens_R.sum() == before.sum()
    dear = balancer(ranks=2, exposed=1e9)
    dear.place(arrivals(700, 690, 10, 5))
    dear.finished(1)
    dear.finished(3)
    assert dear.plan_swaps() == ()


def test_a_swap_whose_request_has_ended_is_dropped():
    one = balancer(ranks=2, count_slack=1.0, kv_band=0.0)
    one.place(arrivals(900, 880, 300, 290))
    left = {i: r for r in range(2) for i in range(4) if i in one._ids[r]}
    for i in (0, 1):
        one.finished(next(k for k, r in left.items() if r == i))
    one.place(arrivals(50, 700, start=20))
    for swap in one.plan_swaps():
        one.finished(swap.high_id)
        assert not one.swapped(swap)
    assert one.num_requests_R.sum() == len(one._place_of)


def test_same_calls_give_the_same_answers():
    def life():
        rng = np.random.default_rng(3)
        one = balancer(ranks=3)
        out = []
        for step in range(30):
            placed, _ = one.place(arrivals(*rng.integers(10, 400, 3).tolist(), start=3 * step))
            out += placed
            for i in (3 * step - 9, 3 * step - 8):
                if i in one._place_of:
                    one.finished(i)
            one.advance()
            out += [s for s in one.plan_swaps() if one.swapped(s)]
        return out

    assert life() == life()


def test_many_threads_lose_nothing():
    from concurrent.futures import ThreadPoolExecutor

    one = GuardedDecodeBalancer(4, kv_capacity_tokens=10**6, max_requests=1000)

    def client(k):
        for i in range(50):
            one.place([DecodeRequest(request_id=(k, i), kv_tokens=10)])
            if i % 2:
                one.finished((k, i))
            one.report(k % 4, sequence=0, kv_tokens=0, num_requests=0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))
    assert sum(len(ids) for ids in one._ids) == 8 * 25
    assert len(one._place_of) == 8 * 25


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: DecodeBalancer(0, kv_capacity_tokens=1, max_requests=1), "num_ranks"),
        (lambda: DecodeBalancer(1, kv_capacity_tokens=0, max_requests=1), "kv_capacity_tokens"),
        (lambda: DecodeRequest(request_id=1, kv_tokens=0), "at least 1"),
        (lambda: balancer().finished("x"), "is not known"),
        (lambda: balancer().place(arrivals(5, 5) + arrivals(5)), "placed before"),
        (lambda: balancer().advance(-1), "must not go back"),
        (lambda: balancer().report(9, sequence=0, kv_tokens=0, num_requests=0), "not one of 0"),
        (lambda: balancer().report(0, sequence=1, kv_tokens=0, num_requests=0), "given out"),
        (lambda: balancer().set_speed(0, float("nan")), "speed of rank 0"),
        (lambda: DecodeOptions(count_slack=-1), "count_slack"),
        (lambda: DecodeOptions(link_bytes_per_s=0), "link_bytes_per_s"),
    ],
)
def test_bad_input_is_named(act, words):
    with pytest.raises(InvalidInput, match=words):
        act()


def test_all_ranks_dead_is_waiting_not_an_error():
    one = balancer(ranks=2)
    one.set_speed(0, 0.0)
    one.set_speed(1, 0.0)
    placed, refused = one.place(arrivals(5))
    assert (placed, refused) == ((), ())
    assert one.waiting == (0,)
