"""Options that say which cluster and which model, and the topology and model that they name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import click

from eplb.cli.options import Machine, Name
from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.model import MODEL_PRESETS, UNKNOWN_MODEL, MoEModel, model_preset
from eplb.topology import TOPOLOGY_PRESETS, Topology, topology_preset
from eplb.topology_file import is_topology_file, read_topology

__all__ = ["model_of", "problem_options", "topology_of"]

F = TypeVar("F", bound=Callable[..., Any])


def problem_options(command: F) -> F:
    """Add the options that :func:`topology_of` and :func:`model_of` read."""
    options = (
        click.option("--nodes", type=click.IntRange(min=1), help="Nodes of the cluster."),
        click.option(
            "--ranks-per-node",
            type=click.IntRange(min=1),
            help="Ranks (GPUs) of a node; needed unless --topology says.",
        ),
        click.option(
            "--slots-per-rank",
            type=click.IntRange(min=1),
            help="Routed experts a rank holds for each layer, redundant ones included.",
        ),
        click.option(
            "--topology",
            type=Machine(),
            help=f"Machine, for bandwidths in the plan: {', '.join(TOPOLOGY_PRESETS)}, or a file "
            "of a measured cluster, which can give the counts too.",
        ),
        click.option(
            "--model",
            type=Name("model preset", MODEL_PRESETS),
            help="Model, for names and sizes in the plan: " + ", ".join(MODEL_PRESETS) + ".",
        ),
        click.option(
            "--groups", type=click.IntRange(min=1), help="Groups of group-limited routing."
        ),
        click.option(
            "--hierarchical", is_flag=True, help="Keep each group's experts within a node."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def topology_of(options: dict[str, Any]) -> Topology:
    """Return the topology that the options describe."""
    counts = {
        "num_nodes": options["nodes"],
        "ranks_per_node": options["ranks_per_node"],
        "slots_per_rank": options["slots_per_rank"],
    }
    name = options["topology"]
    if name is not None and is_topology_file(name):
        return read_topology(name, **counts)
    for option, count in (("nodes", "num_nodes"), ("slots-per-rank", "slots_per_rank")):
        if counts[count] is None:
            raise InvalidInput(f"--{option} is missing; give it, or a file with --topology")
    if name is not None:
        return topology_preset(name, **counts)
    if options["ranks_per_node"] is None:
        raise InvalidInput("--ranks-per-node is missing; give it, or a machine with --topology")
    return Topology(**counts)


def model_of(profile: LoadProfile, options: dict[str, Any]) -> MoEModel:
    """Return the model named by an option or the profile, else one that is known by its shape."""
    name, groups = options["model"], options["groups"]
    recorded = profile.metadata.get("model")
    if name is None and isinstance(recorded, str) and recorded in MODEL_PRESETS:
        name = recorded
    if name is not None:
        model = model_preset(name)
        # A recording may lack layers, or have multi-token prediction layers after the last one.
        strange = [
            i
            for i in profile.layer_ids
            if i not in model.layer_ids and (model.num_layers is None or i < model.num_layers)
        ]
        if strange:
            raise InvalidInput(
                f"{profile.source} has load in layer {strange[0]}, where {name} has no experts; "
                "choose the model the loads were recorded from"
            )
        model = replace(model, layer_ids=profile.layer_ids)
    else:
        model = MoEModel(
            name=recorded if isinstance(recorded, str) else UNKNOWN_MODEL,
            num_experts=profile.num_experts,
            layer_ids=profile.layer_ids,
            num_groups=_recorded_count(profile, "num_groups") or 1,
            top_k=_recorded_count(profile, "top_k"),
        )
    if groups is not None and groups != model.num_groups:
        if model.num_experts % groups:
            raise InvalidInput(
                f"--groups {groups} does not divide the {model.num_experts} experts of a layer"
            )
        model = replace(
            model, num_groups=groups, groups_per_token=min(model.groups_per_token, groups)
        )
    if options["hierarchical"] and groups is None and model.num_groups == 1:
        raise InvalidInput(
            "--hierarchical needs the number of routing groups; give --groups, or a --model that "
            "has groups"
        )
    return model


def _recorded_count(profile: LoadProfile, key: str) -> int | None:
    value = profile.metadata.get(key)
    return value if type(value) is int and 0 < value <= profile.num_experts else None
