"""What the survivors of a group conclude from each other's views; no clock, thread or socket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from eplb.errors import ServingFailed

__all__ = ["View", "agreed_digest", "agreed_loss", "watched_by"]


@dataclass(frozen=True, slots=True)
class View:
    """What a process says of the group.

    Parameters
    ----------
    suspects : frozenset of int
        Processes it holds for dead, from its own watch or on others' word.
    in_force : str
        Digest of the placement it serves.
    fallback : str or None
        Digest of the one before, as long as it can go back to that.
    """

    suspects: frozenset[int]
    in_force: str
    fallback: str | None


def watched_by(process: int, num_processes: int) -> list[int]:
    """Return which processes one watches: those 1, 2, 4, 8, ... places before it.

    So the loss of neighbours, as of a whole node, is seen from beyond it.
    """
    distances = (1 << i for i in range(num_processes.bit_length()))
    return sorted({(process - d) % num_processes for d in distances if d < num_processes})


def agreed_loss(process: int, views: Mapping[int, View], num_processes: int) -> frozenset[int]:
    """Return who is dead by the word of all others; nobody as long as they do not agree."""
    suspects = views[process].suspects
    survivors = set(range(num_processes)) - suspects
    if not suspects or process in suspects:
        return frozenset()
    if all(p in views and views[p].suspects == suspects for p in survivors):
        return suspects
    return frozenset()


def agreed_digest(views: Iterable[View]) -> str:
    """Return the placement that all can have in force.

    Two processes are at most one step of a switch apart: each happens when all have announced the
    one before. Who is ahead can go back as long as not all are known to have followed: to where the
    switch began, so within one that is where all go.

    Raises
    ------
    ServingFailed
        There is none.
    """
    views = list(views)
    possible = set.intersection(*({v.in_force, v.fallback or v.in_force} for v in views))
    common = {v.in_force for v in views} & possible or possible
    if not common:
        raise ServingFailed(
            "survivors have no placement in common; restart all from the checkpoint"
        )
    return min(common)
