"""Sampled token routings: the experts that each token chose, ``[T, L, K]``, of E in a layer."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import IntArray
from eplb.errors import InvalidInput, unknown_name
from eplb.profiles.journal import read_records
from eplb.profiles.numpy_file import Members
from eplb.source import JOURNAL_SUFFIX, open_source, parsing

__all__ = ["co_activation", "read_routings"]


def read_routings(spec: str | os.PathLike[str]) -> NDArray[Any]:
    """Read routings from ``.npy``, ``file.npz:array``, or the array ``routings`` of an ``.npz``.

    Returns
    -------
    topk_TLK : array of int
        Logical experts, shape [tokens, layers, top_k].

    Raises
    ------
    InvalidInput
        The file cannot be read or holds something else.
    """
    source = open_source(spec)
    if source.suffix == ".npz":
        members = Members(source)
        name = source.array or "routings"
        if name not in members:
            raise unknown_name(f"array in {source.path.name}:", name, members.names)
        topk_TLK = members.read(name)
    elif source.suffix == JOURNAL_SUFFIX:
        name = source.array or "routings"
        records = [record for _, record in read_records(source.path)][1:]
        if not any(name in record for record in records):
            raise InvalidInput(f"{source.name} has no array {name!r}; record with sample_tokens")
        topk_TLK = np.concatenate([record[name] for record in records if name in record])
    elif source.suffix == ".npy":
        with parsing(source, ".npy array"):
            topk_TLK = np.array(np.lib.format.open_memmap(source.path, mode="r"))
    else:
        raise unknown_name(f"format of routings {source.name}:", source.suffix, (".npy", ".npz"))
    if topk_TLK.ndim != 3 or topk_TLK.dtype.kind not in "iu" or 0 in topk_TLK.shape:
        raise InvalidInput(
            f"{source.name}: routings must be whole numbers [tokens, layers, top_k], got "
            f"{topk_TLK.dtype} of {list(topk_TLK.shape)}"
        )
    return topk_TLK


def co_activation(topk_TLK: NDArray[Any], num_experts: int) -> IntArray:
    """Count how often two experts were chosen by one token.

    Parameters
    ----------
    topk_TLK : array of int, shape [T, L, K]
        Sampled routings; ids that are no expert (-1: not routed) do not count.
    num_experts : int
        E.

    Returns
    -------
    pairs_LEE : array of int64, shape [L, E, E]
        Symmetric; the diagonal is how often an expert was chosen.
    """
    num_tokens, num_layers, _ = topk_TLK.shape
    pairs_LEE = np.zeros((num_layers, num_experts, num_experts), np.int64)
    for layer in range(num_layers):
        ids_TK = topk_TLK[:, layer].astype(np.int64)
        real = (ids_TK >= 0) & (ids_TK < num_experts)
        chosen_TE = np.zeros((num_tokens, num_experts), np.float32)
        chosen_TE[np.nonzero(real)[0], ids_TK[real]] = 1
        # Sums of ones are exact in float32 up to 2**24 tokens, and a matrix product is fast.
        for start in range(0, num_tokens, 1 << 24):
            part_TE = chosen_TE[start : start + (1 << 24)]
            pairs_LEE[layer] += (part_TE.T @ part_TE).astype(np.int64)
    return pairs_LEE
