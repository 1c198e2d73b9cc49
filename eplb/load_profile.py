"""What a model's routers did: tokens routed to each logical expert, window by window.

Readers and writers of profile files are in :mod:`eplb.profiles`; this is the value they meet in.
Shape letters: W windows, L layers, E logical experts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eplb.arrays import FloatArray, frozen_array
from eplb.errors import InvalidInput, unknown_name

__all__ = ["PHASES", "LoadProfile", "merge_profiles"]

PHASES = ("prefill", "decode", "mixed")
DEFAULT_SCENARIO = "default"
# Sums over windows and experts stay finite, and shares of the smallest load do not vanish.
MIN_COUNT, MAX_COUNT = 1e-300, 1e300


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadProfile:
    """Expert loads of the mixture-of-experts layers of one model.

    Parameters
    ----------
    counts_WLE : array of float64, shape [W, L, E]
        Token-expert pairs routed to each logical expert. Finite, non-negative, at least one of
        them positive, and no layer without any (see :meth:`from_counts` for dense layers).
    layer_ids : sequence of int, length L
        Absolute decoder layer id of each layer, strictly increasing.
    scenario_W : sequence of str, length W
        The traffic a window belongs to (a customer, a time of day, a recording).
    phase_W : sequence of str, length W
        ``prefill``, ``decode`` or ``mixed``.
    tokens_W, time_s_W : array of float64, length W, optional
        Tokens of each window, and seconds at which it began.
    metadata : mapping
        Provenance, as JSON values.
    source : str
        Where it was read from, for messages.

    Raises
    ------
    InvalidInput
        Anything above does not hold.
    """

    counts_WLE: FloatArray
    layer_ids: tuple[int, ...]
    scenario_W: tuple[str, ...]
    phase_W: tuple[str, ...]
    tokens_W: FloatArray | None = None
    time_s_W: FloatArray | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: str = "array"

    def __post_init__(self) -> None:
        counts = _numeric(self.counts_WLE, self.source)
        if counts.ndim != 3 or 0 in counts.shape:
            raise InvalidInput(
                f"{self.source}: counts must have the shape [windows, layers, experts], each at "
                f"least 1; got {list(counts.shape)}"
            )
        _check_counts(counts, self.source)
        num_windows, num_layers, _ = counts.shape
        idle_L = ~counts.any(axis=(0, 2))
        if idle_L.any():
            raise InvalidInput(
                f"{self.source}: layer {_layer_name(self.layer_ids, int(idle_L.argmax()))} has no "
                "load in any window; drop dense layers (LoadProfile.from_counts does)"
            )
        ids = _whole_ids(self.layer_ids, self.source)
        if len(ids) != num_layers:
            raise InvalidInput(
                f"{self.source}: {len(ids)} layer_ids for {num_layers} layers of counts; give one "
                "a layer"
            )
        if ids[0] < 0 or any(b <= a for a, b in itertools.pairwise(ids)):
            raise InvalidInput(
                f"{self.source}: layer_ids must be non-negative and strictly increasing, got "
                f"{_preview(ids)}"
            )
        for name, labels in (("scenario", self.scenario_W), ("phase", self.phase_W)):
            if len(labels) != num_windows:
                raise InvalidInput(
                    f"{self.source}: {len(labels)} {name} labels for {num_windows} windows; give "
                    "one a window"
                )
        for phase in set(self.phase_W):
            if phase not in PHASES:
                raise unknown_name(f"phase in {self.source}:", phase, PHASES)
        # Adding 0.0 turns -0.0 into 0.0, so that equal loads have equal digests.
        object.__setattr__(self, "counts_WLE", frozen_array(counts + 0.0, np.float64))
        object.__setattr__(self, "layer_ids", ids)
        object.__setattr__(self, "scenario_W", tuple(map(str, self.scenario_W)))
        object.__setattr__(self, "phase_W", tuple(self.phase_W))
        for name in ("tokens_W", "time_s_W"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(
                    self, name, _window_values(values, num_windows, name[:-2], self.source)
                )

    @classmethod
    def from_counts(
        cls,
        counts: ArrayLike,
        *,
        layer_ids: Sequence[int] | None = None,
        scenario: str | Sequence[str] = DEFAULT_SCENARIO,
        phase: str | Sequence[str] = "mixed",
        tokens: ArrayLike | None = None,
        time_s: ArrayLike | None = None,
        metadata: Mapping[str, Any] | None = None,
        source: str = "array",
    ) -> LoadProfile:
        """Build a profile from ``[W, L, E]`` or ``[L, E]`` counts.

        Layers without load in any window are dense layers: they drop out and the others keep
        their ids. Windows without load in any layer were never recorded and drop out too.

        Raises
        ------
        InvalidInput
            Wrong rank of array, values that are not counts, nothing but zeros, or labels that do
            not fit the windows.
        """
        array = _numeric(counts, source)
        shape = list(array.shape)
        if array.ndim == 2:
            array = array[np.newaxis]
        if array.ndim != 3 or 0 in shape:
            raise InvalidInput(
                f"{source}: counts must be [layers, experts] or [windows, layers, experts], each "
                f"at least 1; got {len(shape)} dimension(s) of {shape}"
            )
        _check_counts(array, source)
        num_windows, num_layers, _ = array.shape
        ids = range(num_layers) if layer_ids is None else list(layer_ids)
        if len(ids) != num_layers:
            raise InvalidInput(
                f"{source}: {len(ids)} layer_ids for {num_layers} layers of counts; give one a "
                "layer"
            )
        loaded_WL: NDArray[np.bool_] = np.any(array, axis=2)
        sparse_L: NDArray[np.bool_] = np.any(loaded_WL, axis=0)
        used_W: NDArray[np.bool_] = np.any(loaded_WL, axis=1)
        if not sparse_L.any():
            raise InvalidInput(f"{source}: all counts are zero; record while tokens are served")

        def of_windows(values: Any, name: str) -> tuple[str, ...]:
            labels = [values] * num_windows if isinstance(values, str) else list(map(str, values))
            if len(labels) != num_windows:
                raise InvalidInput(
                    f"{source}: {len(labels)} {name} labels for {num_windows} windows; give one, "
                    "or one a window"
                )
            return tuple(label for label, used in zip(labels, used_W, strict=True) if used)

        def numbers(values: ArrayLike | None, name: str) -> FloatArray | None:
            return (
                None
                if values is None
                else _window_values(values, num_windows, name, source)[used_W]
            )

        return cls(
            counts_WLE=array[used_W][:, sparse_L],
            layer_ids=tuple(i for i, used in zip(ids, sparse_L, strict=True) if used),
            scenario_W=of_windows(scenario, "scenario"),
            phase_W=of_windows(phase, "phase"),
            tokens_W=numbers(tokens, "tokens"),
            time_s_W=numbers(time_s, "time_s"),
            metadata=dict(metadata or {}),
            source=source,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LoadProfile):
            return NotImplemented
        return (
            self.layer_ids == other.layer_ids
            and self.scenario_W == other.scenario_W
            and self.phase_W == other.phase_W
            and np.array_equal(self.counts_WLE, other.counts_WLE)
            and _equal_or_none(self.tokens_W, other.tokens_W)
            and _equal_or_none(self.time_s_W, other.time_s_W)
            and dict(self.metadata) == dict(other.metadata)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_windows(self) -> int:
        """W."""
        return int(self.counts_WLE.shape[0])

    @property
    def num_layers(self) -> int:
        """L, mixture-of-experts layers only."""
        return int(self.counts_WLE.shape[1])

    @property
    def num_experts(self) -> int:
        """E, logical experts of a layer."""
        return int(self.counts_WLE.shape[2])

    @property
    def scenarios(self) -> tuple[str, ...]:
        """Names of the scenarios in order of first appearance."""
        return tuple(dict.fromkeys(self.scenario_W))

    def mean_load_LE(self) -> FloatArray:
        """Return the load to fit when only one vector a layer is wanted, shape [L, E].

        Each window of each layer counts the same whatever its number of tokens, as in
        ``imbalance_mean``. A single window is returned unscaled, so that whole counts stay whole.
        """
        if self.num_windows == 1:
            only: FloatArray = self.counts_WLE[0]
            return only
        total_WL = self.counts_WLE.sum(axis=2)
        weight_WL = np.divide(1.0, total_WL, out=np.zeros_like(total_WL), where=total_WL > 0)
        sum_LE = np.einsum("wle,wl->le", self.counts_WLE, weight_WL)
        mean: FloatArray = sum_LE / np.count_nonzero(total_WL, axis=0)[:, np.newaxis]
        return mean

    def largest_load_LE(self) -> FloatArray:
        """Return the largest part of its window's load that each expert ever had, shape [L, E]."""
        total_WL1 = self.counts_WLE.sum(axis=2, keepdims=True)
        part_WLE = np.divide(
            self.counts_WLE, total_WL1, out=np.zeros_like(self.counts_WLE), where=total_WL1 > 0
        )
        largest: FloatArray = part_WLE.max(axis=0)
        return largest

    def windows(self, start: int | None, stop: int | None) -> LoadProfile:
        """Return the windows ``start:stop`` (as Python slices count) as a profile.

        Raises
        ------
        InvalidInput
            The range holds no window.
        """
        part = slice(start, stop)
        if len(range(*part.indices(self.num_windows))) == 0:
            asked = f"{'' if start is None else start}:{'' if stop is None else stop}"
            raise InvalidInput(
                f"{self.source}: windows {asked} of {self.num_windows} are empty; choose within "
                f"0:{self.num_windows}"
            )
        return replace_windows(self, part)

    def of_phase(self, phase: str) -> LoadProfile:
        """Return the windows of one phase.

        Raises
        ------
        InvalidInput
            There are none, or the phase is unknown.
        """
        if phase not in PHASES:
            raise unknown_name("phase", phase, PHASES)
        mask = np.array([name == phase for name in self.phase_W])
        if not mask.any():
            there = ", ".join(sorted(set(self.phase_W)))
            raise InvalidInput(
                f"{self.source} has no {phase} windows (it has {there}); record that phase, or "
                "leave --phase out"
            )
        return replace_windows(self, mask)

    def of_scenario(self, scenario: str) -> LoadProfile:
        """Return the windows of one scenario."""
        mask = np.array([name == scenario for name in self.scenario_W])
        if not mask.any():
            raise unknown_name("scenario", scenario, self.scenarios)
        return replace_windows(self, mask)

    def sha256(self) -> str:
        """Return a digest of the loads and their labels (not of provenance), hexadecimal."""
        digest = hashlib.sha256(np.array(self.counts_WLE.shape, "<i8").tobytes())
        digest.update(self.counts_WLE.astype("<f8", copy=False).tobytes())
        labels = [self.layer_ids, self.scenario_W, self.phase_W]
        digest.update(json.dumps(labels, separators=(",", ":")).encode())
        return digest.hexdigest()


def replace_windows(profile: LoadProfile, index: slice | NDArray[np.bool_]) -> LoadProfile:
    """Return ``profile`` with only the windows that ``index`` selects.

    Layers that have no load in those windows drop out.
    """
    chosen = np.arange(profile.num_windows)[index]

    def pick(values: FloatArray | None) -> FloatArray | None:
        return None if values is None else values[chosen]

    return LoadProfile.from_counts(
        profile.counts_WLE[chosen],
        layer_ids=profile.layer_ids,
        scenario=[profile.scenario_W[w] for w in chosen],
        phase=[profile.phase_W[w] for w in chosen],
        tokens=pick(profile.tokens_W),
        time_s=pick(profile.time_s_W),
        metadata=profile.metadata,
        source=profile.source,
    )


def merge_profiles(profiles: Iterable[LoadProfile]) -> LoadProfile:
    """Join the windows of several profiles of one model, in the order given.

    A profile whose windows are all of the scenario ``default`` is named after its source, so that
    several files become several scenarios.

    Raises
    ------
    InvalidInput
        Nothing to merge, or the profiles disagree on layers or experts.
    """
    parts = list(profiles)
    if not parts:
        raise InvalidInput("no profile given; name at least one file")
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        if part.num_experts != first.num_experts:
            raise InvalidInput(
                f"{part.source} has {part.num_experts} experts, {first.source} has "
                f"{first.num_experts}; give profiles of one model"
            )
        if part.layer_ids != first.layer_ids:
            odd = sorted(set(part.layer_ids) ^ set(first.layer_ids))
            raise InvalidInput(
                f"{part.source} and {first.source} disagree on the layers with load (ids "
                f"{_preview(odd)} are in one only); give profiles of one model"
            )
    is_default = [set(part.scenario_W) == {DEFAULT_SCENARIO} for part in parts]
    taken = {
        name for part, default in zip(parts, is_default, strict=True) if not default
        for name in part.scenario_W
    }  # fmt: skip
    scenarios: list[str] = []
    for part, default in zip(parts, is_default, strict=True):
        if not default:
            scenarios.extend(part.scenario_W)
            continue
        name, number = part.source, 2
        while name in taken:
            name, number = f"{part.source}#{number}", number + 1
        taken.add(name)
        scenarios.extend([name] * part.num_windows)

    def joined(field_name: str) -> FloatArray | None:
        values = [getattr(part, field_name) for part in parts]
        return None if any(v is None for v in values) else np.concatenate(values)

    return replace(
        first,
        counts_WLE=np.concatenate([part.counts_WLE for part in parts]),
        scenario_W=tuple(scenarios),
        phase_W=tuple(phase for part in parts for phase in part.phase_W),
        tokens_W=joined("tokens_W"),
        time_s_W=joined("time_s_W"),
        metadata={"merged_from": [part.source for part in parts]},
        source=", ".join(part.source for part in parts),
    )


def _numeric(values: ArrayLike, source: str) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        raise InvalidInput(
            f"{source}: counts must be a full array, not rows of different length"
        ) from None
    if array.dtype.kind not in "uifb":
        raise InvalidInput(f"{source}: counts must be numbers, got {array.dtype}")
    return array


def _whole_ids(values: Iterable[Any], source: str) -> tuple[int, ...]:
    ids = tuple(values)
    if not all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in ids):
        raise InvalidInput(f"{source}: layer_ids must be whole numbers, got {_preview(ids)}")
    return tuple(int(i) for i in ids)


def _check_counts(counts: NDArray[Any], source: str) -> None:
    with np.errstate(invalid="ignore"):
        if not np.isfinite(counts).all():
            raise InvalidInput(f"{source}: counts hold NaN or infinite values; record them again")
        if counts.dtype.kind != "u" and (counts < 0).any():
            raise InvalidInput(
                f"{source}: counts hold negative values (least {counts.min()}); loads are counts "
                "of tokens"
            )
        if float(counts.max()) > MAX_COUNT:
            raise InvalidInput(f"{source}: counts above 1e300 cannot be added up; check the units")
        if counts.dtype.kind == "f" and ((counts > 0) & (counts < MIN_COUNT)).any():
            raise InvalidInput(f"{source}: counts below 1e-300 cannot be divided; check the units")


def _window_values(values: ArrayLike, num_windows: int, name: str, source: str) -> FloatArray:
    try:
        array = frozen_array(np.atleast_1d(values), np.float64)
    except (TypeError, ValueError):
        raise InvalidInput(f"{source}: {name} must be numbers") from None
    if array.shape != (num_windows,) or not np.isfinite(array).all():
        raise InvalidInput(
            f"{source}: {name} must be {num_windows} finite numbers, one a window; got shape "
            f"{list(array.shape)}"
        )
    return array


def _layer_name(layer_ids: Sequence[int], index: int) -> str:
    return str(layer_ids[index]) if index < len(layer_ids) else f"at index {index}"


def _preview(values: Sequence[Any], limit: int = 6) -> str:
    text = ", ".join(str(v) for v in values[:limit])
    return f"{text}, ..." if len(values) > limit else text


def _equal_or_none(a: FloatArray | None, b: FloatArray | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b)
