"""The processes of an expert-parallel group, and the ranks of the plan that each of them is.

A process is one member of torch's process group. It holds ``ranks_per_process`` ranks of the plan:
one on a cluster, several (virtual ranks) where the balance of many ranks is wanted on few
processes. Rank ``r`` is on process ``r // ranks_per_process`` and on node ``r // ranks_per_node``.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from eplb.errors import InvalidInput, ServingFailed

__all__ = ["EPGroup"]

# How long who has run into a timeout waits for the others to say that they have, too.
ROLL_CALL_S = 2.0
# How long the alarm may find out whether a failed collective is due to a peer's death.
ALARM_S = 3.0


class EPGroup:
    """Where this process stands among the ranks of a plan. Making one is collective.

    Parameters
    ----------
    process_group : ProcessGroup
        NCCL where ``device`` is a GPU, gloo where it is the CPU; all its members take part.
    store : Store
        Shared by the same processes; it tells who is missing when a collective does not end.
    num_ranks : int, optional
        Ranks of the plan, a multiple of the number of processes; by default as many.
    ranks_per_node : int, optional
        Ranks of the plan on one node; by default all.
    device : device
    timeout_s : float
        How long a step waits for its peers.
    nodes : bool
        Make the groups that exchanges by node need (:mod:`eplb.runtime.ep.exchange`); a node has
        to be whole processes then.

    Attributes
    ----------
    control : ProcessGroup
        The same processes over gloo, for words on the host.
    alarm : callable or None
        Called while this process waits for others, with 0.0, and where a collective has failed,
        with how many seconds it may look into it; raises where peers are known to be dead.
    on_abort : list of callable
        Called by :meth:`abort`: ends of waits on the device that are not torch's.

    Raises
    ------
    InvalidInput
        Ranks do not divide evenly over processes or nodes, or the timeout is none.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        store: Store,
        *,
        num_ranks: int | None = None,
        ranks_per_node: int | None = None,
        device: torch.device | str = "cpu",
        timeout_s: float = 60.0,
        nodes: bool = False,
    ) -> None:
        _check_timeout(timeout_s)
        self.process_group = process_group
        self.store = store
        self.process = dist.get_rank(process_group)
        self.num_processes = dist.get_world_size(process_group)
        self.num_ranks = self.num_processes if num_ranks is None else num_ranks
        self.ranks_per_node = self.num_ranks if ranks_per_node is None else ranks_per_node
        self.device = torch.device(device)
        self.timeout_s = timeout_s
        self.alarm: Callable[[float], None] | None = None
        self.on_abort: list[Callable[[], None]] = []
        _check_division(self.num_ranks, self.num_processes, self.ranks_per_node)
        self.num_nodes = self.num_ranks // self.ranks_per_node
        self.ranks_per_process = self.num_ranks // self.num_processes
        self.first_rank = self.process * self.ranks_per_process
        self.control = self._make_group(range(self.num_processes), "gloo")
        self.node_group: dist.ProcessGroup | None = None
        self.rail_group: dist.ProcessGroup | None = None
        if nodes:
            self._make_node_groups()

    @classmethod
    def from_environment(
        cls,
        *,
        num_ranks: int | None = None,
        ranks_per_node: int | None = None,
        backend: str | None = None,
        timeout_s: float = 60.0,
        nodes: bool = False,
    ) -> EPGroup:
        """Start torch.distributed from what ``torchrun`` sets, and use all of its processes.

        ``ranks_per_node`` is by default what torchrun's LOCAL_WORLD_SIZE makes of it; ``backend``
        is NCCL where there are GPUs, otherwise gloo.

        Raises
        ------
        InvalidInput
            torchrun's variables are not set, or the backend is neither.
        """
        _check_timeout(timeout_s)
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
        if missing:
            raise InvalidInput(
                f"{', '.join(missing)} not set in the environment; start the program by torchrun"
            )
        backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        if backend not in {"nccl", "gloo"}:
            raise InvalidInput(f"backend {backend!r} is not known; use nccl or gloo")
        store, process, num_processes = next(
            rendezvous("env://", timeout=timedelta(seconds=max(timeout_s, 60.0)))
        )
        device = torch.device("cpu")
        if backend == "nccl":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", process)))
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            store=PrefixStore("eplb", store),
            rank=process,
            world_size=num_processes,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if backend == "nccl" else None,
        )
        if ranks_per_node is None:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
            ranks_per_node = (num_ranks or num_processes) * local // num_processes
        return cls(
            _world(),
            PrefixStore("eplb-roll-call", store),
            num_ranks=num_ranks,
            ranks_per_node=ranks_per_node,
            device=device,
            timeout_s=timeout_s,
            nodes=nodes,
        )

    @property
    def ranks(self) -> range:
        """Ranks of the plan that this process holds."""
        return range(self.first_rank, self.first_rank + self.ranks_per_process)

    @property
    def node(self) -> int:
        """Node of this process' first rank."""
        return self.first_rank // self.ranks_per_node

    def process_of(self, rank: int) -> int:
        """Return the process that holds a rank."""
        return rank // self.ranks_per_process

    def node_of(self, rank: int) -> int:
        """Return the node of a rank."""
        return rank // self.ranks_per_node

    def gather_text(self, text: str) -> list[str]:
        """Return what every process gave, in order. Collective, on the host."""
        found: list[str] = [""] * self.num_processes
        with self.watched("agreement"):
            dist.all_gather_object(found, text, group=self.control)
        return found

    def barrier(self) -> None:
        """Wait until every process is here. Collective, on the host."""
        with self.watched("barrier"):
            dist.barrier(group=self.control)

    @contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Turn the failure of a collective into an error that names who is missing.

        Raises
        ------
        ServingFailed
            A peer stayed away until the timeout, or its connection broke.
        """
        start = time.monotonic()
        try:
            yield
        except (RuntimeError, TimeoutError) as error:
            raise self.failure(what, time.monotonic() - start) from error

    def wait(self, event: torch.cuda.Event, what: str) -> None:
        """Wait on the host for an event on the device, for as long as a step may take.

        A collective of NCCL whose peer is gone never ends, so nothing may wait for it blindly.

        Raises
        ------
        ServingFailed
            It took longer than ``timeout_s``.
        """
        deadline = time.monotonic() + self.timeout_s
        while not event.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > deadline:
                raise self.failure(what, self.timeout_s)
            if self.alarm is not None:
                self.alarm(0.0)
        if self.alarm is not None:
            # Groups that were aborted end their collectives, with nothing in them.
            self.alarm(0.0)

    def abort(self) -> None:
        """End all waits for peers on the device; those of gloo end when a peer is gone."""
        self._end_waits()
        for process_group in (self.process_group, self.node_group, self.rail_group):
            if process_group is not None and dist.get_backend(process_group) == "nccl":
                abort: Callable[[], None] = process_group.abort
                abort()

    def failure(self, what: str, waited_s: float) -> ServingFailed:
        """Return the error of a collective that failed, with the processes that are missing.

        Each process that finds a failure says so in the store; who does not is stalled or gone.

        Raises
        ------
        ServingFailed
            The alarm knows better.
        """
        if self.alarm is not None:
            self.alarm(ALARM_S)
        self._end_waits()
        missing = self._roll_call()
        who = (
            f"no word from process{'es' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            if missing
            else "every process reports it"
        )
        return ServingFailed(
            f"{what}: process {self.process} waited {waited_s:.1f} s (timeout_s "
            f"{self.timeout_s:g}) for its peers, {who}; restart the group without what stalled, "
            "or give a longer timeout_s"
        )

    def _end_waits(self) -> None:
        """End the waits on the device that are not torch's."""
        for end in self.on_abort:
            end()

    def _roll_call(self) -> list[int]:
        try:
            self.store.set(f"failed/{self.process}", "1")
            absent = set(range(self.num_processes))
            deadline = time.monotonic() + ROLL_CALL_S
            while absent and time.monotonic() < deadline:
                absent -= {p for p in absent if self.store.check([f"failed/{p}"])}
                time.sleep(0.02)
        except RuntimeError:
            # The store went with the process that held it, the first.
            return [0]
        return sorted(absent)

    def _make_node_groups(self) -> None:
        """Make the groups of one node, and of the processes at one place in their nodes."""
        if self.ranks_per_node % self.ranks_per_process:
            raise InvalidInput(
                f"a node of {self.ranks_per_node} ranks is not whole processes of "
                f"{self.ranks_per_process} ranks; exchanges by node need that"
            )
        per_node = self.ranks_per_node // self.ranks_per_process
        backend = str(dist.get_backend(self.process_group))
        first = self.process // per_node * per_node
        self.node_group = self._make_group(range(first, first + per_node), backend)
        rail = range(self.process % per_node, self.num_processes, per_node)
        self.rail_group = self._make_group(rail, backend)

    def _make_group(self, processes: range, backend: str) -> dist.ProcessGroup:
        """Make a group of some of the processes, this one among them; the others take no part."""
        made = dist.new_group(
            [dist.get_global_rank(self.process_group, process) for process in processes],
            backend=backend,
            timeout=timedelta(seconds=self.timeout_s),
            use_local_synchronization=True,
        )
        assert isinstance(made, dist.ProcessGroup)
        return made


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _check_timeout(timeout_s: float) -> None:
    if not 0 < timeout_s < math.inf:
        raise InvalidInput(f"timeout_s must be positive and finite, got {timeout_s}")


def _check_division(num_ranks: int, num_processes: int, ranks_per_node: int) -> None:
    if num_ranks < 1 or num_ranks % num_processes:
        raise InvalidInput(
            f"num_ranks ({num_ranks}) must be a multiple of the {num_processes} processes; start "
            "as many processes as there are ranks, or a divisor of them"
        )
    if ranks_per_node < 1 or num_ranks % ranks_per_node:
        raise InvalidInput(
            f"num_ranks ({num_ranks}) must be divisible by ranks_per_node ({ranks_per_node})"
        )
