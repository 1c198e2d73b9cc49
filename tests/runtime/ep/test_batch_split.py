"""The split of each step, poured in phases, beside its exact optimum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import plans

torch = pytest.importorskip("torch")

from eplb.batch_split import batch_max_load  # noqa: E402
from eplb.replicas import UNIT_BITS, replica_bounds  # noqa: E402
from eplb.runtime.ep.batch_split import (  # noqa: E402
    BatchPhases,
    begin_of_replicas,
    first_on_rank,
)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def phases_of(slots_S, num_experts, slots_per_rank, device="cpu"):
    used_S = first_on_rank(slots_S, num_experts, slots_per_rank).astype(float)
    slot_X = replica_bounds(slots_S, used_S).slot_X
    return BatchPhases.of_slots(
        slots_S, slot_X, num_experts, slots_per_rank, torch.device(device)
    ), slot_X


def largest_load(slots_S, count_E, slots_per_rank, device="cpu"):
    """The largest rank load when tokens divide as the phases say."""
    num_experts = len(count_E)
    phases, slot_X = phases_of(slots_S, num_experts, slots_per_rank, device)
    begin_FMX = begin_of_replicas(phases, torch.from_numpy(count_E).to(device)).cpu().numpy()
    place_FMX, expert_FM = phases.place_FMX.cpu().numpy(), phases.expert_FM.cpu().numpy()
    load_R = np.zeros(len(slots_S) // slots_per_rank)
    seen = set()
    for f, m in np.argwhere(expert_FM >= 0):
        places = place_FMX[f, m][place_FMX[f, m] >= 0]
        begin = begin_FMX[f, m, : len(places)] / (1 << UNIT_BITS)
        assert begin[0] == 0
        share = np.diff(np.append(begin, 1.0))
        assert (share > -1e-8).all()
        np.add.at(load_R, slot_X[places] // slots_per_rank, share * count_E[expert_FM[f, m]])
        seen.add(int(expert_FM[f, m]))
    for place, slot in enumerate(slot_X):
        expert = int(slots_S[slot])
        if expert not in seen:
            assert place == 0 or slots_S[slot_X[place - 1]] != expert
            load_R[slot // slots_per_rank] += count_E[expert]
    assert np.isclose(load_R.sum(), count_E.sum())
    return load_R.max()


@pytest.mark.parametrize("device", DEVICES)
@given(plan=plans(), seed=st.integers(0, 2**32 - 1))
def test_every_split_is_one_and_none_beats_the_optimum(plan, seed, device):
    rng = np.random.default_rng(seed)
    slots_S, spr = plan.placement.phys_to_log_LS[0], plan.topology.slots_per_rank
    count_E = rng.integers(0, 100, plan.model.num_experts)
    best = batch_max_load(count_E[None], slots_S, plan.topology.num_ranks)[0]
    assert largest_load(slots_S, count_E, spr, device) >= best * (1 - 1e-6) - 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("num_ranks", "slots_per_rank"), [(4, 66), (32, 9), (32, 10), (64, 5)])
def test_little_is_lost_to_the_optimum(num_ranks, slots_per_rank, device):
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(5):
        load_E = np.exp(rng.normal(0, 0.7, 256))
        load_E *= 32768 / load_E.sum()
        num_slots = num_ranks * slots_per_rank
        hottest = np.argsort(-load_E)[: num_slots - 256]
        # Replicas of the hottest experts on other ranks than the first ones.
        slots_S = np.concatenate([rng.permutation(256), hottest])
        slots_S = slots_S.reshape(slots_per_rank, num_ranks).T.ravel()
        count_E = rng.poisson(load_E)
        best = batch_max_load(count_E[None], slots_S, num_ranks)[0]
        losses.append(largest_load(slots_S, count_E, slots_per_rank, device) / best - 1)
    assert max(losses) < 0.01
    assert np.mean(losses) < 0.003
