"""Finds the mixture-of-experts layers of a model, by structure.

Transformers (since version 5) calls the experts of nearly all of its families alike:
``experts(hidden_states, top_k_index, top_k_weights)``. A module whose forward takes such an index
is therefore a place to record at, whatever family it belongs to. The few families that route
inside of one module are reached by their router, which is told by its class.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from eplb.errors import InvalidInput

__all__ = ["INDEX_NAMES", "ROUTERS", "MoELayer", "find_layers"]

# How the forward of experts modules calls the logical experts chosen, [tokens, top_k].
INDEX_NAMES = ("top_k_index", "router_indices", "topk_indices", "topk_ids")

# Routers of families whose experts do not take the choice: where in their output the scores
# [tokens, experts] are that they take the top-k of (transformers 5.17 to 5.24). Their
# `top_k` says how many. JetMoe routes attention heads too; those are no experts to place.
ROUTERS: Mapping[str, tuple[int, str]] = {
    "Llama4Router": (1, ""),
    "JetMoeTopKGating": (4, "self_attention"),
}

_EXPERTS_IN_CONFIG = (
    "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts",
    "num_routed_experts",
)  # fmt: skip
_TOP_K_IN_CONFIG = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts", "top_k",
)  # fmt: skip
_MTP = re.compile(r"mtp|nextn")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoELayer:
    """One place to record at.

    Parameters
    ----------
    path : str
        Name of the module in the model.
    module : Module
        An experts module, or a router.
    scores_at : int, optional
        For a router, where in its output the scores are; None for an experts module.
    layer_id : int
        Absolute decoder layer id.
    is_mtp : bool
        A layer of multi-token prediction, behind the decoder's layers.
    num_experts : int
        Logical experts.
    num_columns : int
        Expert ids that occur: more than ``num_experts`` with identity ("zero") experts.
    top_k : int, optional
        Experts of a token, where the configuration says it.
    """

    path: str
    module: nn.Module
    scores_at: int | None
    layer_id: int
    is_mtp: bool
    num_experts: int
    num_columns: int
    top_k: int | None


def find_layers(model: nn.Module) -> tuple[MoELayer, ...]:
    """Return the mixture-of-experts layers of a model in the order of their ids.

    Raises
    ------
    InvalidInput
        There are none, or two of them have one layer id.
    """
    layers = tuple(sorted(_layers(model), key=lambda layer: (layer.is_mtp, layer.layer_id)))
    if not layers:
        raise InvalidInput(
            f"{type(model).__name__} has no mixture-of-experts layer that is known by its "
            "structure; if it has experts, call Recorder.observe where they are chosen"
        )
    seen: dict[int, str] = {}
    for layer in layers:
        if layer.layer_id in seen:
            raise InvalidInput(
                f"layer id {layer.layer_id} stands for {seen[layer.layer_id]} and for "
                f"{layer.path}; record the part of the model that holds only one of them"
            )
        seen[layer.layer_id] = layer.path
    if len({layer.num_experts for layer in layers}) > 1:
        counts = sorted({layer.num_experts for layer in layers})
        raise InvalidInput(
            f"layers have different numbers of experts ({counts}); record one kind with "
            "Recorder.observe"
        )
    return layers


def _layers(model: nn.Module) -> Iterator[MoELayer]:
    config = _text_config(model)
    depth = getattr(config, "num_hidden_layers", None)
    for path, module in model.named_modules():
        if "vision" in path:
            # Towers for images, and experts for image tokens, lie in layers of their own.
            continue
        scores_at = None
        if _takes_choice(module):
            num_experts, num_columns = _experts_of(module, config)
        elif type(module).__name__ in ROUTERS:
            scores_at, without = ROUTERS[type(module).__name__]
            if without and without in path.split("."):
                continue
            num_experts = num_columns = int(module.num_experts)
        else:
            continue
        number, is_mtp = _position(path, depth)
        yield MoELayer(
            path=path,
            module=module,
            scores_at=scores_at,
            layer_id=number,
            is_mtp=is_mtp,
            num_experts=num_experts,
            num_columns=num_columns,
            top_k=_first(config, _TOP_K_IN_CONFIG),
        )


def _takes_choice(module: nn.Module) -> bool:
    # An instance may run a forward of its own, where experts are parallel: ask the class.
    names = inspect.signature(type(module).forward).parameters
    return any(name in names for name in INDEX_NAMES) and len(list(module.parameters())) > 0


def _experts_of(module: nn.Module, config: Any) -> tuple[int, int]:
    """Return how many experts there are, and how many ids."""
    routed = getattr(module, "num_routed_experts", None) or getattr(module, "num_experts", None)
    if getattr(module, "_is_expert_parallel", False) or not isinstance(routed, int):
        # The module knows of its own part only.
        routed = _first(config, _EXPERTS_IN_CONFIG)
    if not routed:
        raise InvalidInput(
            f"{type(module).__name__} does not say how many experts it has; use Recorder.observe"
        )
    total = getattr(module, "total_experts", routed)
    return int(routed), max(int(routed), int(total))


def _position(path: str, depth: int | None) -> tuple[int, bool]:
    """Return the layer id that a module's name holds, and whether it is behind the decoder."""
    words = path.split(".")
    numbers = [int(word) for word in words if word.isdecimal()]
    layer_id = numbers[0] if numbers else 0
    mtp = any(_MTP.match(word) for word in words)
    if mtp and depth is not None and layer_id < depth:
        layer_id += depth
    return layer_id, mtp or (depth is not None and layer_id >= depth)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
