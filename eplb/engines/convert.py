"""Plans to and from the files of serving engines.

Refused is what an engine would load as something else, or not at all; reported is what it loads and
then treats otherwise than the plan says.

Shape letters: L layers, R ranks, S slots, K slots of a rank.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eplb.arrays import IntArray
from eplb.engines.engine import Engine, EnginePlan
from eplb.engines.layers import for_engine, from_engine
from eplb.engines.omni import OMNI
from eplb.engines.sglang import SGLANG
from eplb.engines.tensorrt_llm import TENSORRT_LLM
from eplb.engines.vllm import VLLM
from eplb.engines.vllm_ascend import VLLM_ASCEND
from eplb.errors import InvalidInput, PlacementInvalid, unknown_name
from eplb.files import check_writable, write_atomic
from eplb.model import UNKNOWN_MODEL, MoEModel
from eplb.plan import Plan
from eplb.slots import EMPTY, Placement
from eplb.source import Source, open_source
from eplb.topology import Topology

__all__ = ["ENGINES", "Export", "Import", "export_plan", "import_plan"]

ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (SGLANG, VLLM, TENSORRT_LLM, VLLM_ASCEND, OMNI)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What to know of a plan that was written as an engine's file.

    Parameters
    ----------
    remarks : tuple of str
        What the engine cannot express, and does otherwise.
    launch : tuple of str
        Lines to start the engine with.
    """

    remarks: tuple[str, ...]
    launch: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """An engine's file as a plan, and what the file could not tell."""

    plan: Plan
    remarks: tuple[str, ...]


def _engine(name: str) -> Engine:
    """Return an engine by name.

    Raises
    ------
    InvalidInput
        The name is unknown.
    """
    if name not in ENGINES:
        raise unknown_name("engine", name, ENGINES)
    return ENGINES[name]


def export_plan(
    plan: Plan,
    engine_name: str,
    path: str | os.PathLike[str],
    *,
    plan_path: str | os.PathLike[str] = "plan.yaml",
    moe_layers: Sequence[int] | None = None,
) -> Export:
    """Write a plan as an engine's file, atomically, after reading back what is to be written.

    Parameters
    ----------
    plan : Plan
    engine_name : str
        A key of ``ENGINES``.
    path : path
    plan_path : path
        Of the plan itself, for engines that read it through a plug-in.
    moe_layers : sequence of int, optional
        Decoder layers with experts, where the model is not a preset.

    Raises
    ------
    InvalidInput
        The engine would load something else than the plan, or the file cannot be written.
    """
    engine = _engine(engine_name)
    suffix = Path(path).suffix.lower()
    if suffix not in engine.suffixes:
        raise InvalidInput(
            f"{engine.name} reads plans from {' or '.join(engine.suffixes)}, not "
            f"{os.fspath(path)}; rename it"
        )
    check_writable(path)
    placement, remarks = for_engine(plan.placement, plan.model, engine.rows, moe_layers)
    remarks += _check_slots(placement, plan, engine)
    data = engine.encode(placement, plan.topology, suffix)
    _check_written(data, placement, plan.topology, engine, suffix)
    write_atomic(path, data)
    absolute = str(Path(path).absolute()), str(Path(plan_path).absolute())
    return Export(
        remarks=remarks + engine.remarks(plan),
        launch=engine.launch(plan, placement, *absolute),
    )


def _check_slots(placement: Placement, plan: Plan, engine: Engine) -> tuple[str, ...]:
    """Refuse slots that the engine cannot hold; return what it can, and should not."""
    rows_LS, per_rank = placement.phys_to_log_LS, plan.topology.slots_per_rank
    if not plan.topology.is_uniform:
        raise InvalidInput(
            f"{engine.name} cannot express ranks out of service, or of different slots or speed; "
            "make a plan of the ranks in service alone (eplb resize)"
        )
    if not engine.empty_slots and (rows_LS == EMPTY).any():
        layer, slot = (int(i) for i in np.argwhere(rows_LS == EMPTY)[0])
        raise InvalidInput(
            f"slot {slot} (rank {slot // per_rank}) of layer {placement.layer_ids[layer]} is empty "
            f"and {engine.name} needs an expert in every slot; plan without empty slots, with the "
            "same number on every rank"
        )
    held_LRK = np.sort(rows_LS.reshape(len(rows_LS), -1, per_rank), axis=2)
    again_LRK = (held_LRK[:, :, 1:] == held_LRK[:, :, :-1]) & (held_LRK[:, :, 1:] != EMPTY)
    if not again_LRK.any():
        return ()
    layer, rank, place = (int(i) for i in np.argwhere(again_LRK)[0])
    where = (
        f"layer {placement.layer_ids[layer]}, rank {rank}: expert "
        f"{int(held_LRK[layer, rank, place])} is there twice"
    )
    if engine.shared_ranks is None:
        repeated = f"{int(again_LRK.sum())} slots repeat an expert of their rank"
        return (f"{repeated}, which wastes memory ({where})",)
    raise InvalidInput(
        f"{where}, which {engine.name} cannot express: {engine.shared_ranks}; plan without "
        "--shared-ranks"
    )


def _check_written(
    data: bytes, placement: Placement, topology: Topology, engine: Engine, suffix: str
) -> None:
    """Read back what is to be written: our own invariant, not the user's fault."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "written" + suffix)
        path.write_bytes(data)
        found = engine.read(open_source(path), topology.num_ranks)
    same = (
        _by_rank(placement.phys_to_log_LS, topology) == _by_rank(found.phys_to_log_LS, topology)
        if engine.empty_slots
        else np.array_equal(placement.phys_to_log_LS, found.phys_to_log_LS)
    )
    assert same, f"{engine.name}: what was written reads otherwise"


def _by_rank(rows_LS: IntArray, topology: Topology) -> list[list[list[int]]]:
    """Return the experts of each rank by id, without empty slots."""
    return [
        [sorted(expert for expert in rank if expert != EMPTY) for rank in ranks]
        for ranks in rows_LS.reshape(len(rows_LS), topology.num_ranks, -1).tolist()
    ]


def import_plan(
    path: str | os.PathLike[str],
    engine_name: str,
    *,
    num_nodes: int,
    ranks_per_node: int,
    model: MoEModel | None = None,
    moe_layers: Sequence[int] | None = None,
    split: str = "even",
) -> Import:
    """Read an engine's file as a plan.

    Parameters
    ----------
    path : path
    engine_name : str
        A key of ``ENGINES``.
    num_nodes, ranks_per_node : int
        The file tells slots, not ranks.
    model : MoEModel, optional
        Of the plan; its layers with experts are the rows of the file.
    moe_layers : sequence of int, optional
        Decoder layers with experts, where the model is not given or not a preset.
    split : str
        The split rule the plan will run under.

    Raises
    ------
    InvalidInput
        The file is not a plan of this engine, or not of this model or topology.
    PlacementInvalid
        A layer lacks an expert, or has an unknown one.
    """
    engine = _engine(engine_name)
    source = open_source(path)
    if source.suffix not in engine.suffixes:
        raise InvalidInput(
            f"{engine.name} reads plans from {' or '.join(engine.suffixes)}, not {source.name}; "
            "check the path and the engine"
        )
    found = engine.read(source, num_nodes * ranks_per_node)
    try:
        return _plan_of(
            found, engine, source, (num_nodes, ranks_per_node), model, moe_layers, split
        )
    except (InvalidInput, PlacementInvalid) as error:
        raise type(error)(f"{source.name}: {error}") from None


def _plan_of(
    found: EnginePlan,
    engine: Engine,
    source: Source,
    nodes: tuple[int, int],
    model: MoEModel | None,
    moe_layers: Sequence[int] | None,
    split: str,
) -> Import:
    num_nodes, ranks_per_node = nodes
    num_slots, num_ranks = found.phys_to_log_LS.shape[1], num_nodes * ranks_per_node
    if num_slots % num_ranks:
        raise InvalidInput(
            f"{num_slots} slots cannot be divided over {num_ranks} ranks; correct --nodes and "
            "--ranks-per-node"
        )
    if model is not None and found.num_experts > model.num_experts:
        raise InvalidInput(
            f"the file has {found.num_experts} experts and {model.name} {model.num_experts}; give "
            "the model it was made for"
        )
    num_experts = found.num_experts if model is None else model.num_experts
    row_of, remarks = from_engine(found.layer_ids, engine.rows, model, moe_layers)
    layer_ids = tuple(row_of)
    if model is None:
        model = MoEModel(name=UNKNOWN_MODEL, num_experts=num_experts, layer_ids=layer_ids)
    plan = Plan(
        model=replace(model, layer_ids=layer_ids),
        topology=Topology(
            num_nodes=num_nodes,
            ranks_per_node=ranks_per_node,
            slots_per_rank=num_slots // num_ranks,
        ),
        placement=Placement(
            phys_to_log_LS=found.phys_to_log_LS[list(row_of.values())],
            layer_ids=layer_ids,
            num_experts=num_experts,
        ),
        split=split,
        provenance={
            "imported_from": engine.name,
            "file": source.name,
            "file_sha256": hashlib.sha256(source.path.read_bytes()).hexdigest(),
        },
    )
    return Import(plan=plan, remarks=found.notes + remarks)
