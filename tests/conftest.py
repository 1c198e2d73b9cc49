"""What all tests share: the Hypothesis profile, and the way to data that is not shipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Tests run beside each other, a core each; so do the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Time on a loaded machine says nothing about the code.
settings.register_profile("eplb", deadline=None, max_examples=50)
settings.load_profile("eplb")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real inputs beside a development checkout; skips where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the recorded loads in {folder}, which are not part of the project")
    return folder
