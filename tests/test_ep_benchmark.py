"""The benchmark of the expert-parallel layer runs, at sizes that show nothing but that."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import ep_layer_inputs

from eplb.load_profile import LoadProfile

ROOT = Path(__file__).resolve().parents[1]


def test_tokens_draw_distinct_experts_with_the_given_frequencies():
    random = np.random.default_rng(0)
    count_E = np.exp(random.normal(0, 0.7, 256))
    drawn_TK = ep_layer_inputs._draw(count_E, random)
    assert all(len(set(row)) == 8 for row in drawn_TK[:1000].tolist())
    found_E = np.bincount(drawn_TK.ravel(), minlength=256) / len(drawn_TK)
    assert np.allclose(found_E, 8 * count_E / count_E.sum(), atol=0.02)


def test_a_small_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ep_layer_inputs, "TOKENS", 64)
    monkeypatch.setattr(ep_layer_inputs, "_plans", unsolved)
    profile = LoadProfile.from_counts(np.ones((1, 1, 256)), layer_ids=[5])
    arrays = {}
    routed = ep_layer_inputs._draw(np.ones(256), np.random.default_rng(0))[np.newaxis]
    ep_layer_inputs._add(arrays, "small", profile, np.array([0]), routed)
    np.savez(tmp_path / "inputs.npz", **arrays)
    report = tmp_path / "report.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "ep_layer.py", "run", tmp_path / "inputs.npz",
         "-o", report, "--tiny"],
        capture_output=True, text=True, check=False, env=os.environ | started,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    results = json.loads(report.read_text())["results"]
    assert set(results) == {
        f"{name}, {phase}" for name in ("small", "exchange") for phase in ("prefill", "decode")
    }
    layer = results["small, prefill"]["layer"]
    assert layer["even router"]["of_even_router"] == 1.0
    assert layer["eplb, batch"]["imbalance_rows"] <= layer["no replicas"]["imbalance_rows"]


def unsolved(profile):
    """Experts in order, and eight of them again on the next rank."""
    slots = np.full((4, 66), -1)
    slots[:, :64] = np.arange(256).reshape(4, 64)
    linear = slots.reshape(1, -1).copy()
    slots[:, 64:] = (np.arange(8) * 32 + 40).reshape(4, 2) % 256
    twice = slots.reshape(1, -1)
    weights = 1.0 / np.bincount(twice[0], minlength=256)[twice]
    return [
        ("no replicas", "even", linear, None),
        ("DeepSeek", "even", twice, None),
        *[("eplb", split, twice, weights if split == "weighted" else None)
          for split in ep_layer_inputs.SPLITS],
    ]  # fmt: skip
