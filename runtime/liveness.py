"""Who of a group is still there: heartbeats beside serving, and agreement on who is not.

Collectives do not tell: with NCCL they wait for a dead peer without end, and survivors of gloo each
see another failure. So each process sends datagrams from a thread of its own. In quiet times they
go to the processes 1, 2, 4, 8, ... places on, and each watches those the same distances back; as
soon as one is missed, all send to all, their suspicions included, until all survivors suspect the
same. With the suspicion each process freezes which placement is in force, and says which one it can
still go back to; so that survivors of which some had switched and others not go on from one.

Then NCCL's groups are aborted, so that nothing waits any longer, and whatever serving does next
raises :class:`RanksLost`.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import Store

from eplb.errors import EplbError, InvalidInput, ServingFailed
from eplb.runtime.ep.agreement import gather_sound
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.hosts import check_hosts, no_address, own_host
from eplb.runtime.survivors import View, agreed_digest, agreed_loss, watched_by

__all__ = ["Liveness", "Loss", "RanksLost"]

# A view names suspects and two digests; far below what a datagram takes.
_MOST_BYTES = 60_000


@dataclass(frozen=True, slots=True)
class Loss:
    """What all survivors know.

    Parameters
    ----------
    dead, survivors : tuple of int
        Processes.
    digest : str
        Of the placement that all survivors can have in force.
    seconds : float
        From the last sign of life of the first that was missed, on this process.
    """

    dead: tuple[int, ...]
    survivors: tuple[int, ...]
    digest: str
    seconds: float


class RanksLost(ServingFailed):
    """Processes died; all survivors raise this, with the same loss.

    Attributes
    ----------
    loss : Loss
    """

    def __init__(self, message: str, loss: Loss) -> None:
        super().__init__(message)
        self.loss = loss


class Liveness:
    """Sends and hears heartbeats on a thread of its own. Making it is collective.

    Parameters
    ----------
    group : EPGroup
        Its waits raise :class:`RanksLost` from now on.
    timeout_s : float
        Silence after which a process is held for dead. Longer than any time for which Python code
        of a process may not run at all.
    interval_s : float
        Between heartbeats.
    host : str, optional
        Address under which other processes reach this one; found out where left out.

    Attributes
    ----------
    loss : Loss or None
        Once all survivors agree.

    Raises
    ------
    InvalidInput
        Times that cannot be, or an address that some process' machine does not have or that others
        cannot reach.
    """

    def __init__(
        self,
        group: EPGroup,
        *,
        timeout_s: float = 2.0,
        interval_s: float = 0.1,
        host: str | None = None,
    ) -> None:
        if not 0 < interval_s < timeout_s < math.inf:
            raise InvalidInput(
                f"timeout_s ({timeout_s}) must be finite and longer than interval_s "
                f"({interval_s}), and both positive; silence is told by missing some heartbeats"
            )
        self.group, self.timeout_s, self.interval_s = group, timeout_s, interval_s
        self.loss: Loss | None = None
        host = host or own_host()
        self._host = host
        self._lock = threading.Lock()
        self._views = {group.process: View(frozenset(), "", None)}
        self._stores: dict[int, str] = {}
        self._store: Store | None = None
        self._expelled = False
        self._failure: ServingFailed | None = None
        self._alarm_s: float | None = None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

        def own() -> str:
            try:
                self._socket.bind((host, 0))
            except OSError as error:
                raise no_address(host, error) from None
            # Whoever is started in place of a process does not know the token, and is not heard.
            return f"{host} {self._socket.getsockname()[1]} {secrets.token_hex(8)}"

        try:
            told = [text.split() for text in gather_sound(group, own)]
            check_hosts([host for host, *_ in told])
        except EplbError:
            self._socket.close()
            raise
        self._token = told[0][2]
        self._addresses = [(host, int(port)) for host, port, _ in told]
        watched = watched_by(group.process, group.num_processes)
        self._watched = [p for p in watched if p != group.process]
        self._heard_s = dict.fromkeys(range(group.num_processes), time.monotonic())
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="eplb-liveness", daemon=True)
        self._thread.start()
        group.alarm = self.check

    def report(self, in_force: str, fallback: str | None) -> None:
        """Say which placement this process serves from now on.

        Raises
        ------
        RanksLost
            Processes are gone, and what is in force must not change any more.
        ServingFailed
            Some are suspected, and the survivors did not come to agree.
        """
        with self._lock:
            view = self._views[self.group.process]
            if not view.suspects:
                self._views[self.group.process] = View(view.suspects, in_force, fallback)
                return
        self.check(self._patience_s)
        suspects = sorted(self._views[self.group.process].suspects)
        raise ServingFailed(
            f"processes {suspects} are silent and the others do not agree on it; restart all from "
            "the plan in force"
        )

    def check(self, wait_s: float = 0.0) -> None:
        """Raise where processes are lost; with ``wait_s``, see for so long whether they are.

        Raises
        ------
        RanksLost
            All survivors agree on who is gone.
        ServingFailed
            The others hold this process for dead, or survivors cannot go on from one placement.
        """
        deadline = time.monotonic() + wait_s
        while self.loss is None and self._failure is None and not self._expelled:
            # While somebody is suspected the survivors are about to agree.
            suspected = self._views[self.group.process].suspects and wait_s
            patience_s = self._patience_s if suspected else 0.0
            if time.monotonic() > deadline + patience_s:
                return
            time.sleep(0.01)
        if self._expelled:
            raise ServingFailed(
                f"the other processes hold process {self.group.process} for dead: it was silent "
                f"for more than {self.timeout_s:g} s; restart it, or give a longer timeout_s"
            )
        if self._failure is not None:
            raise ServingFailed(str(self._failure)) from self._failure
        loss = self.loss
        assert loss is not None
        per_process = self.group.ranks_per_process
        ranks = [p * per_process + i for p in loss.dead for i in range(per_process)]
        raise RanksLost(
            f"process{'es' * (len(loss.dead) > 1)} {', '.join(map(str, loss.dead))} (rank"
            f"{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}) died; the other "
            f"{len(loss.survivors)} agree on that and on the placement {loss.digest}: go on with "
            "recover(), or restart from a repaired plan",
            loss,
        )

    def meeting_store(self, timeout_s: float = 30.0) -> Store:
        """Return a store that the survivors share, served by the first of them.

        Raises
        ------
        ServingFailed
            The first survivor did not open one in time.
        """
        assert self.loss is not None, "nothing is lost"
        first = self.loss.survivors[0]
        wait = timedelta(seconds=timeout_s)
        if self.group.process == first:
            self._store = TCPStore(
                self._host, 0, is_master=True, wait_for_workers=False, timeout=wait
            )
            with self._lock:
                self._stores[first] = f"{self._host} {self._store.port}"
            return self._store
        deadline = time.monotonic() + timeout_s
        while first not in self._stores:
            if time.monotonic() > deadline:
                raise ServingFailed(
                    f"process {first} did not open a store within {timeout_s:g} s; restart the "
                    "survivors from the repaired plan"
                )
            time.sleep(0.02)
        host, port = self._stores[first].split()
        return TCPStore(host, int(port), is_master=False, timeout=wait)

    def successor(self, group: EPGroup) -> Liveness:
        """Return one with the same options for another group. Collective."""
        return Liveness(
            group, timeout_s=self.timeout_s, interval_s=self.interval_s, host=self._host
        )

    def close(self) -> None:
        """Stop. The others take this process for dead unless they stop as well."""
        self._ending.set()
        self._thread.join()
        self._socket.close()

    @property
    def _patience_s(self) -> float:
        """How long survivors may take to agree once one of them suspects."""
        return 2 * self.timeout_s + 10 * self.interval_s

    def _run(self) -> None:
        next_s = time.monotonic()
        while not self._ending.is_set():
            # Only what is still unread then was not said in time.
            if self._hear():
                self._watch(time.monotonic())
            self._conclude()
            if time.monotonic() >= next_s:
                self._tell()
                next_s = time.monotonic() + self.interval_s

    def _hear(self) -> bool:
        """Take in what has arrived, waiting for half an interval if nothing has.

        Returns
        -------
        bool
            Whether that was all: strangers may send faster than this reads, and even then the group
            must not miss this process' own heartbeat.
        """
        self._socket.settimeout(self.interval_s / 2)
        until_s = time.monotonic() + self.interval_s
        while time.monotonic() < until_s:
            try:
                message = json.loads(self._socket.recv(_MOST_BYTES))
            except (TimeoutError, BlockingIOError):
                return True
            except (OSError, ValueError, RecursionError):
                continue
            self._socket.settimeout(0.0)
            if isinstance(message, dict) and message.get("token") == self._token:
                self._take(message)
        return False

    def _take(self, message: dict[str, Any]) -> None:
        process, own = message["process"], self.group.process
        view = View(frozenset(message["suspects"]), message["in_force"], message["fallback"])
        with self._lock:
            if process in self._views[own].suspects:
                return
            self._heard_s[process] = time.monotonic()
            self._views[process] = view
            if message["store"]:
                self._stores[process] = message["store"]
            if own in view.suspects:
                self._expelled = True
            elif view.suspects and self.loss is None:
                self._suspect(view.suspects)

    def _watch(self, now_s: float) -> None:
        if self.loss is not None:
            return
        with self._lock:
            suspects = self._views[self.group.process].suspects
            watched = self._watched
            since_s = 0.0
            if self._alarm_s is not None:
                # Those whom others watched have been sending here only since the alarm.
                watched = [p for p in range(self.group.num_processes) if p != self.group.process]
                since_s = self._alarm_s
            silent = {
                p
                for p in watched
                if p not in suspects
                and now_s
                - (self._heard_s[p] if p in self._watched else max(self._heard_s[p], since_s))
                > self.timeout_s
            }
            if silent:
                self._suspect(silent)

    def _suspect(self, processes: Iterable[int]) -> None:
        """Hold processes for dead; what this process has in force is frozen from now on."""
        own = self.group.process
        view = self._views[own]
        suspects = view.suspects | frozenset(processes)
        if suspects != view.suspects:
            self._views[own] = View(suspects, view.in_force, view.fallback)
            if self._alarm_s is None:
                self._alarm_s = time.monotonic()

    def _conclude(self) -> None:
        if self.loss is not None or self._failure is not None or self._alarm_s is None:
            return
        group = self.group
        with self._lock:
            dead = agreed_loss(group.process, self._views, group.num_processes)
            if not dead:
                return
            survivors = tuple(p for p in range(group.num_processes) if p not in dead)
            last_s = min(self._heard_s[p] for p in dead)
            try:
                digest = agreed_digest(self._views[p] for p in survivors)
            except ServingFailed as error:
                self._failure = error
            else:
                self.loss = Loss(
                    dead=tuple(sorted(dead)),
                    survivors=survivors,
                    digest=digest,
                    seconds=time.monotonic() - last_s,
                )
        # Right away, so that the others conclude as well while this process is busy aborting.
        self._tell()
        group.abort()

    def _tell(self) -> None:
        own = self.group.process
        with self._lock:
            view = self._views[own]
            store = self._stores.get(own)
        text = json.dumps(
            {
                "token": self._token, "process": own, "suspects": sorted(view.suspects),
                "in_force": view.in_force, "fallback": view.fallback, "store": store,
            }
        ).encode()  # fmt: skip
        everyone = range(self.group.num_processes)
        watchers = [p for p in everyone if own in watched_by(p, self.group.num_processes)]
        for process in everyone if self._alarm_s is not None else watchers:
            if process != own:
                # A peer that is gone may make the system say so; its silence says it as well.
                with contextlib.suppress(OSError):
                    self._socket.sendto(text, self._addresses[process])
