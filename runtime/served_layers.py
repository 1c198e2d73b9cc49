"""The layers that a manager takes charge of, which serve the plan that it is told."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import nn

from eplb.errors import InvalidInput
from eplb.plan import Plan
from eplb.runtime.batch_work import SwapLayer
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.layer import EPMoELayer
from eplb.runtime.ep.tables import PlacementTables

__all__ = ["layers_served"]


def layers_served(
    model: nn.Module | Iterable[SwapLayer], plan: Plan, group: EPGroup
) -> list[SwapLayer]:
    """Return the layers in the order of the plan's, which they have to serve.

    Raises
    ------
    InvalidInput
        They do not serve the plan, or a swap could not tell them apart or treat them alike.
    """
    found = _layers_of(model)
    if sorted(found) != list(plan.placement.layer_ids):
        raise InvalidInput(
            f"the model has expert layers {sorted(found)} and the plan "
            f"{list(plan.placement.layer_ids)}; attach the plan that is served"
        )
    layers = [found[layer_id] for layer_id in plan.placement.layer_ids]
    if len({layer.slots.layout.digest() for layer in layers}) > 1:
        raise InvalidInput("all layers' experts must have the same tensors; attach equal ones")
    num_slots = plan.topology.slots_per_rank * group.ranks_per_process
    for layer, slots_S in zip(layers, plan.placement.phys_to_log_LS, strict=True):
        if layer.slots.num_slots != num_slots:
            raise InvalidInput(
                f"layer {layer.layer_id} has {layer.slots.num_slots} slots on this process and "
                f"the plan {num_slots}; attach the plan that is served"
            )
        tables = getattr(layer, "tables", None)
        if isinstance(tables, PlacementTables) and not np.array_equal(
            tables.phys_to_log_S, slots_S
        ):
            raise InvalidInput(
                f"layer {layer.layer_id} serves another placement than the plan's; attach the "
                "plan that is served"
            )
    return layers


def _layers_of(model: nn.Module | Iterable[SwapLayer]) -> dict[int, SwapLayer]:
    """Return the layers by their id."""
    layers: Iterable[SwapLayer] = (
        [module for module in model.modules() if isinstance(module, EPMoELayer)]
        if isinstance(model, nn.Module)
        else model
    )
    found: dict[int, SwapLayer] = {}
    for layer in layers:
        if layer.layer_id in found:
            raise InvalidInput(f"two layers have the id {layer.layer_id}; attach each once")
        found[layer.layer_id] = layer
    if not found:
        raise InvalidInput("the model has no expert-parallel layer; give the layers themselves")
    return found
