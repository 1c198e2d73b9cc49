"""Four kinds of text that every Python installation has, as bytes."""

from __future__ import annotations

import ast
import sysconfig
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "split_texts"]

KINDS = ("prose", "code", "tables", "names")
STDLIB = Path(sysconfig.get_path("stdlib"))


def split_texts(limit: int) -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[np.uint8]]]:
    """Return at most ``limit`` bytes of each kind to train on, and as many others a quarter."""
    train, unseen = {}, {}
    for kind in KINDS:
        data = np.frombuffer(_take(_PARTS[kind](), limit + limit // 4), np.uint8)
        cut = len(data) * 4 // 5
        train[kind], unseen[kind] = data[:cut], data[cut:]
    return train, unseen


def _take(parts: Iterator[str], limit: int) -> bytes:
    taken = bytearray()
    for part in parts:
        taken += part.encode("ascii", "replace")
        if len(taken) >= limit:
            break
    return bytes(taken[:limit])


def _modules() -> Iterator[str]:
    for folder in ("", "asyncio", "email", "http", "importlib", "json", "logging", "unittest"):
        for path in sorted((STDLIB / folder).glob("*.py")):
            yield path.read_text(encoding="utf-8", errors="replace")


def _prose() -> Iterator[str]:
    for source in _modules():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield (ast.get_docstring(node) or "") + "\n\n"


def _code() -> Iterator[str]:
    # Without comments and docstrings, which are prose.
    for source in _modules():
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and len(node.body) > 1:
                first = node.body[0]
                if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                    del node.body[0]
        yield ast.unparse(tree) + "\n\n"


def _tables() -> Iterator[str]:
    for path in sorted((STDLIB / "encodings").glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        _, _, table = text.partition("decoding_table = (")
        yield table


def _names() -> Iterator[str]:
    for code in range(0x10000):
        if name := unicodedata.name(chr(code), ""):
            yield f"U+{code:04X} {name}\n"


_PARTS = {"prose": _prose, "code": _code, "tables": _tables, "names": _names}
