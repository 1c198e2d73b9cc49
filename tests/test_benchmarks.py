"""Every benchmark runs once, untimed."""

import pytest
import specs  # noqa: F401  (fills the registry)
from registry import REGISTRY


@pytest.mark.parametrize("label", REGISTRY)
def test_runs(label):
    spec = REGISTRY[label]
    spec.setup(**spec.parameters)()
