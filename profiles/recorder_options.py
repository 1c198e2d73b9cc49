"""Options of a recording, and the checks of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from eplb.errors import InvalidInput, unknown_name

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["Options", "Settings", "WindowCallback"]

# Called with the phase and counts [L, E] of each window written, on the writer's thread.
WindowCallback = Callable[[str, NDArray[np.int64]], None]


class Options(TypedDict, total=False):
    """What :func:`eplb.profiles.recorder.record` and ``Recorder`` take by name.

    Parameters
    ----------
    every_s : float
        Seconds of a window, 10 unless ``every_steps`` is given. A window must stay below 2**32
        token-expert pairs an expert.
    every_steps : int
        Steps of a window, instead.
    scenario : str
        Label of the windows; ``Recorder.scenario`` changes it.
    reduce : bool or ProcessGroup
        Add up the windows of all ranks into one file: over a gloo group, off the critical path.
        True makes such a group, on all ranks of the default group at once. A group that is given
        must be used for nothing else, since the recorder does so on a thread of its own.
    reduce_timeout_s : float
        How long a rank may be late; then every rank records on by itself.
    sources : str
        ``rank`` or ``node`` keeps apart where tokens came from (array ``source_counts``, by
        window and source); needs ``reduce``.
    ranks_per_node : int
        For ``node``.
    sample_tokens : int
        Tokens of each step whose experts in all layers are kept (array ``routings``).
    on_window : callable
        Gets the phase and reduced counts of each window, on a thread of the recorder.
    metadata : mapping
        JSON values to keep in the file.
    resume : bool
        Go on with the journal of a killed process.
    """

    every_s: float
    every_steps: int
    scenario: str
    reduce: bool | dist.ProcessGroup
    reduce_timeout_s: float
    sources: str
    ranks_per_node: int
    sample_tokens: int
    on_window: WindowCallback
    metadata: Mapping[str, Any]
    resume: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options, complete and checked; see :class:`Options`.

    Raises
    ------
    InvalidInput
        A value that cannot be used.
    """

    every_s: float = 10.0
    every_steps: int | None = None
    scenario: str = "default"
    reduce: bool | dist.ProcessGroup = False
    reduce_timeout_s: float = 60.0
    sources: str | None = None
    ranks_per_node: int = 8
    sample_tokens: int = 0
    on_window: WindowCallback | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("every_s", "every_steps", "reduce_timeout_s", "ranks_per_node"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidInput(f"{name} ({value}) must be greater than 0")
        if not 0 <= self.sample_tokens <= 256:
            raise InvalidInput(f"sample_tokens ({self.sample_tokens}) must be within 0 and 256")
        if self.sources not in {None, "rank", "node"}:
            raise unknown_name("kind of source", str(self.sources), ("rank", "node"))
        if self.sources is not None and self.reduce is False:
            raise InvalidInput(
                "sources tells the ranks of a reduction apart; give reduce=True as well"
            )

    @classmethod
    def of(cls, options: Options) -> Settings:
        """Return the settings that options ask for."""
        known = set(cls.__dataclass_fields__)
        for name in options:
            if name not in known:
                raise unknown_name("option", name, known)
        if "every_s" in options and "every_steps" in options:
            raise InvalidInput("every_s and every_steps both end a window; give one of them")
        return cls(**options)
