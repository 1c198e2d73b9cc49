"""Array fields of frozen value objects: one dtype, contiguous, read-only, compared by value."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = ["FloatArray", "IntArray", "frozen_array", "take_rows"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def frozen_array(values: ArrayLike, dtype: DTypeLike) -> NDArray[Any]:
    """Return a contiguous read-only copy of ``values`` in ``dtype``."""
    array = np.array(values, dtype=dtype, order="C", copy=True)
    array.flags.writeable = False
    return array


def take_rows(values: NDArray[Any], index: NDArray[Any]) -> NDArray[Any]:
    """Return ``values[x, index[x, i]]`` for matrices of equally many rows.

    As ``np.take_along_axis(values, index, axis=1)``, several times faster on small matrices.
    """
    first = np.arange(0, values.size, values.shape[1])[:, np.newaxis]
    return values.reshape(-1).take(index + first)
