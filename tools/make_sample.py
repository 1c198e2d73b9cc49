"""Make the built-in sample from recordings of moe_lm_256.

``python tools/make_sample.py ../shared/data/moe_lm_256 profiles/data/sample.npz``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

STEPS_PER_WINDOW = 5
TOKENS_PER_DOMAIN = 256
TOKENS_PER_STEP = 4096


def main(folder: Path, output: Path) -> None:
    """Sum steps to windows, take a run of tokens of each domain, and write both."""
    with np.load(folder / "drift_a.npz") as recording:
        steps = recording["counts"]
        top_k, num_groups = int(recording["top_k"]), int(recording["num_groups"])
        domains = recording["domains"].tolist()
    num_windows = len(steps) // STEPS_PER_WINDOW
    windows = steps[: num_windows * STEPS_PER_WINDOW].reshape(
        num_windows, STEPS_PER_WINDOW, *steps.shape[1:]
    )
    with np.load(folder / "tokens.npz") as tokens:
        start = int(tokens["sequence_length"])
        runs = [tokens[name][start : start + TOKENS_PER_DOMAIN] for name in domains]
    metadata = {
        "model": "moe-lm-256",
        "top_k": top_k,
        "num_groups": num_groups,
        "description": (
            f"{num_windows} windows of {STEPS_PER_WINDOW * TOKENS_PER_STEP} tokens whose mix of "
            f"domains drifts; routings of {TOKENS_PER_DOMAIN} tokens of each of {domains}"
        ),
        "licence": "Apache-2.0",
    }
    np.savez_compressed(
        output,
        counts=windows.sum(axis=1).astype(np.uint16),
        phase=np.array("prefill"),
        tokens=np.full(num_windows, STEPS_PER_WINDOW * TOKENS_PER_STEP),
        metadata=np.array(json.dumps(metadata)),
        routings=np.concatenate(runs),
    )
    print(f"{output}: {output.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
