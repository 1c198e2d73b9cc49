"""JSON read strictly: a key that comes twice is an error, and so is what JSON has not.

Parsers take the last of two equal keys without a word; a layer written twice would lose one.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parse_json"]


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text.

    Raises
    ------
    ValueError
        The text is not JSON, has a key twice in one object, or a number that JSON has not.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice[:60]!r} comes twice")
    return values


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
