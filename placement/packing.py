"""Longest-first packing of items into packs of equal size, for many rows at once.

This is the packing step of DeepSeek's EPLB: items in order of falling weight, each into the
lightest pack that has room, the first of equally light ones. Weights add up in float32, as there.

Done one item at a time this is I dependent steps. But while the packs that were light at the start
of a round are still lighter than what the round has made of the packs before them, the next items
go to them in that order; packs that the round fills are out of the way. So a round of up to one
item a pack is a sort and a running minimum. Real loads take about as many rounds as a pack has
places.

Shape letters: X rows, I items, P packs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import IntArray, take_rows

__all__ = ["falling_order", "pack_balanced"]

# A key holds a float32 in its upper and an index in its lower half. Non-negative floats sort as
# their bits do, so one integer comparison finds the lightest, the first of equals. The halves are
# read and written as views of an int64, whose second half is the upper one on a little-endian
# machine.
_FLOAT, _INDEX = np.dtype("<f4"), np.dtype("<u4")
_FULL = np.int64(int(np.float32(np.inf).view(np.int32)) << 32)


def falling_order(weight_XI: NDArray[np.float32]) -> IntArray:
    """Return the items of each row by falling weight, equals by index, shape [X, I]."""
    key = np.empty(weight_XI.shape, np.int64)
    upper = key.view(np.dtype("<i4"))[:, 1::2]
    np.negative(weight_XI.view(np.int32), out=upper)
    key.view(_INDEX)[:, 0::2] = np.arange(weight_XI.shape[1])
    key.sort(axis=1)
    return key.view(_INDEX)[:, 0::2].astype(np.int64)


def pack_balanced(weight_XI: NDArray[np.float32], order_XI: IntArray, num_packs: int) -> IntArray:
    """Return which item each place holds, shape [X, I]; pack p owns places p*I/P to (p+1)*I/P.

    Places of a pack are in order of assignment.

    Parameters
    ----------
    weight_XI : array of float32
        Non-negative, with finite sums; I is a multiple of ``num_packs``.
    order_XI : array of int64
        Items by falling weight, as :func:`falling_order` gives them.
    num_packs : int
        P.
    """
    num_rows, num_items = weight_XI.shape
    pack_size = num_items // num_packs
    assert pack_size * num_packs == num_items
    if pack_size == 1:
        return np.tile(np.arange(num_items), (num_rows, 1))

    sorted_XI = take_rows(weight_XI, order_XI)
    is_last = np.tile(np.arange(num_items) % pack_size == pack_size - 1, num_rows)
    content = np.empty(num_rows * num_items, np.int64)

    # Key of a pack: its weight, and the next place to fill, counted through all rows.
    key_XP = np.arange(0, num_rows * num_items, pack_size).reshape(num_rows, num_packs)
    # The item that each would take, counted likewise. Beyond the last item of its row there are
    # only full packs, which take whatever item it is without effect.
    at_XP = np.arange(num_rows)[:, np.newaxis] * num_items + np.arange(num_packs)
    lightest_XP = np.full(key_XP.shape, _FULL)
    num_left = num_rows * num_items
    while num_left:
        place_XP = key_XP.view(_INDEX)[:, 0::2]
        new_XP = key_XP + 1
        new_XP.view(_FLOAT)[:, 1::2] += sorted_XI.take(at_XP, mode="clip")
        new_XP[is_last.take(place_XP)] = _FULL
        lightest_XP[:, 1:] = new_XP[:, :-1]
        taken_XP = key_XP < np.minimum.accumulate(lightest_XP, axis=1)
        num_taken_X = taken_XP.sum(axis=1)
        num_round = int(num_taken_X.sum())
        num_left -= num_round
        if num_round == taken_XP.size:
            content[place_XP] = order_XI.take(at_XP)
            key_XP = new_XP
        else:
            content[place_XP[taken_XP]] = order_XI.take(at_XP[taken_XP])
            key_XP[taken_XP] = new_XP[taken_XP]
        at_XP += num_taken_X[:, np.newaxis]
        key_XP.sort(axis=1)
    return content.reshape(num_rows, num_items)
