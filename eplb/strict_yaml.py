"""YAML read strictly: a key that comes twice is an error, and aliases are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from eplb.errors import InvalidInput

__all__ = ["StrictLoader", "read_mapping"]


class StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's safe loader without what no plan needs: keys that come twice, aliases, merge keys.

    A short file of aliases stands for any amount of data, which a digest would have to go through.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node that is not an alias."""
        if isinstance(node, yaml.CollectionNode) and node in self.constructed_objects:
            raise _refusal("aliases are not used in plans", node)
        return super().construct_object(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse merge keys."""
        if any(key_node.tag == "tag:yaml.org,2002:merge" for key_node, _ in node.value):
            raise _refusal("merge keys are not used in plans", node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node, whose keys are all different."""
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            # Compared as values: 1 and 0x1 are one layer.
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node)
                if key in seen:
                    raise _refusal(f"key {key_node.value!r} comes twice", key_node)
                seen.add(key)
        return mapping


def _refusal(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def read_mapping(path: str | os.PathLike[str], kind: str, layout: str) -> dict[Any, Any]:
    """Read a YAML file that holds one mapping.

    Parameters
    ----------
    path : path
    kind, layout : str
        What the file is, and what it looks like, for messages.

    Raises
    ------
    InvalidInput
        The file cannot be read, or is something else.
    """
    name = os.fspath(path)
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InvalidInput(f"{name} does not exist; check the path") from None
    except IsADirectoryError:
        raise InvalidInput(f"{name} is a directory; name a {kind} file") from None
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read {name}: {error}") from None
    if not data.strip():
        raise InvalidInput(f"{name} is empty; a {kind} is {layout}")
    try:
        document = yaml.load(data, Loader=StrictLoader)  # noqa: S506
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InvalidInput(f"{name}{where}: not the YAML of a {kind}: {problem}") from None
    except Exception as error:  # noqa: BLE001
        # PyYAML lets errors of the constructors of dates, numbers and sets through.
        raise InvalidInput(f"{name}: not a {kind}: {type(error).__name__}: {error}") from None
    if not isinstance(document, dict):
        raise InvalidInput(f"{name} is not a {kind}; a {kind} is {layout}")
    return document
