"""Request traces: when requests arrive, how long their prompts and outputs are.

Shape letters: Q requests, B prefix blocks of all requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from eplb.arrays import FloatArray, IntArray, frozen_array
from eplb.errors import InvalidInput

__all__ = ["RequestTrace"]

# Far above any context there is; keeps a typing error from overflowing sums.
MAX_TOKENS = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestTrace:
    """Requests in order of arrival.

    Parameters
    ----------
    arrival_s_Q : array of float64
        Seconds from the start of the trace, not falling.
    prompt_tokens_Q, output_tokens_Q : array of int64
        At least 1 each.
    first_block_Q : array of int64, shape [Q + 1]
        The blocks of request q are ``first_block_Q[q]`` to ``first_block_Q[q + 1]``.
    block_B : array of int64
        Ids of prefix blocks in order; equal ids hold equal tokens after equal prefixes.
    block_tokens : int
        Tokens of a block.
    source : str
    notes : tuple of str
        What a reader left out or put right.

    Raises
    ------
    InvalidInput
        No request, or values out of range.
    """

    arrival_s_Q: FloatArray
    prompt_tokens_Q: IntArray
    output_tokens_Q: IntArray
    first_block_Q: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    block_B: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    block_tokens: int = 512
    source: str = "requests"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt_tokens_Q", "output_tokens_Q", "first_block_Q", "block_B"):
            object.__setattr__(self, name, frozen_array(getattr(self, name), np.int64))
        object.__setattr__(self, "arrival_s_Q", frozen_array(self.arrival_s_Q, np.float64))
        count = len(self.arrival_s_Q)
        if not count:
            raise InvalidInput(f"{self.source} has no requests; give at least one")
        if not len(self.prompt_tokens_Q) == len(self.output_tokens_Q) == count:
            raise InvalidInput(f"{self.source}: arrivals and lengths must be equally many")
        for name in ("prompt_tokens_Q", "output_tokens_Q"):
            values = getattr(self, name)
            if values.min() < 1 or values.max() > MAX_TOKENS:
                raise InvalidInput(
                    f"{self.source}: {name} must be from 1 to {MAX_TOKENS}, got {values.min()} to "
                    f"{values.max()}"
                )
        gaps = np.diff(self.arrival_s_Q, prepend=0.0)
        if not np.isfinite(self.arrival_s_Q).all() or (gaps < 0).any():
            raise InvalidInput(f"{self.source}: arrivals must be finite, from 0 on and not fall")
        if not len(self.first_block_Q):
            object.__setattr__(self, "first_block_Q", frozen_array(np.zeros(count + 1), np.int64))
        if len(self.first_block_Q) != count + 1:
            raise InvalidInput(f"{self.source}: first_block_Q must have an entry a request and one")

    @property
    def num_requests(self) -> int:
        """Requests of the trace."""
        return len(self.arrival_s_Q)

    @property
    def has_blocks(self) -> bool:
        """Whether the trace tells which prompts begin alike."""
        return len(self.block_B) > 0

    def blocks(self, q: int) -> IntArray:
        """Return the prefix blocks of one request."""
        return self.block_B[self.first_block_Q[q] : self.first_block_Q[q + 1]]
