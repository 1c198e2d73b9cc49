"""``rebalance_experts`` with the signature, results and types of DeepSeek's ``eplb.py``."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import IntArray
from eplb.errors import InvalidInput
from eplb.placement.greedy import Order, place_greedy
from eplb.placement.packing import falling_order
from eplb.slots import replica_count

__all__ = ["rebalance_experts"]

# DeepSeek's arithmetic is float32, whose largest number is 3.4e38.
MAX_LAYER_LOAD = 1e38


def rebalance_experts(
    weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Any, Any, Any]:
    """Replicate and place experts exactly as DeepSeek's EPLB does.

    The hierarchical policy applies where nodes divide groups, the global one elsewhere. Results
    are DeepSeek's, two replicas of one expert on one rank included: :func:`eplb.solve` avoids
    those. Items of equal weight are taken by index. DeepSeek's code leaves their order to
    ``torch.sort``, which need not keep it: for a torch tensor torch sorts here too, so that ties
    fall as they do there.

    Parameters
    ----------
    weight : array or torch.Tensor, shape [L, E]
        Load of each logical expert.
    num_replicas : int
        S, physical experts of a layer; a multiple of ``num_gpus`` and at least E.
    num_groups : int
        Expert groups; divides E.
    num_nodes : int
        Divides ``num_gpus``.
    num_gpus : int
        R, ranks.

    Returns
    -------
    phy2log : int64, shape [L, S]
        Logical expert of each slot; slot s lies on rank ``s // (S / R)``.
    log2phy : int64, shape [L, E, X]
        Slots of each expert by replica, padded with -1; X is the largest replica count.
    logcnt : int64, shape [L, E]
        Replicas of each expert.

        Arrays where an array was given, tensors on the CPU where a tensor was.

    Raises
    ------
    InvalidInput
        Sizes that do not divide, fewer replicas than experts, or loads that are not loads.

    Examples
    --------
    >>> phy2log, log2phy, logcnt = rebalance_experts([[90, 132, 40, 61]], 6, 1, 1, 2)
    >>> phy2log
    array([[1, 3, 2, 1, 0, 0]])
    """
    # Whoever has a tensor has imported torch.
    torch: Any = sys.modules.get("torch")
    is_tensor = torch is not None and isinstance(weight, torch.Tensor)
    load = weight.detach().float().cpu().numpy() if is_tensor else np.asarray(weight)
    load_LE = _check_load(load)
    num_layers, num_experts = load_LE.shape
    _check_sizes(num_experts, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1

    def torch_order(values: NDArray[np.float32]) -> IntArray:
        order: IntArray = torch.from_numpy(values).sort(-1, descending=True).indices.numpy()
        return order

    order: Order = torch_order if is_tensor else falling_order
    phy2log, replica_LS = place_greedy(
        load_LE,
        num_slots=num_replicas,
        num_ranks=num_gpus,
        num_nodes=num_nodes,
        num_groups=num_groups,
        order=order,
    )
    row_LS = np.arange(num_layers)[:, np.newaxis]
    logcnt = replica_count(phy2log, num_experts)
    log2phy = np.full((num_layers, num_experts, int(logcnt.max())), -1, np.int64)
    log2phy[row_LS, phy2log, replica_LS] = np.arange(num_replicas)
    if not is_tensor:
        return phy2log, log2phy, logcnt
    return tuple(torch.from_numpy(array) for array in (phy2log, log2phy, logcnt))


def _check_load(load: NDArray[Any]) -> NDArray[np.float32]:
    if load.ndim != 2 or 0 in load.shape or load.dtype.kind not in "uifb":
        raise InvalidInput(
            f"weight must be numbers of the shape [layers, experts], got {load.dtype} of "
            f"{list(load.shape)}"
        )
    with np.errstate(over="ignore"):
        load_LE = np.ascontiguousarray(load, np.float32)
    if np.isnan(load_LE).any() or (load_LE < 0).any():
        raise InvalidInput("weight holds negative or NaN loads; give counts of tokens")
    if load_LE.sum(axis=1, dtype=np.float64).max() > MAX_LAYER_LOAD:
        raise InvalidInput("weight is too large to add up in float32; scale it down")
    # -0.0 would sort apart from 0.0.
    return load_LE + np.float32(0)


def _check_sizes(
    num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> None:
    for name, value in (
        ("num_replicas", num_replicas),
        ("num_groups", num_groups),
        ("num_nodes", num_nodes),
        ("num_gpus", num_gpus),
    ):
        if value < 1:
            raise InvalidInput(f"{name} must be at least 1, got {value}")
    if num_replicas < num_experts:
        raise InvalidInput(
            f"num_replicas ({num_replicas}) must be at least the {num_experts} experts; each "
            "needs a slot"
        )
    for name, value, divisor_name, divisor in (
        ("num_replicas", num_replicas, "num_gpus", num_gpus),
        ("num_gpus", num_gpus, "num_nodes", num_nodes),
        ("the number of experts", num_experts, "num_groups", num_groups),
    ):
        if value % divisor:
            raise InvalidInput(f"{name} ({value}) must be divisible by {divisor_name} ({divisor})")
