"""The machine a plan is made for: nodes, ranks, slots, and the links between ranks.

Presets carry the published figures of common clusters; what they say of bandwidth prices
migrations and is never used to score a placement. Speeds of ranks do score: a step waits for the
rank with the largest load / speed.

Shape letters: R ranks, K slots_per_rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput, unknown_name

__all__ = ["TOPOLOGY_PRESETS", "Topology", "topology_preset"]

# Far above any machine there is; keeps a typing error from asking for terabytes of slots.
MAX_SLOTS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Ranks of an expert-parallel group, node by node.

    Slot ``s`` lies on rank ``s // slots_per_rank`` and rank ``r`` on node ``r // ranks_per_node``,
    whether the rank is in service or not: numbers stay when a rank dies.

    Parameters
    ----------
    num_nodes, ranks_per_node, slots_per_rank : int
        At least 1 each. A slot holds the weights of one expert of one layer.
    name : str, optional
        The preset it came from.
    intra_node_bytes_per_s, inter_node_bytes_per_s : float, optional
        What one rank can send to a peer of its node, and to another node.
    rank_memory_bytes : int, optional
        Memory of one rank's accelerator.
    rank_slots : tuple of int, optional
        Slots of each rank where they differ, up to ``slots_per_rank``; those beyond are padding.
    rank_speed : tuple of float, optional
        Rows a rank serves in the time in which a rank of speed 1 serves one, where they differ.
    ranks_out_of_service : tuple of int
        They hold nothing and serve nothing.

    Raises
    ------
    InvalidInput
        A count below 1, a bandwidth or speed that is not positive, more than 2**20 slots, or ranks
        that do not exist.
    """

    num_nodes: int
    ranks_per_node: int
    slots_per_rank: int
    name: str | None = None
    intra_node_bytes_per_s: float | None = None
    inter_node_bytes_per_s: float | None = None
    rank_memory_bytes: int | None = None
    rank_slots: tuple[int, ...] | None = None
    rank_speed: tuple[float, ...] | None = None
    ranks_out_of_service: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("num_nodes", "ranks_per_node", "slots_per_rank"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise InvalidInput(f"{field} must be a whole number of at least 1, got {value!r}")
        if self.name is not None and type(self.name) is not str:
            raise InvalidInput(f"the name of a topology must be text, got {self.name!r}")
        # One type each, so that equal topologies have equal digests.
        for field, kind in (
            ("intra_node_bytes_per_s", float),
            ("inter_node_bytes_per_s", float),
            ("rank_memory_bytes", int),
        ):
            value = getattr(self, field)
            if value is None:
                continue
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise InvalidInput(f"{field} must be a positive number, got {value!r}")
            object.__setattr__(self, field, kind(value))
        if self.num_slots > MAX_SLOTS:
            raise InvalidInput(
                f"{self.num_nodes} nodes x {self.ranks_per_node} ranks x {self.slots_per_rank} "
                f"slots are {self.num_slots} slots, over the limit of {MAX_SLOTS}; check the counts"
            )
        self._check_ranks()

    def _check_ranks(self) -> None:
        """Bring what is said of single ranks into one form."""
        if self.rank_slots is not None:
            slots = self._of_ranks("rank_slots")
            if not all(type(n) is int and 1 <= n <= self.slots_per_rank for n in slots):
                raise InvalidInput(
                    f"rank_slots must be whole numbers from 1 to slots_per_rank "
                    f"({self.slots_per_rank}), which is the largest of them"
                )
            same = set(slots) == {self.slots_per_rank}
            object.__setattr__(self, "rank_slots", None if same else slots)
        if self.rank_speed is not None:
            speeds = self._of_ranks("rank_speed")
            if not all(type(x) in (int, float) and 0 < x < float("inf") for x in speeds):
                raise InvalidInput(
                    "rank_speed must be positive numbers, 1 for a rank of full speed"
                )
            speeds = tuple(map(float, speeds))
            object.__setattr__(self, "rank_speed", None if set(speeds) == {1.0} else speeds)
        out = self.ranks_out_of_service
        if not isinstance(out, (tuple, list)) or not all(
            type(r) is int and 0 <= r < self.num_ranks for r in out
        ):
            raise InvalidInput(
                f"ranks_out_of_service must be ranks from 0 to {self.num_ranks - 1}, got {out!r}"
            )
        if len(set(out)) == self.num_ranks:
            raise InvalidInput("all ranks are out of service; leave at least one in")
        object.__setattr__(self, "ranks_out_of_service", tuple(sorted(set(out))))

    def _of_ranks(self, field: str) -> tuple[Any, ...]:
        values = getattr(self, field)
        if not isinstance(values, (tuple, list)) or len(values) != self.num_ranks:
            raise InvalidInput(f"{field} must be {self.num_ranks} numbers, one a rank")
        return tuple(values)

    @property
    def num_ranks(self) -> int:
        """Ranks over all nodes."""
        return self.num_nodes * self.ranks_per_node

    @property
    def num_slots(self) -> int:
        """Slots of one layer over all ranks."""
        return self.num_ranks * self.slots_per_rank

    @property
    def label(self) -> str:
        """Short name as engineers write it: ``EP32x9`` is 32 ranks of 9 slots."""
        return f"EP{self.num_ranks}x{self.slots_per_rank}"

    @property
    def ranks_in_service(self) -> IntArray:
        """The ranks that serve, in order."""
        return np.setdiff1d(np.arange(self.num_ranks), self.ranks_out_of_service)

    @property
    def is_uniform(self) -> bool:
        """Whether all ranks are in service, with slots and speed alike."""
        return not self.ranks_out_of_service and self.rank_slots is None and self.rank_speed is None

    @property
    def speed_R(self) -> FloatArray:
        """Speed of each rank, 0 for one out of service."""
        speed_R = np.array(self.rank_speed or (1.0,) * self.num_ranks)
        speed_R[list(self.ranks_out_of_service)] = 0.0
        return speed_R

    @property
    def has_slot_RK(self) -> NDArray[np.bool_]:
        """Which slots a rank in service has, shape [R, slots_per_rank]; the others are padding."""
        slots_R = np.array(self.rank_slots or (self.slots_per_rank,) * self.num_ranks)
        slots_R[list(self.ranks_out_of_service)] = 0
        has: NDArray[np.bool_] = np.arange(self.slots_per_rank) < slots_R[:, np.newaxis]
        return has

    @property
    def num_usable_slots(self) -> int:
        """Slots of one layer on the ranks in service, without padding."""
        return int(self.has_slot_RK.sum())


# Figures are for one direction and one rank. Sources:
#   h800: 160 GB/s NVLink and a 400 Gb/s NIC per GPU, as DeepEP states for its H800 tests
#     (github.com/deepseek-ai/DeepEP, README, "Performance").
#   h100, h200: NVLink 4, 900 GB/s both ways (NVIDIA H100 and H200 datasheets); 400 Gb/s ConnectX-7
#     per GPU (DGX H100/H200 user guide).
#   b200-nvl72: NVLink 5, 1.8 TB/s both ways, 72 GPUs in one NVLink domain; ConnectX-7 400 Gb/s
#     per GPU; 186 GB (NVIDIA GB200 NVL72 datasheet).
#   ascend-910b: 392 GB/s HCCS both ways over the 8 NPUs of a node; 200 Gb/s RoCE per NPU
#     (Huawei Atlas 800T A2 white paper).
TOPOLOGY_PRESETS: dict[str, Topology] = {
    topology.name: topology
    for topology in (
        Topology(
            name=name,
            num_nodes=1,
            ranks_per_node=ranks_per_node,
            slots_per_rank=1,
            intra_node_bytes_per_s=intra,
            inter_node_bytes_per_s=inter,
            rank_memory_bytes=memory,
        )
        for name, ranks_per_node, intra, inter, memory in (
            ("h800", 8, 160e9, 50e9, 80_000_000_000),
            ("h100", 8, 450e9, 50e9, 80_000_000_000),
            ("h200", 8, 450e9, 50e9, 141_000_000_000),
            ("b200-nvl72", 72, 900e9, 50e9, 186_000_000_000),
            ("ascend-910b", 8, 196e9, 25e9, 64_000_000_000),
        )
    )
    if topology.name is not None
}


def topology_preset(
    name: str, *, num_nodes: int, slots_per_rank: int, ranks_per_node: int | None = None
) -> Topology:
    """Return a cluster of ``num_nodes`` nodes of a preset machine.

    Raises
    ------
    InvalidInput
        The preset is unknown, or a count is not usable.
    """
    if name not in TOPOLOGY_PRESETS:
        raise unknown_name("topology preset", name, TOPOLOGY_PRESETS)
    preset = TOPOLOGY_PRESETS[name]
    return replace(
        preset,
        num_nodes=num_nodes,
        slots_per_rank=slots_per_rank,
        ranks_per_node=preset.ranks_per_node if ranks_per_node is None else ranks_per_node,
    )
