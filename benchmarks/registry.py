"""Named benchmarks with two axes: size and severity.

A spec builds its input once and returns what is timed. Benchmarks run once each, untimed, as a
test; ``run.py`` times them and writes JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["REGISTRY", "SEVERITIES", "SIZES", "Size", "Spec", "register", "synthetic_counts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Dimensions of a deployment."""

    layers: int
    experts: int
    nodes: int
    ranks_per_node: int
    slots_per_rank: int

    @property
    def ranks(self) -> int:
        """Ranks over all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def slots(self) -> int:
        """Slots of a layer."""
        return self.ranks * self.slots_per_rank


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        name: Size(layers=layers, experts=experts, nodes=n, ranks_per_node=m, slots_per_rank=k)
        for name, layers, experts, n, m, k in (
            ("ep8", 58, 256, 1, 8, 36),
            ("ep32", 58, 256, 4, 8, 9),
            ("ep64", 58, 256, 8, 8, 5),
            ("ep144", 58, 256, 18, 8, 2),
            ("kimi-ep32", 60, 384, 4, 8, 13),
        )
    }
)

# Standard deviation of log loads: 0 is what balanced training aims at, about 0.7 what DeepSeek-V3
# shows (its hottest expert has 4 to 10 times the mean). "one-hot" adds an expert with a quarter of
# all load, "drift" changes the loads from window to window.
SEVERITIES: Mapping[str, float] = MappingProxyType(
    {"uniform": 0.0, "skewed": 0.7, "one-hot": 0.7, "drift": 0.7}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One benchmark.

    Parameters
    ----------
    name : str
    setup : callable
        ``setup(**parameters)`` returns the callable that is timed.
    parameters : mapping
        Values for ``setup``; ``size`` and ``severity`` are names.
    """

    name: str
    setup: Callable[..., Callable[[], Any]]
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name with parameters."""
        return "/".join([self.name, *self.parameters.values()])


REGISTRY: dict[str, Spec] = {}


def register(**grid: tuple[str, ...]) -> Callable[[Callable[..., Callable[[], Any]]], Any]:
    """Register a set-up function once for each combination of parameters."""

    def decorate(setup: Callable[..., Callable[[], Any]]) -> Callable[..., Callable[[], Any]]:
        combinations: list[dict[str, str]] = [{}]
        for key, values in grid.items():
            combinations = [{**c, key: value} for c in combinations for value in values]
        for parameters in combinations:
            spec = Spec(name=setup.__name__, setup=setup, parameters=MappingProxyType(parameters))
            if spec.label in REGISTRY:
                raise ValueError(f"benchmark {spec.label} is registered twice")
            REGISTRY[spec.label] = spec
        return setup

    return decorate


def synthetic_counts(
    size: Size, severity: str, windows: int = 1, seed: int = 0
) -> NDArray[np.uint32]:
    """Return log-normal loads of a severity, shape [windows, layers, experts]. Simulated data."""
    random = np.random.default_rng(seed)
    shape = (size.layers, size.experts)
    log_load = random.normal(0.0, SEVERITIES[severity], shape)
    if severity == "one-hot":
        log_load[:, 0] = np.log(np.exp(log_load).sum(axis=1) / 3)
    step = 0.05 if severity == "drift" else 0.0
    walk = random.normal(0.0, 1.0, (windows, *shape)).cumsum(axis=0) * step
    load = np.exp(log_load + walk)
    load *= 32768 / load.sum(axis=2, keepdims=True)
    return random.poisson(load).astype(np.uint32)
