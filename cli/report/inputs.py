"""What a report is made from, read and checked against the plan.

Shape letters: W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile, merge_profiles
from eplb.model import MODEL_PRESETS
from eplb.plan import Plan
from eplb.strict_json import parse_json

__all__ = ["check_model", "fitted_windows", "read_curve", "read_json"]


def read_json(path: str) -> Any:
    """Read a JSON document.

    Raises
    ------
    InvalidInput
        The file cannot be read, or is not JSON.
    """
    try:
        return parse_json(Path(path).read_bytes())
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise InvalidInput(
            f"{path} is not a JSON document: {error}; keep the output of --json as it is"
        ) from None


def read_curve(path: str) -> list[tuple[float, float]]:
    """Read the curve of balance against moves that ``eplb replan --json`` prints.

    Raises
    ------
    InvalidInput
        The file cannot be read, or holds something else.
    """
    document = read_json(path)
    try:
        curve = [(float(e["moves"]), float(e["imbalance"])) for e in document["curve"]]
    except (KeyError, TypeError, ValueError, OverflowError):
        curve = []
    if not curve or not np.isfinite(curve).all():
        raise InvalidInput(
            f"{path} is not what eplb replan --json prints (an object with curve); run it again "
            "and keep its output"
        )
    return curve


def check_model(plan: Plan, profile: LoadProfile, path: str) -> None:
    """Raise unless the plan can be of the profile's model.

    Raises
    ------
    InvalidInput
        Both name a known model, and not the same.
    """
    recorded = profile.metadata.get("model")
    known = isinstance(recorded, str) and recorded in MODEL_PRESETS
    if known and plan.model.name in MODEL_PRESETS and recorded != plan.model.name:
        raise InvalidInput(
            f"{profile.source} was recorded from {recorded} and {path} is for {plan.model.name}; "
            "give a profile of the plan's model"
        )


def fitted_windows(
    plan: Plan, parts: Sequence[LoadProfile]
) -> tuple[LoadProfile, NDArray[np.bool_]]:
    """Join the profiles, and tell by digest which of their windows the plan was fitted to.

    Returns
    -------
    profile : LoadProfile
    fitted_W : array of bool
        All, the windows before those that ``--holdout`` kept out, or none.
    """
    profile = merge_profiles(parts)
    digest, origin = plan.provenance.get("profile_sha256"), plan.provenance
    if profile.sha256() == digest:
        return profile, np.ones(profile.num_windows, bool)
    kept = origin.get("holdout_windows")
    sizes = [part.num_windows for part in parts]
    if isinstance(kept, list) and [type(n) for n in kept] == [int] * len(parts):
        counts = [size - n for size, n in zip(sizes, kept, strict=True)]
    else:
        total = origin.get("profile_windows")
        counts = [total] if type(total) is int and len(parts) == 1 else []
    if not counts or any(not 0 < n <= size for n, size in zip(counts, sizes, strict=True)):
        return profile, np.zeros(profile.num_windows, bool)
    fitted = merge_profiles([part.windows(0, n) for part, n in zip(parts, counts, strict=True)])
    if fitted.sha256() != digest:
        return profile, np.zeros(profile.num_windows, bool)
    return profile, np.concatenate(
        [np.arange(size) < n for size, n in zip(sizes, counts, strict=True)]
    )
