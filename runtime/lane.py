"""Work beside serving: copies of rows and their checksums, a row at a time, on a stream of its own.

Serving says when work may start (:meth:`SideLane.pump`): after the dispatch of a layer, so that
copies run under the experts and not against the exchange. Started together with the dispatch they
slowed steps far more. A budget in bytes per second holds them back.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext

import torch

__all__ = ["Pacer", "SideLane"]

# Work starts once a layer; a layer's time is what a budget has to be saved up for.
SAVED_S = 0.02


class Pacer:
    """Bytes that may go out by now, at a rate; what is not used is not saved up for long.

    Several threads may ask.

    Parameters
    ----------
    bytes_per_s : float, optional
        None for no limit.
    burst_bytes : int
        The largest amount that is asked for at once.
    """

    def __init__(self, bytes_per_s: float | None, burst_bytes: int) -> None:
        self.bytes_per_s = bytes_per_s
        self.burst_bytes = burst_bytes
        self._lock = threading.Lock()
        self._credit = float(burst_bytes)
        self._last_s = time.monotonic()

    def rest(self) -> None:
        """Nothing is to go out: of what has been saved up, one burst stays."""
        if self.bytes_per_s is not None:
            with self._lock:
                self._grow(float(self.burst_bytes))

    def wait_s(self, num_bytes: int) -> float:
        """Return how long to wait until these bytes may go; 0.0 where they may, and then count."""
        if self.bytes_per_s is None:
            return 0.0
        with self._lock:
            self._grow(max(2.0 * self.burst_bytes, SAVED_S * self.bytes_per_s))
            if self._credit < num_bytes:
                return (num_bytes - self._credit) / self.bytes_per_s
            self._credit -= num_bytes
            return 0.0

    def _grow(self, most: float) -> None:
        assert self.bytes_per_s is not None
        now = time.monotonic()
        self._credit = min(self._credit + (now - self._last_s) * self.bytes_per_s, most)
        self._last_s = now


class SideLane:
    """A queue of short work on the device, started by the serving thread and never waited for.

    Parameters
    ----------
    device : device
    pacer : Pacer

    Attributes
    ----------
    done_bytes : int
        Of all work that has ended.
    error : Exception or None
        What went wrong; the rest of the queue was dropped then.
    """

    def __init__(self, device: torch.device, pacer: Pacer) -> None:
        self.pacer = pacer
        self.done_bytes = 0
        self.error: Exception | None = None
        self._queue: deque[tuple[Callable[[], None], int]] = deque()
        self._launched: deque[tuple[torch.cuda.Event | None, int]] = deque()
        self._stream = (
            torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        )

    def add(self, work: Callable[[], None], num_bytes: int) -> None:
        """Queue work that moves or reads this many bytes; 0 is never held back."""
        self._queue.append((work, num_bytes))

    def pump(self) -> None:
        """Start what may start now, behind what the current stream has been given so far."""
        if not self._queue:
            # Or all of the next work's beginning would come at once.
            self.pacer.rest()
            return
        started = 0
        context = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        try:
            while self._queue and not self.pacer.wait_s(self._queue[0][1]):
                if not started and self._stream is not None:
                    self._stream.wait_stream(torch.cuda.current_stream())
                work, num_bytes = self._queue.popleft()
                with context:
                    work()
                started += max(num_bytes, 1)
        except (RuntimeError, MemoryError) as error:
            # Serving calls this; what fails here is the swap's affair.
            self.error = error
            self._queue.clear()
        if started:
            event = None
            if self._stream is not None:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._stream)
            self._launched.append((event, started))

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued or under way."""
        while self._launched:
            event, num_bytes = self._launched[0]
            if event is not None and not event.query():  # type: ignore[no-untyped-call]
                return False
            self._launched.popleft()
            self.done_bytes += num_bytes
        return not self._queue

    def clear(self) -> None:
        """Drop what has not been started, and the error."""
        self._queue.clear()
        self.error = None
