"""Prefix caches of ranks: which blocks each one has, least recently used ones dropped first.

Shape letters: R ranks.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from eplb.arrays import IntArray

__all__ = ["PrefixCaches"]


class PrefixCaches:
    """One cache a rank, or one that all ranks share.

    Parameters
    ----------
    num_ranks : int
    capacity_blocks : int
        Blocks a rank keeps (all of them together where the cache is shared).
    shared : bool
    """

    def __init__(self, num_ranks: int, capacity_blocks: int, *, shared: bool = False) -> None:
        self.num_ranks, self.shared = num_ranks, shared
        self.capacity_blocks = capacity_blocks
        num_caches = 1 if shared else num_ranks
        self._blocks: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_caches)]
        # For each block the ranks that have it, a bit each: a lookup walks a prefix once.
        self._holders: dict[int, int] = {}

    def cached_blocks_R(self, blocks: list[int]) -> IntArray:
        """Return how many leading blocks each rank has."""
        found_R = np.zeros(self.num_ranks, np.int64)
        holders = (1 << len(self._blocks)) - 1
        for depth, block in enumerate(blocks, start=1):
            holders &= self._holders.get(block, 0)
            if not holders:
                break
            if self.shared:
                found_R[:] = depth
                continue
            left = holders
            while left:
                lowest = left & -left
                found_R[lowest.bit_length() - 1] = depth
                left ^= lowest
        return found_R

    def add(self, rank: int, blocks: list[int]) -> None:
        """Note that a rank has computed or used these blocks; the last ones are dropped first."""
        at = 0 if self.shared else rank
        kept, bit = self._blocks[at], 1 << at
        # In reverse, so that the beginning of a prefix outlives its end.
        for block in reversed(blocks):
            if block in kept:
                kept.move_to_end(block)
            else:
                kept[block] = None
                self._holders[block] = self._holders.get(block, 0) | bit
        while len(kept) > self.capacity_blocks:
            block, _ = kept.popitem(last=False)
            left = self._holders[block] & ~bit
            if left:
                self._holders[block] = left
            else:
                del self._holders[block]

    def lose(self, rank: int) -> None:
        """Forget the cache of a rank."""
        if not self.shared:
            capacity, self.capacity_blocks = self.capacity_blocks, 0
            self.add(rank, [])
            self.capacity_blocks = capacity
