"""Options and argument types that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from eplb.errors import InvalidInput, unknown_name
from eplb.load_profile import LoadProfile
from eplb.topology import TOPOLOGY_PRESETS
from eplb.topology_file import is_topology_file

__all__ = [
    "Fraction",
    "Machine",
    "Name",
    "Numbers",
    "Seconds",
    "as_json",
    "phase_option",
    "profile_arguments",
    "read_parts",
    "read_windows",
    "windows_option",
]

F = TypeVar("F", bound=Callable[..., Any])


class Name(click.ParamType[str]):
    """One of a fixed set of names; a wrong one is answered with the nearest."""

    name = "name"

    def __init__(self, kind: str, known: Iterable[str]) -> None:
        self.kind, self.known = kind, tuple(known)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name if it is known."""
        if value not in self.known:
            self.fail(str(unknown_name(self.kind, str(value), self.known)), param, ctx)
        return str(value)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Show a short list in full, a long one by what it is."""
        return "|".join(self.known) if len(self.known) <= 5 else "NAME"

    def shell_complete(
        self,
        ctx: click.Context,
        param: click.Parameter,
        incomplete: str,
    ) -> list[click.shell_completion.CompletionItem]:
        """Complete names."""
        return [
            click.shell_completion.CompletionItem(name)
            for name in self.known
            if name.startswith(incomplete)
        ]


class Machine(Name):
    """A topology preset, or the path of a topology file."""

    name = "PRESET|FILE"

    def __init__(self) -> None:
        super().__init__("topology preset", TOPOLOGY_PRESETS)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name if it is a preset or looks like a path."""
        text = str(value)
        return text if is_topology_file(text) else super().convert(value, param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Show that a path will do."""
        return self.name


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers from 0 on, and ranges of them, as ``3,16-23``."""

    name = "N,N-M,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the numbers, in order and each once."""
        numbers: set[int] = set()
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(\d{1,7})(?:-(\d{1,7}))?\s*", part)
            ends = None if match is None else (int(match[1]), int(match[2] or match[1]))
            if ends is None or ends[0] > ends[1]:
                self.fail(f"{value!r} is no list of numbers such as 17,18 or 16-23", param, ctx)
            numbers.update(range(ends[0], ends[1] + 1))
        return tuple(sorted(numbers))


class Fraction(click.ParamType[float]):
    """A part of something between 0 and 1, also as a percentage."""

    name = "PART"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the part."""
        text = str(value).strip()
        try:
            part = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            part = -1.0
        if not 0 < part < 1:
            self.fail(f"{value!r} is not a part between 0 and 1, such as 0.25 or 25%", param, ctx)
        return part


class Seconds(click.ParamType[float]):
    """A time of at least 0; click's own range lets NaN through."""

    name = "SECONDS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the time."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds < float("inf"):
            self.fail(f"{value!r} is not a number of seconds from 0 on", param, ctx)
        return seconds


class Windows(click.ParamType[tuple[int | None, int | None]]):
    """A range of windows, ``START:STOP``, either side optional."""

    name = "START:STOP"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | None, int | None]:
        """Return start and stop."""
        match = re.fullmatch(r"(-?\d{1,9})?:(-?\d{1,9})?", str(value))
        if match is None:
            self.fail(
                f"{value!r} is not a range of windows such as 0:120, 120: or :-60", param, ctx
            )
        start, stop = (None if text is None else int(text) for text in match.groups())
        return start, stop


as_json = click.option("--json", "json_", is_flag=True, help="Print one JSON document instead.")

profile_arguments = click.argument(
    "profiles",
    nargs=-1,
    required=True,
    metavar="PROFILE...",
    type=click.Path(),
)

windows_option = click.option(
    "--windows", type=Windows(), help="Use only these windows of each profile, as 0:120 or 120:."
)


phase_option = click.option(
    "--phase",
    type=Name("phase", ("prefill", "decode", "mixed")),
    help="Use only the windows of this phase.",
)


def read_windows(
    specs: Iterable[str],
    windows: tuple[int | None, int | None] | None,
    phase: str | None = None,
    read: Callable[[str], LoadProfile] | None = None,
) -> LoadProfile:
    """Read profiles as scenarios, each cut to its windows ``start:stop`` of one phase.

    ``read`` reads one of them, where that takes more than its name.
    """
    from eplb.load_profile import merge_profiles

    return merge_profiles(read_parts(specs, windows, phase, read))


def read_parts(
    specs: Iterable[str],
    windows: tuple[int | None, int | None] | None,
    phase: str | None = None,
    read: Callable[[str], LoadProfile] | None = None,
) -> list[LoadProfile]:
    """Read profiles, each cut to its windows ``start:stop`` of one phase."""
    from eplb.profiles import read_profile

    profiles = [(read or read_profile)(spec) for spec in specs]
    if phase is not None:
        profiles = [profile.of_phase(phase) for profile in profiles]
    if windows is not None:
        profiles = [profile.windows(*windows) for profile in profiles]
    if not profiles:
        raise InvalidInput("no profile given; name at least one file")
    return profiles
