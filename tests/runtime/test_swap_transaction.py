"""The state machine of a swap against random schedules of its processes, without any of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb.runtime.swap import Abort, AbortReason, Action, Stage, Transaction, abort_of

reasons = st.sampled_from(AbortReason)


@given(st.integers(1, 2**30), st.integers(0, 2**20), reasons)
def test_an_abort_comes_through_and_is_below_every_other_word(epoch, process, reason):
    word = Transaction(epoch, (4, 7), 1, 1, reason).word(process)
    assert abort_of(word) == Abort(epoch, process, reason)
    assert -(2**63) <= word < 0 == abort_of_none(Transaction(epoch, (4, 7), 5, 4).word(process))


def abort_of_none(word):
    assert word > 0
    return 0 if abort_of(word) is None else None


@given(st.data())
def test_all_processes_do_the_same_at_the_same_step(data):
    """Each process completes its stages when it likes, and may abort; steps are in common."""
    num = data.draw(st.integers(1, 4))
    batches = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    begins = data.draw(st.lists(st.integers(0, 4), min_size=num, max_size=num))
    aborts = data.draw(st.dictionaries(st.integers(0, num - 1), st.integers(0, 25), max_size=1))
    processes = [Transaction() for _ in range(num)]
    log = [[] for _ in range(num)]
    word_min = 0
    for step in range(90):
        for p in range(num):
            now, action = processes[p].hear(word_min)
            if action is not None:
                log[p].append((step, action, now.batch, now.num_parts_in))
            assert now.hear(word_min) == (now, None), "hearing it again changes nothing"
            if begins[p] == step:
                now = now.begin(batches)
            if now.num_batches and now.reason is None:
                if aborts.get(p) == step:
                    now = now.abort(AbortReason.ASKED)
                elif not now.is_waiting and (step >= 30 or data.draw(st.booleans())):
                    now = now.complete()
            processes[p] = now
        assert len({one.epoch for one in processes}) == 1
        word_min = min(one.word(p) for p, one in enumerate(processes))
    actions = [[action for _, action, *_ in one] for one in log]
    for one in log:
        # Parts go in one after the other, and all are in when the batch is switched.
        parts = [(b, n) for _, action, b, n in one if action is Action.SWITCH]
        assert (
            parts
            == [(b, n + 1) for b, most in enumerate(batches) for n in range(most)][: len(parts)]
        )
    whole = [a for n in batches for a in (Action.MOVE, Action.CHECK, *[Action.SWITCH] * n)]
    if not aborts:
        assert all(one == [*whole, Action.FINISH] for one in actions)
    # Whatever happened, happened everywhere at once; who had not begun had nothing to roll back.
    full = max(log, key=len)
    for one in log:
        assert one == full or not one
    if full and full[-1][1] is Action.ROLL_BACK:
        assert actions[log.index(full)][:-1] == whole[: len(full) - 1]
        assert all(one.stage in {Stage.IDLE, Stage.AGREEING} for one in processes)


def test_words_of_another_epoch_say_nothing():
    one = Transaction(epoch=4).begin([1]).complete()
    late = Transaction(epoch=3, batch_ends=(4,), completed=4, followed=3)
    assert one.hear(late.word(0)) == (one, None)
    assert one.hear(late.abort(AbortReason.CHECKSUM).word(2)) == (one, None)
    assert one.hear(0) == (one, None)
    assert one.hear(one.word(0))[1] is Action.MOVE


@pytest.mark.parametrize("reason", AbortReason)
def test_every_reason_has_words(reason):
    assert reason.text
