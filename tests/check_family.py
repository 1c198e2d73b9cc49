"""Records a tiny model of one family and compares with the slow reference, exactly.

``python tests/check_family.py cuda`` checks all families on a GPU, and on four processes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from families import NOT_EXPERTS, VOCABULARY, families, tiny_model
from reference_counts import Reference

from eplb.errors import EplbError
from eplb.profiles import read_profile
from eplb.profiles.recorder import record
from eplb.profiles.recorder_layers import find_layers


def check_family(name: str, folder: Path, device: str = "cpu", seed: int = 0, **options):
    """Return the layers recorded and the reference's counts by phase, after comparing."""
    torch.manual_seed(seed)
    model = tiny_model(name).to(device)
    layers = find_layers(model)
    reference = Reference(layers)
    path = folder / f"{name}.npz"
    padded = torch.ones(2, 7, dtype=torch.long, device=device)
    padded[0, :3] = 0

    def tokens(*shape):
        return torch.randint(3, VOCABULARY, shape, device=device)

    with torch.no_grad(), record(model, path, every_steps=2, **options):
        reference.run(model, tokens(2, 7))
        reference.run(model, tokens(2, 7), padded)
        reference.run(model, tokens(3, 1))
    expected = {phase: reference.array(phase) for phase in ("prefill", "decode")}
    if not options:
        compare(path, layers, expected)
    return layers, expected


def compare(path: Path, layers, expected) -> None:
    """Fail unless the profile holds exactly these counts."""
    profile = read_profile(path)
    rows = [i for i, layer in enumerate(layers) if layer.layer_id in profile.layer_ids]
    for phase, counts in expected.items():
        windows = [w for w, p in enumerate(profile.phase_W) if p == phase]
        recorded = profile.counts_WLE[windows].sum(axis=0)
        assert recorded.sum() > 0
        assert np.array_equal(recorded, counts[rows]), f"{phase} counts differ"
        assert counts.sum() == counts[rows].sum()


def main(device: str) -> None:
    """Check all families here, and print a line each."""
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in families():
            if name in NOT_EXPERTS:
                continue
            try:
                layers, _ = check_family(name, Path(folder), device)
            except (EplbError, RuntimeError, AssertionError, TypeError, ValueError) as error:
                print(f"{name}: {type(error).__name__} {' '.join(str(error).split())[:150]}")
                bad += 1
            else:
                print(f"{name}: exact, layers {[layer.layer_id for layer in layers]}")
    print(f"{bad} not exact on {device}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
