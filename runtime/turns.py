"""Python's lock, shared with the thread that serves.

A thread that computes in Python gives the lock to one that asks for it after 5 ms only, and the
serving thread asks anew for each operation that it launches: a tenth of a second of such work can
hold up serving for as long. So it is done in pieces of about a millisecond, each followed by a rest
in which serving has the lock to itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["Turns"]

# Work then takes the lock for a tenth of the time.
RESTS_PER_WORK = 9
# What takes long takes so once: a first call, which loads or connects.
MOST_REST_S = 0.05

T = TypeVar("T")


class Turns:
    """Rests of a thread, each in proportion to what the thread has worked since the one before."""

    def __init__(self) -> None:
        self._since_s = time.thread_time()

    def rest(self) -> None:
        """Sleep for the work since the last rest."""
        worked_s = time.thread_time() - self._since_s
        time.sleep(min(worked_s * RESTS_PER_WORK, MOST_REST_S))
        self._since_s = time.thread_time()

    def between(self, pieces: Iterable[T]) -> Iterator[T]:
        """Give the pieces as they are worked out, with a rest behind each."""
        for piece in pieces:
            self.rest()
            yield piece
