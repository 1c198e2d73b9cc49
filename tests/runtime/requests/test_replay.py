"""The replay: nothing is lost or served twice, caps hold, seeds repeat, clones do what they say."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eplb.errors import InvalidInput
from eplb.profiles.request_trace import RequestTrace
from eplb.runtime.requests.compare import Settings, compare, policy_names, replay
from eplb.runtime.requests.decode_ranks import DecodeRanks
from eplb.runtime.requests.disturbances import Disturbances
from eplb.runtime.requests.figures import over_seeds
from eplb.runtime.requests.plots import draw
from eplb.runtime.requests.prefix_cache import PrefixCaches
from eplb.runtime.requests.rules import RULES, RankView, TurnState
from eplb.runtime.requests.workload import Capacity, decode_workload, prefill_workload


def trace_of(count=200, seed=0, blocks=False):
    rng = np.random.default_rng(seed)
    prompt = np.minimum(4000, rng.lognormal(6, 1, count)).astype(int) + 1
    families = rng.integers(0, 8, count)
    per = [
        [int(f) * 1000 + b for b in range(n // 64)] for f, n in zip(families, prompt, strict=True)
    ]
    return RequestTrace(
        arrival_s_Q=np.cumsum(rng.exponential(0.1, count)),
        prompt_tokens_Q=prompt,
        output_tokens_Q=rng.integers(1, 200, count),
        first_block_Q=np.cumsum([0, *map(len, per)]) if blocks else np.zeros(0, np.int64),
        block_B=np.array([b for row in per for b in row], np.int64) if blocks else [],
        block_tokens=64,
    )


SMALL = {"num_ranks": 4, "kv_tokens": 20_000, "max_requests": 12}


@pytest.mark.parametrize("policy", policy_names("decode"))
def test_decode_serves_every_request_once_within_the_caps(policy):
    run = replay(trace_of(), Settings(phase="decode", **SMALL), policy, seed=1)
    log = run.log
    assert log.kv_TR.max() <= SMALL["kv_tokens"]
    assert log.requests_TR.max() <= SMALL["max_requests"]
    began, ended = log.first_step_Q >= 0, log.last_step_Q >= 0
    assert (began | ~ended).all()
    if not log.retractions:
        lasted = log.last_step_Q - log.first_step_Q + 1
        warm = log.first_step_Q == 0
        assert (lasted[ended & ~warm] == log.output_tokens_Q[ended & ~warm]).all()
    # Requests of each step, counted from when they began and ended.
    steps = np.arange(len(log.kv_TR))
    if not log.retractions:
        last = np.where(ended, log.last_step_Q, len(steps))
        alive = ((log.first_step_Q[began, None] <= steps) & (last[began, None] >= steps)).sum(0)
        assert (alive == log.requests_TR.sum(axis=1)).all()
    # Who had to arrive by then did begin or waits for room.
    assert run.figures["kv_imbalance_mean"] >= 1
    assert 0 < run.figures["step_balance"] <= 1


@pytest.mark.parametrize("policy", policy_names("prefill"))
@pytest.mark.parametrize("blocks", [False, True])
def test_prefill_computes_every_token_once(policy, blocks):
    trace = trace_of(blocks=blocks)
    run = replay(trace, Settings(phase="prefill", **SMALL, budget_tokens=1024), policy, seed=2)
    log, figures = run.log, run.figures
    assert (log.tokens_TR >= 0).all()
    assert log.tokens_TR.sum() <= log.served_T.sum() * (1 + 1e-9)
    assert 0 < figures["step_balance"] <= 1 + 1e-12
    assert (figures["cached_part"] > 0) == blocks
    if policy in RULES or policy == "eplb-token-budget":
        assert log.tokens_TR.max() <= 1024
    assert (log.wait_s_Q > 0).all()


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("policy", ["eplb", "random", "power-of-two"])
def test_the_same_seed_gives_the_same_bytes(phase, policy):
    settings_ = Settings(phase=phase, **SMALL)
    runs = [replay(trace_of(), settings_, policy, seed=s) for s in (3, 3, 4)]
    assert json.dumps(runs[0].figures) == json.dumps(runs[1].figures)
    assert json.dumps(runs[0].figures) != json.dumps(runs[2].figures)


def test_ours_beats_the_rules_on_both_objectives():
    trace = trace_of(600, seed=5)
    settings_ = Settings(phase="decode", num_ranks=16, kv_tokens=60_000, max_requests=40)
    report = compare(trace, settings_, ["eplb", "join-shortest-queue", "least-kv"], [0])
    ours, counts, kv = report["policies"].values()
    assert ours["kv_imbalance_mean"] < counts["kv_imbalance_mean"]
    assert ours["requests_imbalance_mean"] < kv["requests_imbalance_mean"]
    assert ours["tokens_per_s"] > max(counts["tokens_per_s"], kv["tokens_per_s"])


def test_equal_time_chunks_beat_token_budgets_on_long_prompts():
    rng = np.random.default_rng(0)
    long = RequestTrace(
        arrival_s_Q=np.arange(150.0),
        prompt_tokens_Q=(rng.pareto(1.2, 150) * 4000).astype(int).clip(50, 120_000),
        output_tokens_Q=np.ones(150, int),
    )
    report = compare(long, Settings(phase="prefill", num_ranks=8),
                     ["eplb", "eplb-token-budget", "least-tokens"], [0])  # fmt: skip
    ours, budget, peer = (figures["step_balance"] for figures in report["policies"].values())
    assert ours > 1.3 * max(budget, peer)


@pytest.mark.parametrize(
    "upset",
    [
        Disturbances(abort_part=0.3),
        Disturbances(lost_rank=1, lost_step=250),
        Disturbances(slow_rank=2, slow_speed=0.5),
        Disturbances(feedback_steps=5),
    ],
)
@pytest.mark.parametrize("policy", ["eplb", "vllm"])
def test_decode_goes_on_whatever_goes_wrong(policy, upset):
    settings_ = Settings(phase="decode", **SMALL, utilisation=0.6, disturbances=upset)
    log = replay(trace_of(), settings_, policy).log
    assert log.requests_TR[-1].sum() > 0
    assert log.kv_TR.max() <= SMALL["kv_tokens"]
    if upset.lost_rank is not None:
        assert not log.requests_TR[251:, 1].any()
        assert log.requests_TR[249, 1] > 0
        assert log.requests_TR[-1].sum() > 0.5 * log.requests_TR[240].sum()
    if upset.slow_rank is not None and policy == "eplb":
        assert log.requests_TR[300:, 2].mean() < 0.7 * log.requests_TR[300:, 0].mean()


def test_a_lost_prefill_rank_gives_its_requests_back():
    upset = Disturbances(lost_rank=1, lost_step=5)
    for policy in ("eplb", "least-tokens"):
        settings_ = Settings(phase="prefill", **SMALL, budget_tokens=512, disturbances=upset)
        log = replay(trace_of(), settings_, policy).log
        assert log.tokens_TR[4, 1] > 0
        assert not log.tokens_TR[5:, 1].any()
        assert len(log.wait_s_Q) > 100


def test_a_rank_out_of_memory_puts_the_newest_back():
    ranks = DecodeRanks(1, 4, 100, np.array([40, 30]), np.array([50, 50]))
    ranks.send(np.array([0]), np.array([0]))
    ranks.admit(0)
    ranks.advance(0)
    ranks.send(np.array([1]), np.array([0]))
    ranks.admit(1)
    retracted = np.zeros(0)
    step = 1
    while not len(retracted):
        _, retracted = ranks.advance(step)
        step += 1
        assert ranks.kv_R[0] <= 100
    assert retracted.tolist() == [1]
    assert ranks.done_Q[1] == step - 1
    assert ranks.kv_R[0] == 40 + step


def view(requests, kv=None, waiting=None, tokens=None):
    count = len(requests)
    zeros = np.zeros(count)
    return RankView(
        requests_R=np.array(requests),
        waiting_R=np.array(waiting if waiting is not None else zeros, np.int64),
        tokens_R=np.array(tokens if tokens is not None else zeros, float),
        kv_R=np.array(kv if kv is not None else zeros, float),
        kv_capacity=1000.0,
        alive_R=np.ones(count, bool),
    )


def chosen(name, seen, sizes, times=None, cached=None):
    sizes = np.array(sizes)
    times = np.zeros(len(sizes)) if times is None else np.array(times)
    cached = np.zeros((len(sizes), 1), np.int64) if cached is None else np.array(cached)
    state = TurnState(len(seen.requests_R), 0)
    return RULES[name].choose(seen, state, times, sizes, sizes, cached).tolist()


def test_rules_score_as_documented():
    assert chosen("round-robin", view([5, 0, 0]), [1, 1, 1, 1]) == [0, 1, 2, 0]
    assert chosen("join-shortest-queue", view([2, 0, 1]), [1, 1, 1, 1]) == [1, 1, 2, 0]
    assert chosen("least-kv", view([0, 9], kv=[50, 10]), [30, 30]) == [1, 1]
    assert chosen("least-tokens", view([0, 0], tokens=[50, 10]), [41, 1]) == [1, 0]
    # Counts decide, until something waits on a rank more than half full.
    assert chosen("vllm", view([3, 2], kv=[0, 900]), [1]) == [1]
    assert chosen("vllm", view([3, 2], kv=[0, 900], waiting=[0, 1]), [1]) == [0]
    # Longest first, fewest prompt tokens, no rank above the expected count.
    assert chosen("tensorrt-llm", view([1, 1], tokens=[100, 0]), [10, 70]) == [0, 1]
    assert chosen("dynamo", view([0, 0], kv=[100, 60]), [50], cached=[[50, 0]]) == [0]
    assert chosen("cache-aware", view([9, 0]), [100], cached=[[40, 0]]) == [0]
    assert chosen("cache-aware", view([90, 0]), [100], cached=[[40, 0]]) == [1]
    assert set(chosen("random", view([0] * 4), [1] * 50)) == {0, 1, 2, 3}
    assert chosen("power-of-two", view([100, 0]), [1] * 20).count(1) > 10


def test_reports_of_sglang_overwrite_what_it_counted_itself():
    # Two requests within a report's 20 ms go to two ranks; the report then forgets the first.
    seen = view([0, 0, 5])
    assert chosen("sglang-total-requests", seen, [1, 1], times=[0.001, 0.002]) == [0, 1]
    assert chosen("sglang-total-requests", seen, [1, 1], times=[0.001, 0.022]) == [0, 0]
    assert chosen("join-shortest-queue", seen, [1, 1], times=[0.001, 0.022]) == [0, 1]


@given(lookups=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 6)),
                        max_size=30), capacity=st.integers(1, 12))  # fmt: skip
def test_prefix_caches_equal_plain_lists(lookups, capacity):
    caches = PrefixCaches(3, capacity)
    plain = [[] for _ in range(3)]
    for rank, family, depth in lookups:
        blocks = [family * 100 + d for d in range(depth)]
        found = caches.cached_blocks_R(blocks)
        for r in range(3):
            hit = 0
            while hit < depth and blocks[hit] in plain[r]:
                hit += 1
            assert found[r] == hit
        caches.add(rank, blocks)
        for block in reversed(blocks):
            if block in plain[rank]:
                plain[rank].remove(block)
            plain[rank].append(block)
        del plain[rank][: max(0, len(plain[rank]) - capacity)]


def test_a_shared_cache_is_seen_by_all_ranks():
    caches = PrefixCaches(3, 10, shared=True)
    caches.add(1, [7, 8])
    assert caches.cached_blocks_R([7, 8, 9]).tolist() == [2, 2, 2]


@settings(max_examples=20)
@given(seed=st.integers(0, 100), utilisation=st.sampled_from([0.5, 0.8, 1.1]))
def test_a_decode_workload_has_the_asked_for_load(seed, utilisation):
    trace = trace_of(300, seed=7)
    capacity = Capacity(num_ranks=8, kv_tokens=50_000, max_requests=64, utilisation=utilisation)
    work = decode_workload(trace, capacity, num_steps=2000, seed=seed)
    arrived = work.arrival_Q[work.num_warm :]
    assert (np.diff(arrived) >= 0).all()
    residents = len(arrived) / 2000 * work.output_tokens_Q[work.num_warm :].mean()
    assert residents == pytest.approx(work.num_warm, rel=0.1)
    assert (work.done_warm_Q < work.output_tokens_Q[: work.num_warm]).all()


def test_a_prefill_workload_repeats_the_trace_in_order():
    work = prefill_workload(trace_of(10), num_requests=25, seed=0)
    assert (np.diff(work.trace_Q) % 10 == 1).all()
    assert len(work.trace_Q) == 25
    assert work.copy_Q.max() >= 2


def test_intervals_shrink_with_agreement():
    same = over_seeds([{"step_balance": 0.5}] * 5)
    assert same == {"step_balance": 0.5, "step_balance_ci95": 0.0}
    assert over_seeds([{"step_balance": 0.4}, {"step_balance": 0.6}])["step_balance_ci95"] > 0.5


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_pictures(phase):
    pytest.importorskip("matplotlib")
    settings_ = Settings(phase=phase, **SMALL)
    run = replay(trace_of(), settings_, "eplb")
    assert draw(run, settings_, "png").startswith(b"\x89PNG")
    assert b"<svg" in draw(run, settings_, "svg")
    with pytest.raises(InvalidInput, match="pictures are"):
        draw(run, settings_, "bmp")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Settings(phase="train", num_ranks=1), "unknown phase"),
        (lambda: Settings(phase="decode", num_ranks=0), "num_ranks must be at least 1"),
        (lambda: Settings(phase="decode", num_ranks=1, utilisation=0), "utilisation"),
        (lambda: Settings(phase="decode", num_ranks=2, disturbances=Disturbances(lost_rank=2)),
         "not one of 0 to 1"),
        (lambda: Settings(phase="prefill", num_ranks=2, disturbances=Disturbances(abort_part=0.5)),
         "decode only"),
        (lambda: Settings(phase="prefill", num_ranks=2, cache="disk"), "unknown cache"),
        (lambda: replay(trace_of(), Settings(phase="decode", num_ranks=2), "epbl"), "did you mean"),
        (lambda: compare(trace_of(), Settings(phase="decode", num_ranks=2), [], [0]), "at least"),
        (lambda: replay(trace_of(), Settings(phase="decode", num_ranks=2, kv_tokens=5), "eplb"),
         "raise --kv-tokens"),
        (lambda: replay(trace_of(), Settings(phase="prefill", num_ranks=2, kv_tokens=5), "eplb"),
         "raise --kv-tokens"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


@given(rows=st.lists(st.tuples(st.floats(0, 100), st.integers(1, 30_000), st.integers(1, 300)),
                     min_size=1, max_size=6), phase=st.sampled_from(["decode", "prefill"]),
       ranks=st.integers(1, 3))  # fmt: skip
@example(rows=[(1.1e-308, 1, 1)], phase="decode", ranks=1)
@settings(max_examples=25, deadline=None)
def test_any_small_trace_is_replayed_or_refused_in_a_line(rows, phase, ranks):
    arrival, prompt, output = zip(*rows, strict=True)
    trace = RequestTrace(
        arrival_s_Q=np.sort(arrival), prompt_tokens_Q=prompt, output_tokens_Q=output
    )
    settings_ = Settings(phase=phase, num_ranks=ranks, kv_tokens=25_000, max_requests=3)
    for policy in ("eplb", "vllm"):
        try:
            figures = replay(trace, settings_, policy).figures
        except InvalidInput as error:
            figures = {"refused": len(str(error).splitlines())}
            assert figures["refused"] == 1
            continue
        assert all(np.isfinite(value) for value in figures.values())
