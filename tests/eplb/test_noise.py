"""Sampling noise of single steps."""

from __future__ import annotations

import numpy as np
import pytest

from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.metrics import evaluate
from eplb.noise import dispersion, step_noise
from eplb.slots import initial_placement
from eplb.topology import Topology

TOPOLOGY = Topology(num_nodes=2, ranks_per_node=8, slots_per_rank=4)


def profile_of(counts):
    return LoadProfile.from_counts(np.asarray(counts, float))


def noise(profile, tokens, split="even", top_k=4):
    placement = initial_placement(profile.layer_ids, profile.num_experts, TOPOLOGY.num_slots)
    return step_noise(
        profile, placement, TOPOLOGY, split, tokens_per_step=tokens, top_k=top_k
    ), evaluate(profile, placement, TOPOLOGY, split)


def test_balanced_ranks_show_nothing_but_the_floor():
    found, balance = noise(profile_of(np.full((1, 3, 64), 1e9)), 1024)
    assert balance.imbalance_mean == pytest.approx(1.0)
    assert found.imbalance_mean == pytest.approx(found.floor)
    # 16 ranks of 256 rows: the largest of 16 normal deviations of 1/16 is 1.77 of them on average.
    assert found.floor == pytest.approx(1 + 1.77 / 16, abs=0.02)
    assert found.long_enough


def test_noise_falls_with_the_root_of_the_tokens():
    profile = profile_of(np.full((1, 3, 64), 1e9))
    small, large = (noise(profile, tokens)[0].floor - 1 for tokens in (256, 16 * 256))
    assert small / large == pytest.approx(4, rel=0.15)


def test_large_steps_show_the_totals():
    random = np.random.default_rng(1)
    found, balance = noise(profile_of(random.gamma(1.0, 1e9, (2, 2, 64))), 10_000_000)
    assert found.imbalance_mean == pytest.approx(balance.imbalance_mean, rel=0.01)
    assert found.floor < 1.01


def test_independent_choices_have_a_dispersion_of_one_and_sequences_more():
    random = np.random.default_rng(2)
    share = random.dirichlet(np.full(64, 2.0))
    steps = random.multinomial(4096, share, size=(40, 2))
    assert dispersion(profile_of(steps)) == pytest.approx(1.0, abs=0.05)
    # Four tokens that choose alike have four times the variance.
    assert dispersion(profile_of(4 * steps)) == pytest.approx(4.0, rel=0.05)


def test_windows_that_are_steps_are_not_made_noisy_twice():
    random = np.random.default_rng(3)
    steps = random.multinomial(4096, np.full(64, 1 / 64), size=(60, 2))
    found, balance = noise(profile_of(steps), 1024)
    assert found.imbalance_mean == pytest.approx(balance.imbalance_mean, rel=0.02)


def test_a_short_recording_is_said_to_be_short():
    random = np.random.default_rng(4)
    found, _ = noise(profile_of(random.multinomial(500, np.full(64, 1 / 64), (1, 2))), 64)
    assert not found.long_enough


def test_batch_has_no_floor():
    random = np.random.default_rng(5)
    found, _ = noise(profile_of(random.gamma(2.0, 1e6, (1, 2, 60))), 512, split="batch")
    assert found.floor is None
    assert found.imbalance_mean >= 1


def test_windows_in_which_a_layer_has_no_load():
    counts = np.full((3, 2, 64), 1e6)
    counts[1, 0] = 0
    found, _ = noise(profile_of(counts), 512)
    assert np.isfinite([found.imbalance_mean, found.imbalance_p95, found.floor]).all()


def test_a_step_has_tokens():
    with pytest.raises(InvalidInput, match="at least 1"):
        noise(profile_of(np.ones((1, 1, 64))), 0)
