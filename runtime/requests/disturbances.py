"""What goes wrong during a replay."""

from __future__ import annotations

from dataclasses import dataclass

from eplb.errors import InvalidInput

__all__ = ["Disturbances"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbances:
    """Aborts, a dead rank, a slow rank, late feedback; nothing unless said.

    Parameters
    ----------
    abort_part : float
        Part of the requests whose user leaves, at a random point of the output.
    lost_rank, lost_step : int, optional
        A rank that dies, and when.
    slow_rank : int, optional
    slow_speed : float
        Its speed.
    feedback_steps : int
        How late the balancer hears that requests have ended (policies of other schedulers have
        their own delays).
    """

    abort_part: float = 0.0
    lost_rank: int | None = None
    lost_step: int = 0
    slow_rank: int | None = None
    slow_speed: float = 0.8
    feedback_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.abort_part <= 1:
            raise InvalidInput(f"abort_part must be from 0 to 1, got {self.abort_part}")
        if self.slow_speed <= 0 or self.feedback_steps < 0 or self.lost_step < 0:
            raise InvalidInput(
                f"slow_speed ({self.slow_speed}) must be positive, feedback_steps "
                f"({self.feedback_steps}) and lost_step ({self.lost_step}) not negative"
            )

    def check(self, num_ranks: int) -> None:
        """Raise InvalidInput where a rank is not one of so many."""
        for rank in (self.lost_rank, self.slow_rank):
            if rank is not None and not 0 <= rank < num_ranks:
                raise InvalidInput(f"rank {rank} is not one of 0 to {num_ranks - 1}")
