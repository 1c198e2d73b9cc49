"""Errors that reach a user, each with the exit code the command line ends with.

Every message names the argument, its value, the rule it breaks and the remedy.
``assert`` is kept for our own invariants; whatever a user can cause raises one of these.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "EplbError",
    "InfeasibleProblem",
    "InvalidInput",
    "MigrationFailed",
    "PlacementInvalid",
    "ServingFailed",
    "SolverFailed",
    "SolverUnavailable",
    "unknown_name",
]


class EplbError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class InvalidInput(EplbError, ValueError):
    """A file, an option or an argument cannot be used as given."""

    exit_code = 2


class InfeasibleProblem(EplbError):
    """The input is well formed, and no placement satisfies it."""

    exit_code = 3


class SolverUnavailable(EplbError):
    """A solver needs a package that is not installed."""

    exit_code = 4


class SolverFailed(EplbError):
    """A solver ended without a usable placement."""

    exit_code = 5


class PlacementInvalid(EplbError):
    """A placement breaks a rule: an unknown expert, a missing one, a wrong length."""

    exit_code = 6


class MigrationFailed(EplbError):
    """Moving from one placement to another could not be completed."""

    exit_code = 7


class ServingFailed(EplbError):
    """A step of the running layer could not be completed: a stalled peer, numbers that are none."""

    exit_code = 8


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InvalidInput:
    """Return the error for a name outside a fixed set, with the nearest known one."""
    choices = sorted(known)
    near = get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InvalidInput(f"unknown {kind} {name!r}; {hint}known: {', '.join(choices)}")
