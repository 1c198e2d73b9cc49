"""The built-in sample: real router choices of a small mixture-of-experts language model.

``tools/make_sample.py`` made it. ``docs/sample.md`` says what it is.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

from numpy.typing import NDArray

from eplb.load_profile import LoadProfile
from eplb.profiles.read import read_profile
from eplb.profiles.routings import read_routings

__all__ = ["sample_profile", "sample_routings"]

_FILE = files("eplb.profiles") / "data" / "sample.npz"


def sample_profile() -> LoadProfile:
    """Return 96 windows of a drifting mix of text: 8 layers of 256 experts."""
    with as_file(_FILE) as path:
        return read_profile(path)


def sample_routings() -> NDArray[Any]:
    """Return sampled token routings of the same model, shape [T, 8, 8]."""
    with as_file(_FILE) as path:
        return read_routings(path)
