"""Omni-placement: the pattern of experts on devices, ``.npy``, and activation dumps.

Source: omni-ai-npu/omni-infer at c8bc2bb, omni/accelerators/placement: omni_planner/
expert_mapping.py (ExpertMapping) for the pattern [devices, layers with experts, experts] of 0 and
1, omni_planner/cpp/placement_mapping.cpp for which replica a rank uses, omni_planner/cpp/
expert_activation.cpp for the dumps. A device holds its experts in order of
their ids, so the order of slots is lost; layers may have different numbers of slots.

Shape letters: W windows, L layers, E logical experts, R ranks, S slots, K slots of a rank.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import IntArray
from eplb.engines.engine import MOE_ORDINALS, Engine, EnginePlan
from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.plan import Plan
from eplb.slots import EMPTY, Placement
from eplb.source import Source, open_source, parsing
from eplb.topology import Topology

__all__ = ["OMNI", "omni_reader", "read_statistics"]

_DUMP = re.compile(r"activation_counts_recordstep_(\d{1,12})_rank_(\d{1,6})\.txt")
# Patterns and dumps are read whole; far above DeepSeek-V3 on 1,024 devices (60 MB).
_MAX_BYTES = 1 << 30


def _encode(placement: Placement, topology: Topology, suffix: str) -> bytes:
    slots_LRK = placement.phys_to_log_LS.reshape(
        placement.num_layers, topology.num_ranks, topology.slots_per_rank
    )
    pattern_RLE = np.zeros(
        (topology.num_ranks, placement.num_layers, placement.num_experts), np.int64
    )
    layer, rank, slot = np.nonzero(slots_LRK != EMPTY)
    pattern_RLE[rank, layer, slots_LRK[layer, rank, slot]] = 1
    _check_counts(pattern_RLE, placement.layer_ids)
    stream = io.BytesIO()
    np.save(stream, pattern_RLE.astype(np.int32))
    return stream.getvalue()


def _check_counts(pattern_RLE: IntArray, layer_ids: tuple[int, ...]) -> None:
    """Refuse a device with more experts than the engine makes room for.

    It is the largest number of a layer divided by the devices (ExpertMapping.__init__).
    """
    count_RL = pattern_RLE.sum(axis=2)
    room = int(count_RL.sum(axis=0).max()) // len(count_RL)
    if count_RL.max() > room:
        rank, layer = (int(i) for i in np.argwhere(count_RL > room)[0])
        raise InvalidInput(
            f"omni makes room for {room} experts on each device and rank {rank} has "
            f"{int(count_RL[rank, layer])} in layer {layer_ids[layer]}; plan the same number of "
            "slots for every rank"
        )


def _read(source: Source, num_ranks: int) -> EnginePlan:
    with parsing(source, ".npy array"):
        if source.path.stat().st_size > _MAX_BYTES:
            raise InvalidInput(f"{source.name} is larger than any placement pattern")
        pattern_RLE = np.load(source.path, allow_pickle=False)
    if pattern_RLE.ndim != 3 or 0 in pattern_RLE.shape or pattern_RLE.dtype.kind not in "iub":
        raise InvalidInput(
            f"{source.name} must be whole numbers [devices, layers, experts], got "
            f"{pattern_RLE.dtype} of {list(pattern_RLE.shape)}"
        )
    if not np.isin(pattern_RLE, (0, 1)).all():
        raise InvalidInput(f"{source.name} must hold 0 and 1 only: an expert is there or not")
    if len(pattern_RLE) != num_ranks:
        raise InvalidInput(
            f"{source.name} is for {len(pattern_RLE)} devices, not {num_ranks} ranks; correct "
            "--nodes and --ranks-per-node"
        )
    return EnginePlan(
        phys_to_log_LS=_slots(pattern_RLE != 0),
        layer_ids=tuple(range(pattern_RLE.shape[1])),
        num_experts=pattern_RLE.shape[2],
        notes=("the file does not tell the order of slots on a rank: taken by expert id",),
    )


def _slots(pattern_RLE: NDArray[np.bool_]) -> IntArray:
    """Return the experts of each device by id, filled up with empty slots, shape [L, S]."""
    num_ranks, num_layers, _ = pattern_RLE.shape
    count_RL = pattern_RLE.sum(axis=2)
    slots_LRK = np.full((num_layers, num_ranks, max(1, int(count_RL.max()))), EMPTY, np.int64)
    rank, layer, expert = np.nonzero(pattern_RLE)
    slot = (np.cumsum(pattern_RLE, axis=2) - 1)[rank, layer, expert]
    slots_LRK[layer, rank, slot] = expert
    return slots_LRK.reshape(num_layers, -1)


def read_statistics(source: Source, placement: Placement | None = None) -> LoadProfile:
    """Read a folder of dumps, one window a record step.

    A dump of rank 0 alone has the slots of all ranks in its columns; else each rank has its own.

    Parameters
    ----------
    source : Source
        The folder.
    placement : Placement, optional
        What the slots held, as it was imported with ``eplb import``. Without it they held each
        expert once, in order, as the engine starts with.

    Raises
    ------
    InvalidInput
        A dump is missing, is no table of counts, or has another shape than the others.
    """
    files: dict[int, dict[int, Path]] = {}
    for path in sorted(source.path.iterdir()):
        if found := _DUMP.fullmatch(path.name):
            files.setdefault(int(found[1]), {})[int(found[2])] = path
    if not files:
        raise InvalidInput(f"{source.name} has no activation_counts_recordstep_*_rank_*.txt")
    ranks = sorted({rank for of_step in files.values() for rank in of_step})
    windows: list[IntArray] = []
    for step, of_step in sorted(files.items()):
        if sorted(of_step) != ranks:
            odd = min(set(ranks) ^ set(of_step))
            raise InvalidInput(f"{source.name}: step {step} has no dump of rank {odd}")
        with parsing(source, "recording"):
            window = np.concatenate([_table(of_step[rank]) for rank in ranks], axis=1)
        if windows and window.shape != windows[0].shape:
            raise InvalidInput(
                f"{source.name}: step {step} has [layers, slots] {list(window.shape)} and another "
                f"step {list(windows[0].shape)}; they must agree"
            )
        windows.append(window)
    counts = np.stack(windows)
    metadata = {"engine": "omni", "layer_numbering": MOE_ORDINALS}
    if placement is None:
        metadata["assumes"] = "each expert in one slot, in order"
    else:
        counts = _logical(counts, placement, source)
    return LoadProfile.from_counts(
        counts,
        # Folders that the engine's guide asks for.
        phase={"prefill": "prefill", "decoder": "decode"}.get(source.path.name, "mixed"),
        metadata=metadata,
        source=source.name,
    )


def omni_reader(placement: Placement) -> Callable[[str], LoadProfile]:
    """Return a reader of dumps from a server that served this placement."""

    def read(spec: str) -> LoadProfile:
        source = open_source(spec, folder=True)
        if not source.path.is_dir():
            raise InvalidInput(f"{source.name} is not a folder of Omni-placement's dumps")
        return read_statistics(source, placement)

    return read


def _table(path: Path) -> IntArray:
    source = Source(path=path, array=None, name=path.name)
    with parsing(source, "table of counts"):
        lines = path.read_text(encoding="ascii").splitlines()
        rows = [[int(cell) for cell in line.split()] for line in lines if line.strip()]
        if not rows:
            raise ValueError("it has no rows")
        return np.array(rows, np.int64)


def _logical(counts_WLS: IntArray, placement: Placement, source: Source) -> IntArray:
    """Return the counts of logical experts, summed over their slots, shape [W, L, E]."""
    rows_LS = placement.phys_to_log_LS
    if counts_WLS.shape[1:] != rows_LS.shape:
        raise InvalidInput(
            f"{source.name} has [layers, slots] {list(counts_WLS.shape[1:])} and the placement "
            f"{list(rows_LS.shape)}; give the one that was served"
        )
    counts_WLE = np.zeros((*counts_WLS.shape[:2], placement.num_experts + 1), np.int64)
    layer = np.arange(len(rows_LS))[:, np.newaxis]
    for window, counts_LS in enumerate(counts_WLS):
        # Empty slots, -1, are added up in a last column that is left out.
        np.add.at(counts_WLE[window], (layer, rows_LS), counts_LS)
    return counts_WLE[:, :, :-1]


def _remarks(plan: Plan) -> tuple[str, ...]:
    """Tell what is lost; replicas are chosen by PlacementMapping::update_selector_layer."""
    remarks = ["the order of slots on a rank is lost: a device holds its experts by id"]
    if plan.split != "nearest":
        remarks.append(
            f"a rank uses its own replica, else one of its node, else one of all: nearest, not "
            f"{plan.split!r}; check the balance with `eplb evaluate --split nearest`"
        )
    return tuple(remarks)


def _launch(plan: Plan, placement: Placement, path: str, plan_path: str) -> tuple[str, ...]:
    return (
        "# in the engine's own configuration",
        "use_omni_placement: true",
        "omni_placement_config_path: /absolute/path/of/config.yaml",
        "# that config.yaml",
        f"pattern_path: {json.dumps(path)}",
        f"max_moe_layer_num: {placement.num_layers}",
        "# true makes room by max_redundant_per_rank instead of by the pattern",
        "enable_dynamic: False",
        "max_redundant_per_expert: 10",
        "max_redundant_per_rank: 1",
        "max_batch_size: 100000",
        f"max_top_k: {plan.model.top_k or 8}",
        "enable_dump: False",
    )


OMNI = Engine(
    name="omni",
    release="omni-infer c8bc2bb",
    suffixes=(".npy",),
    rows=MOE_ORDINALS,
    empty_slots=True,
    shared_ranks="its pattern can only say that a device has an expert, not how often",
    encode=_encode,
    read=_read,
    remarks=_remarks,
    launch=_launch,
)
