"""YAML read strictly: a key that comes twice is an error, and aliases are."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["StrictLoader"]


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
