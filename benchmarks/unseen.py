r"""What holds on steps that were not fitted: the search and its windows, one change at a time.

Six folds: 120 steps of a recording are fitted, and the 120 that follow are scored; under ``even``,
32 ranks of 9 slots. Each variant changes one constant or the budget, and is compared with the
defaults on the same folds, layers and seeds: a difference within two standard errors is none::

    python benchmarks/unseen.py drift_a.npz shift_a.npz -o benchmarks/results/unseen.json
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from run import environment
from search import problem_of, scored

import eplb
from eplb.load_profile import LoadProfile
from eplb.placement import factors, windows
from eplb.placement.solve import Effort, solve

UNIT, NUM_STEPS, FIRST_STEPS = "EP32x9", 120, (0, 120, 240)
LAYERS = (0, 2, 5, 7)
SEEDS, SWEEPS = 2, 1000

# name: constants of eplb.placement.windows and .factors, options of the effort
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as shipped": ({}, {}),
    "recorded steps only": ({}, {"extend": False}),
    "a quarter of the sweeps": ({}, {"sweeps": SWEEPS // 4}),
    "four times the sweeps": ({}, {"sweeps": SWEEPS * 4}),
    "factors of 60 plain updates": ({"FACTOR_STEPS": 60, "RELAXATION": 1.0}, {}),
    "factors of 1,000 updates": ({"FACTOR_STEPS": 1000}, {}),
    "8 factors": ({"NUM_FACTORS": 8}, {}),
    "20 factors": ({"NUM_FACTORS": 20}, {}),
    "one factorization": ({"NUM_FACTORIZATIONS": 1}, {}),
    "8 factorizations, 240 mixes": ({"NUM_FACTORIZATIONS": 8, "NUM_MIXES": 240}, {}),
    "mixes of nearly one kind": ({"CONCENTRATIONS": (0.1,)}, {}),
    "mixes of many kinds": ({"CONCENTRATIONS": (1.0,)}, {}),
    "mixes weigh 0.75": ({"ADDED_WEIGHT": 0.75}, {}),
}


def unseen(
    profiles: list[LoadProfile], constants: dict[str, Any], effort: dict[str, Any]
) -> NDArray[np.float64]:
    """Return the mean imbalance of unseen steps: recordings, folds, seeds, layers."""
    figures = []
    with ExitStack() as stack:
        for name, value in constants.items():
            module = windows if hasattr(windows, name) else factors
            stack.enter_context(patch.object(module, name, value))
        for profile in profiles:
            for first in FIRST_STEPS:
                fitted = profile.windows(first, first + NUM_STEPS)
                later = profile.windows(first + NUM_STEPS, first + 2 * NUM_STEPS)
                for seed in range(SEEDS):
                    options = {"sweeps": SWEEPS, "seed": seed, **effort}
                    found = solve(problem_of(fitted, UNIT), "search", Effort(**options))
                    balance = scored(found.placement, later, UNIT, "even")
                    figures.append([b.imbalance_mean for b in balance.by_layer.values()])
    shape = (len(profiles), len(FIRST_STEPS), SEEDS, len(LAYERS))
    return np.array(figures).reshape(shape)


def _some_layers(profile: LoadProfile) -> LoadProfile:
    return LoadProfile.from_counts(
        profile.counts_WLE[:, list(LAYERS)], layer_ids=[profile.layer_ids[row] for row in LAYERS]
    )


def main() -> None:
    """Measure the variants."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("steps", nargs="+", help="recordings of single steps")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    profiles = [_some_layers(eplb.read_profile(path)) for path in arguments.steps]
    rows: list[dict[str, Any]] = []
    reference = None
    for name, (constants, effort) in VARIANTS.items():
        figures = unseen(profiles, constants, effort)
        reference = figures if reference is None else reference
        difference = (figures - reference).ravel()
        rows.append(
            {
                "variant": name,
                "mean": float(figures.mean()),
                "difference": float(difference.mean()),
                "standard_error": float(difference.std(ddof=1) / np.sqrt(len(difference))),
                "by_recording": figures.mean(axis=(1, 2, 3)).tolist(),
            }
        )
        print(rows[-1], flush=True)
        if arguments.output:
            found = environment("routing of a 256-expert model")
            found |= {"cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()[0]}
            report = {"environment": found, "results": {"variants": rows}}
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
