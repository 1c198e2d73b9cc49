"""The thread behind a recorder: takes snapshots apart into windows, adds them up, writes them.

Nothing that goes wrong here reaches the model. A disk that is full keeps windows in memory for a
while; a rank that stays away makes every rank write its own file.
Shape letters: P phases, L layers, E experts, C columns, N sources.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb.errors import EplbError, InvalidInput
from eplb.profiles.journal import Arrays, Journal
from eplb.profiles.journal_file import export_journal
from eplb.profiles.recorder_counters import Counters, Pending
from eplb.profiles.recorder_options import Settings
from eplb.profiles.recorder_reduce import Reducer
from eplb.profiles.recorder_window import WindowShape, window_arrays

__all__ = ["Closed", "Writer"]

_log = logging.getLogger("eplb.recorder")
# Windows kept in memory while the disk takes none: some 30 MB of 58 x 256 counts, a phase.
MAX_BACKLOG = 256
# A rank that has nothing for a window says so this long after the window's end.
GRACE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """A window that the recorder closed; its counts are still on their way.

    Parameters
    ----------
    pending : Pending
    window : int
        Its number: the same window on all ranks.
    time_s : float
        When it began, seconds since 1970.
    steps : int
    scenario : str
    discard : bool
        Whether its counts are to be forgotten.
    last : bool
        Whether the recorder closes.
    """

    pending: Pending
    window: int
    time_s: float
    steps: int
    scenario: str
    discard: bool
    last: bool


class Writer:
    """Writes the windows of one recorder.

    Parameters
    ----------
    path : Path
    counters : Counters
    layer_ids : tuple of int
        Those of multi-token prediction last.
    num_mtp : int
        How many of these are.
    top_k : mapping of layer index to int
        0 where it is not known yet.
    settings : Settings

    Raises
    ------
    InvalidInput
        The file cannot be written, or the ranks cannot be reduced.
    """

    def __init__(
        self,
        *,
        path: Path,
        counters: Counters,
        layer_ids: tuple[int, ...],
        num_mtp: int,
        top_k: dict[int, int],
        settings: Settings,
    ) -> None:
        self._path = path
        self._counters = counters
        self._settings = settings
        self._shape = WindowShape(
            layer_ids=layer_ids,
            num_main=len(layer_ids) - num_mtp,
            num_experts=counters.num_experts,
            num_columns=counters.num_columns,
            top_k=top_k,
        )
        num_phases, num_layers, num_columns = counters.counts_PLC.shape
        self._reducer = (
            None
            if settings.reduce is False
            else Reducer(settings, (num_phases, num_layers, num_columns))
        )
        # Counts of this rank alone keep their place among the sources.
        self._num_sources, self._source = (
            (1, 0) if self._reducer is None else (self._reducer.num_sources, self._reducer.source)
        )
        self.start_s = time.time() if self._reducer is None else self._reducer.start_s
        self._journal: Journal | None = None
        if self._reducer is None or self._reducer.rank == 0:
            self._journal = Journal(path, self._header(), resume=settings.resume)
        self._before = np.zeros(counters.counts_PLC.shape, np.uint32)
        self._carried: NDArray[np.int64] | None = None
        self._carried_steps = 0
        self._round = 0
        self._opened_s = self.start_s
        self._backlog: deque[Arrays] = deque()
        self._lost = 0
        self._told: set[str] = set()
        self._queue: queue.SimpleQueue[Closed] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="eplb-recorder", daemon=True)
        self._thread.start()

    def put(self, closed: Closed) -> None:
        """Hand over a window, without waiting."""
        self._queue.put(closed)

    def close(self, *, steps: int, calls_outside: int) -> None:
        """Wait until the last window is written, then make the profile of the journal."""
        self._thread.join()
        if self._journal is None:
            return
        self._journal.close()
        journal = self._journal.path
        if self._lost or self._backlog:
            _log.error(
                "%d windows could not be written and are lost", self._lost + len(self._backlog)
            )
        try:
            windows = export_journal(journal, self._path)
        except EplbError as error:
            _log.error("the recording stays in %s, which is read as it is: %s", journal, error)
            return
        journal.unlink()
        if windows == 0:
            _log.warning("nothing was recorded: %s", _why_nothing(steps, calls_outside))

    def _header(self) -> dict[str, NDArray[Any]]:
        shape, settings = self._shape, self._settings
        metadata = {
            "recorder": "eplb/recorder@1",
            "start_s": round(self.start_s, 3),
            "window": (
                {"seconds": settings.every_s}
                if settings.every_steps is None
                else {"steps": settings.every_steps}
            ),
            **({"ranks": self._reducer.num_ranks} if self._reducer else {}),
            **({"sources": settings.sources} if settings.sources else {}),
            **({"top_k": top} if (top := shape.top_k[0]) else {}),
            **settings.metadata,
        }
        try:
            text = json.dumps(metadata, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"metadata must be JSON values: {error}") from None
        header = {
            "layer_ids": np.array(shape.layer_ids[: shape.num_main], np.int64),
            "metadata": np.array(text),
        }
        if shape.num_main < len(shape.layer_ids):
            header["mtp_layer_ids"] = np.array(shape.layer_ids[shape.num_main :], np.int64)
        return header

    def _run(self) -> None:
        done = False
        while not done:
            closed = self._next()
            done = closed is not None and closed.last
            try:
                if closed is None:
                    self._reduce(last=False)
                else:
                    self._take(closed)
            except Exception:  # noqa: BLE001
                # The thread must live: without it no snapshot buffer is ever free again.
                _log.exception("a window could not be recorded")

    def _next(self) -> Closed | None:
        """Return the next window, or None where a round is due and this rank has nothing."""
        if self._reducer is None or self._settings.every_steps is not None:
            return self._queue.get()
        due_s = self.start_s + (self._round + 1) * self._settings.every_s + GRACE_S
        try:
            return self._queue.get(timeout=max(0.0, due_s - time.time()))
        except queue.Empty:
            return None

    def _take(self, closed: Closed) -> None:
        counts_PLC, routings = self._counters.take(closed.pending)
        # Modulo 2**32, which is what makes counters that wrap around harmless.
        delta_PLC = (counts_PLC - self._before).astype(np.int64)
        self._before = counts_PLC
        if closed.discard:
            return
        if self._reducer is None:
            self._write(self._own(delta_PLC), closed.steps, closed.time_s, closed, routings)
            return
        self._carried = delta_PLC if self._carried is None else self._carried + delta_PLC
        self._carried_steps += closed.steps
        # Windows that this rank left out; what it has belongs to the last of them.
        while self._reducer is not None and self._round < closed.window:
            self._reduce(last=False, empty=True)
        if closed.last:
            while not self._reduce(closed, routings, last=True):
                pass
        elif self._reducer is None or self._round == closed.window:
            self._reduce(closed, routings, last=False)

    def _reduce(
        self,
        closed: Closed | None = None,
        routings: NDArray[np.int16] | None = None,
        *,
        last: bool,
        empty: bool = False,
    ) -> bool:
        """Take part in a round; return whether there will be no other."""
        counts_PLC, steps = (None, 0) if empty else (self._carried, self._carried_steps)
        now = time.time()
        if self._reducer is not None:
            try:
                total = self._reducer.add(counts_PLC, steps=steps, done=last)
            except (RuntimeError, ValueError) as error:
                self._go_alone(error)
            else:
                self._round += 1
                if not empty:
                    self._carried, self._carried_steps = None, 0
                self._write(total.counts_NPLC, total.steps, self._opened_s, closed, routings)
                self._opened_s = now
                return total.all_done
        if not empty and self._carried is not None:
            self._write(self._own(self._carried), steps, self._opened_s, closed, routings)
            self._carried, self._carried_steps, self._opened_s = None, 0, now
        return last

    def _own(self, counts_PLC: NDArray[np.int64]) -> NDArray[np.int64]:
        counts_NPLC = np.zeros((self._num_sources, *counts_PLC.shape), np.int64)
        counts_NPLC[self._source] = counts_PLC
        return counts_NPLC

    def _go_alone(self, error: Exception) -> None:
        assert self._reducer is not None
        rank, self._reducer = self._reducer.rank, None
        if self._journal is None:
            self._path = self._path.with_name(f"{self._path.stem}.rank{rank}.npz")
            self._journal = Journal(self._path, self._header(), resume=True)
        _log.error(
            "rank %d: windows are no longer added up over ranks, because one did not take part "
            "(%s); from here on %s holds this rank alone",
            rank, " ".join(str(error).split())[:200], self._path,
        )  # fmt: skip

    def _write(
        self,
        counts_NPLC: NDArray[np.int64],
        steps: int,
        time_s: float,
        closed: Closed | None,
        routings: NDArray[np.int16] | None,
    ) -> None:
        record, notes = window_arrays(
            counts_NPLC,
            self._shape,
            steps=steps,
            time_s=time_s,
            scenario=self._settings.scenario if closed is None else closed.scenario,
            keep_sources=self._settings.sources is not None,
            routings=routings,
        )
        for key, note in notes.items():
            if key not in self._told:
                self._told.add(key)
                _log.warning("%s", note)
        if record is None:
            return
        if self._journal is not None:
            self._append(record)
        if self._settings.on_window is not None:
            for name, counts_LE in zip(record["phase"], record["counts"], strict=True):
                self._settings.on_window(str(name), counts_LE)

    def _append(self, record: Arrays) -> None:
        assert self._journal is not None
        self._backlog.append(record)
        try:
            while self._backlog:
                self._journal.append(self._backlog[0])
                self._backlog.popleft()
        except OSError as error:
            if "disk" not in self._told:
                self._told.add("disk")
                _log.error(
                    "cannot write %s (%s); the last %d windows are kept in memory until it can be",
                    self._journal.path, error.strerror, MAX_BACKLOG,
                )  # fmt: skip
            if len(self._backlog) > MAX_BACKLOG:
                self._backlog.popleft()
                self._lost += 1
        else:
            self._told.discard("disk")


def _why_nothing(steps: int, calls_outside: int) -> str:
    if calls_outside:
        return (
            "parts of the model were called, but never the model that the recorder is attached to; "
            "attach it to the part that is called"
        )
    if steps:
        return (
            f"{steps} steps came without tokens; a model that was compiled before it was attached "
            "does not see the recorder (torch.compiler.reset() lets it)"
        )
    return "the model was not called"
