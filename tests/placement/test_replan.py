"""Few moves from the placement in force: limits hold, and what the curve says is so."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb.errors import InvalidInput, PlacementInvalid
from eplb.load_profile import LoadProfile
from eplb.placement.keep_slots import count_moves
from eplb.placement.replan import break_even, replan
from eplb.slots import initial_placement, replica_count
from eplb.topology import Topology

TOPOLOGY = Topology(num_nodes=2, ranks_per_node=2, slots_per_rank=3)


def case(seed, layers=2):
    random = np.random.default_rng(seed)
    counts = random.poisson(random.lognormal(4, 1, (layers, 8)), (3, layers, 8)) + 1
    profile = LoadProfile.from_counts(counts.astype(float))
    start = initial_placement(profile.layer_ids, 8, TOPOLOGY.num_slots)
    return profile, start.phys_to_log_LS


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.none() | st.integers(0, 3))
def test_limits_hold_and_nothing_is_lost(seed, limit, per_layer):
    profile, old = case(seed)
    found = replan(profile, old, TOPOLOGY, max_moves=limit, max_moves_per_layer=per_layer)
    moved = [count_moves(old[[i]], found.phys_to_log_LS[[i]], 4) for i in range(len(old))]
    assert found.num_moves == sum(moved) <= limit
    assert per_layer is None or max(moved) <= per_layer
    assert (replica_count(found.phys_to_log_LS, 8) > 0).all()
    by_rank = np.sort(found.phys_to_log_LS.reshape(2, 4, 3), axis=2)
    assert (by_rank[:, :, 1:] != by_rank[:, :, :-1]).all()
    moves, values = zip(*found.curve, strict=True)
    assert list(moves) == sorted(moves)
    assert list(values) == sorted(values, reverse=True)


def test_one_move_is_the_best_replacement_there_is():
    for seed in range(20):
        profile, old = case(seed, layers=1)
        one = LoadProfile.from_counts(profile.counts_WLE[:1])
        load_E = one.counts_WLE[0, 0] * 4 / one.counts_WLE[0, 0].sum()

        def largest(row_S, load_E=load_E):
            share_S = load_E[row_S] / np.bincount(row_S, minlength=8)[row_S]
            return share_S.reshape(4, 3).sum(axis=1).max()

        options = [largest(old[0])]
        for slot, expert in np.ndindex(12, 8):
            row_S = old[0].copy()
            row_S[slot] = expert
            rank = row_S.reshape(4, 3)[slot // 3]
            if len(set(row_S.tolist())) == 8 and len(set(rank.tolist())) == 3:
                options.append(largest(row_S))
        found = replan(one, old, TOPOLOGY, max_moves=1)
        assert largest(found.phys_to_log_LS[0]) <= largest(old[0])
        # The norm of power 16 stands for the largest load, within 4 ** (1 / 16).
        assert largest(found.phys_to_log_LS[0]) <= min(options) * 4 ** (1 / 16)


def test_break_even_weighs_gain_against_transfer():
    curve = [(0, 1.5), (1, 1.2), (10, 1.1)]
    assert break_even(curve, step_s=1.0, horizon_steps=1, move_s=1.0) == (0, 0.0)
    assert break_even(curve, step_s=1.0, horizon_steps=10, move_s=1.0)[0] == 1
    assert break_even(curve, step_s=1.0, horizon_steps=100, move_s=1.0)[0] == 10


def test_bad_limits_and_doubled_replicas_are_refused():
    profile, old = case(0)
    with pytest.raises(InvalidInput, match="at least 0"):
        replan(profile, old, TOPOLOGY, max_moves=-1)
    doubled = old.copy()
    doubled[0, :3] = 0
    with pytest.raises(PlacementInvalid, match="on one rank"):
        replan(profile, doubled, TOPOLOGY, max_moves=1)
