"""Options of commands that move experts: the limit, and what a move is weighed against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from eplb.cli.options import Machine
from eplb.errors import InvalidInput

__all__ = [
    "bandwidth_option",
    "charge_options",
    "check_charge",
    "moves_limit",
    "spare_slots_option",
]

F = TypeVar("F", bound=Callable[..., Any])


def charge_options(command: F) -> F:
    """Add the options that say what a step and a transfer take."""
    options = (
        click.option(
            "--step-ms",
            type=click.FloatRange(min=0, min_open=True),
            metavar="MS",
            help="What the expert layers of a step take when they are balanced: moves are charged.",
        ),
        click.option(
            "--expert-bytes",
            type=click.IntRange(min=1),
            metavar="BYTES",
            help="Weights of one expert of one layer, where the model does not say.",
        ),
    )
    for option in options:
        command = option(command)
    return command


def bandwidth_option(command: F) -> F:
    """Add the option of a machine whose bandwidths count."""
    return click.option(
        "--topology",
        type=Machine(),
        help="Machine whose bandwidths count, in place of the plan's own: a preset, or a file of a "
        "measured cluster.",
    )(command)


def spare_slots_option(command: F) -> F:
    """Add the option of the memory that moves may take beside the slots."""
    return click.option(
        "--spare-slots",
        type=click.IntRange(min=0),
        metavar="SLOTS",
        help="Experts that fit a rank beside its slots while they wait; no limit where left out.",
    )(command)


def check_charge(step_ms: float | None, horizon: int | None) -> None:
    """Refuse one of the two figures of a break-even without the other."""
    if (step_ms is None) != (horizon is None):
        raise InvalidInput(
            "--step-ms and --horizon together say what moves gain; give both, or neither to use "
            "the moves allowed as far as they gain"
        )


def moves_limit(text: str, num_slots: int) -> int:
    """Return the moves that N or P% stand for.

    Raises
    ------
    InvalidInput
        It is neither, or more than there are slots.
    """
    number, part = (text[:-1], True) if text.endswith("%") else (text, False)
    try:
        value = float(number) if part else int(number)
    except ValueError:
        value = -1
    if not 0 <= value <= (100 if part else num_slots):
        raise InvalidInput(
            f"--max-moves {text} must be a whole number up to {num_slots}, or a percentage such "
            "as 4%"
        )
    return int(value * num_slots / 100) if part else int(value)
