"""Records a tiny model of one family and compares with the slow reference, exactly.

``python tests/check_family.py cuda`` checks all families on a GPU, and on four processes.
"""

from __future__ import annotations

import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from families import NOT_EXPERTS, VOCABULARY, families, tiny_model
from reference_counts import Reference
from torch import multiprocessing

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


def check_on_ranks(names, folder: Path, device: str) -> None:
    """Record on the ranks of the default group into one file, reduced, and compare with the sum."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    for name in names:
        layers, expected = check_family(
            name, folder, device, seed=rank, reduce=True, sources="rank"
        )
        total = {phase: torch.from_numpy(counts.copy()) for phase, counts in expected.items()}
        for counts in total.values():
            dist.all_reduce(counts)
        if rank == 0:
            path = folder / f"{name}.npz"
            compare(path, layers, {phase: counts.numpy() for phase, counts in total.items()})
            with np.load(path) as file:
                by_source = file["source_counts"]
                assert np.array_equal(by_source.sum(axis=1), file["counts"])
                main = [i for i, layer in enumerate(layers) if not layer.is_mtp]
                own = sum(expected.values())[main]
                assert np.array_equal(by_source[:, 0].sum(axis=0), own)
            print(f"{name}: exact on {num_ranks} processes")
        dist.barrier()


def run_rank(rank: int, num_ranks: int, names, folder: str, device: str, port: int) -> None:
    """Be one of the processes of :func:`main`."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks
    )
    torch.set_num_threads(1)
    check_on_ranks(names, Path(folder), device)
    dist.destroy_process_group()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(device: str, num_ranks: int) -> None:
    """Check all families, in this process and on several, and print a line each."""
    exact, bad = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in families():
            if name in NOT_EXPERTS:
                continue
            try:
                layers, _ = check_family(name, Path(folder), device)
            except (EplbError, RuntimeError, AssertionError, TypeError, ValueError) as error:
                print(f"{name}: {type(error).__name__} {' '.join(str(error).split())[:150]}")
                bad.append(name)
            else:
                print(f"{name}: exact, layers {[layer.layer_id for layer in layers]}")
                exact.append(name)
        with tempfile.TemporaryDirectory() as other:
            arguments = (num_ranks, exact, other, device, free_port())
            multiprocessing.spawn(run_rank, arguments, nprocs=num_ranks)
    print(f"{device}: {len(exact)} exact in one process and on {num_ranks}; not exact: {bad}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu", 4)
