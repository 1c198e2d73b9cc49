"""Whether all processes hold the same plan, and one that fits: what they agree on before a swap.

Each process writes what it proposes into the store and reads what the others did; nothing waits.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass

from torch.distributed.distributed_c10d import Store

from eplb.errors import InvalidInput, MigrationFailed
from eplb.plan import Plan

__all__ = ["Proposal", "ProposalBoard", "check_successor"]


@dataclass(frozen=True, slots=True)
class Proposal:
    """What has to be equal on all processes."""

    old_digest: str
    new_digest: str
    layout_digest: str
    spare_rows: int


class ProposalBoard:
    """Where the processes' proposals for one swap are gathered.

    Parameters
    ----------
    store : Store
        If it is gone, so is the process that served it; only what cannot do without it says so.
    process, num_processes : int
    """

    def __init__(self, store: Store, process: int, num_processes: int) -> None:
        self._store, self._process = store, process
        self._num_processes = num_processes

    def publish(self, epoch: int, proposal: Proposal) -> None:
        """Say what this process proposes."""
        self._store.set(self._key(epoch, self._process), json.dumps(asdict(proposal)))

    def absent(self, epoch: int) -> list[int]:
        """Return the processes that have proposed nothing yet."""
        with contextlib.suppress(RuntimeError):
            keys = enumerate(self._keys(epoch))
            return [process for process, key in keys if not self._store.check([key])]
        return []

    def check(self, epoch: int) -> bool:
        """Return whether all have proposed, and the same.

        Raises
        ------
        MigrationFailed
            They have proposed different things.
        """
        if not self._store.check(self._keys(epoch)):
            return False
        texts = [text.decode() for text in self._store.multi_get(self._keys(epoch))]
        own = texts[self._process]
        if all(text == own for text in texts):
            return True
        theirs = {p: json.loads(text) for p, text in enumerate(texts) if text != own}
        process, other = next(iter(theirs.items()))
        field, mine = next(
            (name, value) for name, value in json.loads(own).items() if other[name] != value
        )
        raise MigrationFailed(
            f"process{'es' * (len(theirs) > 1)} {', '.join(map(str, theirs))} and process "
            f"{self._process} disagree: {field} is {other[field]} on process {process} and {mine} "
            "here; give every process the same plan"
        )

    def explain(self, epoch: int, text: str) -> None:
        """Say why this process rolled a swap back, for the others' errors."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"why/{epoch}/{self._process}", text)

    def explanation(self, epoch: int, process: int) -> str | None:
        """Return what a process said of why it rolled back, if it has."""
        key = f"why/{epoch}/{process}"
        with contextlib.suppress(RuntimeError):
            return self._store.get(key).decode() if self._store.check([key]) else None
        return None

    def clear(self, epoch: int) -> None:
        """Remove what this process has written for a swap."""
        for key in (self._key(epoch, self._process), f"why/{epoch}/{self._process}"):
            with contextlib.suppress(RuntimeError):
                self._store.delete_key(key)

    def _keys(self, epoch: int) -> list[str]:
        return [self._key(epoch, process) for process in range(self._num_processes)]

    @staticmethod
    def _key(epoch: int, process: int) -> str:
        return f"plan/{epoch}/{process}"


def check_successor(old: Plan, new: Plan) -> None:
    """Refuse a plan that cannot follow the one in force.

    Raises
    ------
    InvalidInput
        It is for another model or revision, or of another shape.
    """
    facts = {
        "model": (old.model.name, new.model.name),
        "revision": (old.model.revision, new.model.revision),
        "experts": (old.model.num_experts, new.model.num_experts),
        "layers": (list(old.model.layer_ids), list(new.model.layer_ids)),
        "ranks": (old.topology.num_ranks, new.topology.num_ranks),
        "ranks a node": (old.topology.ranks_per_node, new.topology.ranks_per_node),
        "slots a rank": (old.topology.slots_per_rank, new.topology.slots_per_rank),
    }
    for what, (in_force, wanted) in facts.items():
        if in_force != wanted:
            raise InvalidInput(
                f"the plan is for {what} {wanted} and the weights in force are for {what} "
                f"{in_force}; plan for what is served"
            )
