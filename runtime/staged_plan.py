"""The file of the plan in force: written before it is, so that then a rename is left."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from eplb.errors import InvalidInput
from eplb.plan import Plan
from eplb.plan_file import write_plan

__all__ = ["StagedPlan"]


class StagedPlan:
    """A plan that waits beside the file that it is to replace; one at a time.

    Writing a plan takes tens of milliseconds on a slow disk, which the serving thread has not.

    Parameters
    ----------
    path : path
        Of the plan in force.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(os.path.realpath(path))
        # Always the same one, so that processes that were killed leave no more than that.
        self._waiting = self._path.with_name(f".{self._path.name}.next")
        self._failure: str | None = None

    def stage(self, plan: Plan) -> None:
        """Write a plan to where it waits. What fails is told by :meth:`put_in_force`."""
        self._failure = None
        try:
            write_plan(plan, self._waiting)
            with suppress(OSError):
                # As a file that is written anew keeps it.
                shutil.copymode(self._path, self._waiting)
        except InvalidInput as failure:
            self._failure = str(failure)

    def put_in_force(self) -> None:
        """Replace the file by the staged plan.

        Raises
        ------
        InvalidInput
            The plan could not be written, or not be put there; the file is what it was.
        """
        if self._failure is None:
            try:
                self._waiting.replace(self._path)
            except OSError as error:
                self._failure = f"cannot write {self._path}: {error.strerror}; choose another place"
        if self._failure is not None:
            raise InvalidInput(self._failure)

    def discard(self) -> None:
        """Remove the staged plan."""
        with suppress(OSError):
            self._waiting.unlink()
