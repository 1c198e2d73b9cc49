"""Reduction over ranks: four gloo processes, one that idles, and one that stays away."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from recording_ranks import work  # noqa: E402
from torch import multiprocessing  # noqa: E402

from eplb.errors import InvalidInput  # noqa: E402
from eplb.profiles import read_profile  # noqa: E402
from eplb.profiles.recorder_options import Settings  # noqa: E402
from eplb.profiles.recorder_reduce import Reducer  # noqa: E402

COUNTS = np.array([1, 3, 1, 1])  # of one observation of recording_ranks.IDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (4, str(folder)), nprocs=4)
    return folder


def test_windows_are_added_up_in_order(folder):
    profile = read_profile(folder / "steps.npz")
    # 1 + 2 + 3 + 4 observations a step; rank 0 has nothing in the third window's second step.
    assert profile.counts_WLE[:, 0].tolist() == [
        (20 * COUNTS).tolist(), (20 * COUNTS).tolist(), (19 * COUNTS).tolist()
    ]  # fmt: skip
    assert profile.tokens_W.tolist() == [60, 60, 57]
    assert profile.metadata["ranks"] == 4
    assert not (folder / "steps.npz.journal").exists()


def test_nodes_are_kept_apart(folder):
    with np.load(folder / "steps.npz") as file:
        assert np.array_equal(file["source_counts"].sum(axis=1), file["counts"])
        by_node = file["source_counts"][0, :, 0]
    assert by_node.tolist() == [(6 * COUNTS).tolist(), (14 * COUNTS).tolist()]


def test_a_rank_that_idles_holds_nobody_up(folder):
    profile = read_profile(folder / "clock.npz")
    total = sum(torch.load(folder / f"steps{rank}") for rank in range(4))
    assert profile.counts_WLE.sum(axis=(0, 1)).tolist() == (total * COUNTS).tolist()
    assert profile.num_windows >= 2


def test_a_rank_that_stays_away_ends_the_sum_and_loses_no_count(folder):
    parts = [folder / "away.npz", folder / "away.rank1.npz", folder / "away.rank2.npz"]
    total = sum(read_profile(part).counts_WLE.sum(axis=(0, 1)) for part in parts)
    # Three ranks with three steps each; the step of the one that left may be in or not.
    assert total.tolist() in [(n * COUNTS).tolist() for n in (9, 10)]
    with np.load(parts[1]) as file:
        by_rank = file["source_counts"].sum(axis=(0, 2))
    assert by_rank[[0, 2, 3]].sum() == 0
    assert by_rank[1].sum() > 0


def test_only_groups_on_the_host_are_used(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda _group: "nccl")
    with pytest.raises(InvalidInput, match="reduce over a gloo group, not nccl"):
        Reducer(Settings(reduce=object()), (3, 1, 6))


def test_models_are_recorded_on_four_processes(folder):
    pytest.importorskip("transformers", minversion="5")
    # Compared with the slow reference where they were recorded.
    for name in ("deepseek_v3", "mixtral", "llama4_text"):
        assert read_profile(folder / f"{name}.npz").metadata["ranks"] == 4
