"""What is told of a swap: where it stands, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass

from eplb.errors import MigrationFailed
from eplb.runtime.swap import Stage

__all__ = ["SwapResult", "SwapStatus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapStatus:
    """Where a swap stands, as seen by one process.

    Parameters
    ----------
    stage : Stage
    epoch : int
        Counts ends of swaps; equal on all processes.
    in_force : str
        What names the placement that serves: its plan's digest, or one of both plans' and the
        layers that have changed over.
    target : str or None
        Digest of the plan that is being put in force.
    is_returning : bool
        The swap failed after batches had changed over, and these are on their way back.
    batch, num_batches : int
    moved_bytes : int
        Received by this process since it was attached, in batches that all had moved.
    since_progress_s : float
        How long nothing has been copied, fetched, checked or agreed.
    is_stalled : bool
        That is longer than the alarm allows.
    error : str or None
        Why the last swap was rolled back.
    """

    stage: Stage
    epoch: int
    in_force: str
    target: str | None
    is_returning: bool
    batch: int
    num_batches: int
    moved_bytes: int
    since_progress_s: float
    is_stalled: bool
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapResult:
    """How a swap ended: with its plan in force, or rolled back.

    Parameters
    ----------
    error : MigrationFailed or None
        None where the plan is in force.
    seconds : float
        Since :meth:`PlacementManager.begin_swap`.
    """

    error: MigrationFailed | None
    seconds: float
