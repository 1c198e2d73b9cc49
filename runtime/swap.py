"""The transaction of a hot swap: what is announced, what is agreed, and what follows from it.

Every process announces in one word how far it has come; the words travel with the counts of the
layers' dispatch, and of each forward all processes learn the same minimum. What all have completed
is acted upon, at the same step everywhere, without any vote on the host. An abort is a word below
all others, so one process is enough to have all of them roll back, again at one step.

A swap goes batch by batch, since spare rows are few. For each batch all processes

1. *move* its rows into spare rows while the old placement serves;
2. *check* what has arrived, when all have moved;
3. *switch*, when all have checked: put rows and tables of the batch in force part by part, a part
   at a step, and check again when all parts are in;
4. free the displaced rows and go on with the next batch, when all have switched.

This module is pure: no device, thread or clock. What it orders is done by
:mod:`eplb.runtime.batch_work`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from itertools import accumulate

__all__ = ["Abort", "AbortReason", "Action", "Stage", "Transaction", "abort_of", "epoch_of"]

# A word is epoch << 32 | progress, or -(epoch << 32 | process << 8 | reason) for an abort. An epoch
# is what is between two ends of swaps; words of another epoch say nothing.
_EPOCH_SHIFT = 32
_PROGRESS_MASK = (1 << _EPOCH_SHIFT) - 1
_PROCESS_SHIFT = 8
_REASON_MASK = (1 << _PROCESS_SHIFT) - 1
# Progress: 1 is "agreed to this plan", then for each batch 1 for "moved", 1 for "checked" and 1 for
# each of its parts that is in force.
_AGREED = 1
_BEFORE_PARTS = 2


class AbortReason(IntEnum):
    """Why a process rolls a swap back; small numbers that travel in a word."""

    DEADLINE = 1
    CHECKSUM = 2
    MEMORY = 3
    TRANSFER = 4
    ASKED = 5
    PLANS = 6
    PREPARING = 7

    @property
    def text(self) -> str:
        """What is said of it in an error."""
        return _REASON_TEXT[self]


_REASON_TEXT = {
    AbortReason.DEADLINE: "the deadline passed",
    AbortReason.CHECKSUM: "weights arrived with a wrong checksum",
    AbortReason.MEMORY: "memory ran out",
    AbortReason.TRANSFER: "a transfer failed",
    AbortReason.ASKED: "abort() was called",
    AbortReason.PLANS: "processes do not hold the same plan",
    AbortReason.PREPARING: "it could not be prepared",
}


class Stage(Enum):
    """What a process is at."""

    IDLE = "idle"
    AGREEING = "agreeing"
    MOVING = "moving"
    CHECKING = "checking"
    SWITCHING = "switching"
    SWITCHED = "switched"


class Action(Enum):
    """What a process has to do now, as all do at this step."""

    MOVE = "move the rows of the present batch"
    CHECK = "check what has arrived"
    SWITCH = "put the next part of the present batch in force"
    FINISH = "all is in force"
    ROLL_BACK = "put the old placement of the present batch back in force"


@dataclass(frozen=True, slots=True)
class Abort:
    """Which process wanted the swap of an epoch rolled back, and why."""

    epoch: int
    process: int
    reason: AbortReason


def epoch_of(word: int) -> int:
    """Return the epoch that a word is of."""
    return abs(word) >> _EPOCH_SHIFT


def abort_of(word: int) -> Abort | None:
    """Return the abort that a word stands for, if it does."""
    if word >= 0:
        return None
    reason = -word & _REASON_MASK
    process = (-word >> _PROCESS_SHIFT) & (_PROGRESS_MASK >> _PROCESS_SHIFT)
    known = reason in AbortReason.__members__.values()
    return Abort(
        -word >> _EPOCH_SHIFT, process, AbortReason(reason) if known else AbortReason.TRANSFER
    )


@dataclass(frozen=True, slots=True)
class Transaction:
    """How far one process is with a swap.

    Parameters
    ----------
    epoch : int
        Equal on all processes at each step.
    batch_ends : tuple of int
        Progress with which each batch of the swap under way ends; empty where there is none.
    completed : int
        Progress that this process has made and announces.
    followed : int
        Progress that all have made and on which this process has acted.
    reason : AbortReason, optional
        Set where this process wants to roll back and all have not yet heard of it.
    """

    epoch: int = 1
    batch_ends: tuple[int, ...] = ()
    completed: int = 0
    followed: int = 0
    reason: AbortReason | None = None

    @property
    def num_batches(self) -> int:
        """Batches of the swap under way; 0 where there is none."""
        return len(self.batch_ends)

    @property
    def batch(self) -> int:
        """The present batch."""
        return bisect_right(self.batch_ends, self.followed)

    @property
    def num_parts_in(self) -> int:
        """Parts of the present batch that are in force."""
        return max(self._in_batch - _BEFORE_PARTS + 1, 0)

    @property
    def stage(self) -> Stage:
        """What this process is at."""
        if not self.batch_ends:
            return Stage.IDLE
        if self.followed < _AGREED:
            return Stage.AGREEING
        if self._in_batch < _BEFORE_PARTS:
            return (Stage.MOVING, Stage.CHECKING)[self._in_batch]
        is_last = self.followed + 1 == self.batch_ends[self.batch]
        return Stage.SWITCHED if is_last else Stage.SWITCHING

    @property
    def is_waiting(self) -> bool:
        """Whether this process is done with its stage and waits for the others."""
        return self.completed > self.followed

    def word(self, process: int) -> int:
        """Return the word to be sent with the next forward."""
        if self.reason is not None:
            return -(self.epoch << _EPOCH_SHIFT | process << _PROCESS_SHIFT | self.reason)
        return self.epoch << _EPOCH_SHIFT | self.completed

    def begin(self, num_parts: Iterable[int]) -> Transaction:
        """Begin a swap of batches with so many parts each, from 1 on."""
        assert not self.batch_ends, "a swap is under way"
        ends = accumulate((_BEFORE_PARTS + parts for parts in num_parts), initial=_AGREED)
        batch_ends = tuple(ends)[1:]
        assert batch_ends
        return replace(self, batch_ends=batch_ends)

    def complete(self) -> Transaction:
        """Announce that this process is done with its stage."""
        assert self.batch_ends, "no swap is under way"
        assert not self.is_waiting, "already announced"
        return replace(self, completed=self.completed + 1)

    def abort(self, reason: AbortReason) -> Transaction:
        """Want to roll back; the first reason stays."""
        assert self.batch_ends, "no swap is under way"
        return self if self.reason is not None else replace(self, reason=reason)

    def hear(self, word_min: int) -> tuple[Transaction, Action | None]:
        """Take in the minimum of all words of a forward, the same on all processes.

        Hearing the same again changes nothing.
        """
        abort = abort_of(word_min)
        if abort is not None:
            if abort.epoch != self.epoch:
                return self, None
            action = Action.ROLL_BACK if self.batch_ends else None
            return Transaction(self.epoch + 1), action
        agreed = word_min & _PROGRESS_MASK
        same_epoch = word_min >> _EPOCH_SHIFT == self.epoch
        if not (self.batch_ends and same_epoch and self.is_waiting and agreed >= self.completed):
            return self, None
        heard = replace(self, followed=self.completed)
        if heard.followed == self.batch_ends[-1]:
            return Transaction(self.epoch + 1), Action.FINISH
        return heard, _ACTION.get(heard.stage, Action.SWITCH)

    @property
    def _in_batch(self) -> int:
        """How much of the present batch all have made."""
        batch = self.batch
        return self.followed - (self.batch_ends[batch - 1] if batch else _AGREED)


_ACTION = {Stage.MOVING: Action.MOVE, Stage.CHECKING: Action.CHECK}
