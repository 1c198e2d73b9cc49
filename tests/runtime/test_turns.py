"""A thread beside serving leaves Python's lock to it most of the time."""

from __future__ import annotations

import pytest

from eplb.runtime import turns


class Clock:
    """A thread's time, and what it has slept."""

    def __init__(self):
        self.worked_s, self.slept = 0.0, []

    def thread_time(self):
        return self.worked_s

    def sleep(self, seconds):
        self.slept.append(seconds)


def test_each_piece_is_followed_by_a_rest_in_proportion(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    thread = turns.Turns()

    def pieces():
        for worked_s in (0.001, 0.004, 10.0):
            clock.worked_s += worked_s
            yield worked_s

    assert list(thread.between(pieces())) == [0.001, 0.004, 10.0]
    clock.worked_s += 0.002
    thread.rest()
    share = turns.RESTS_PER_WORK
    assert clock.slept == pytest.approx(
        [0.001 * share, 0.004 * share, turns.MOST_REST_S, 0.002 * share]
    )
