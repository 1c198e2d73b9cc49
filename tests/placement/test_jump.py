"""Jumps of the traffic: found where there is one, at the stated rate where there is none."""

import numpy as np
import pytest

from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.placement.jump import find_jump

KINDS, EXPERTS, STEPS = 6, 32, 160


def stream(seed, *, walk=0.0, jump=None):
    """Steps that mix kinds of traffic; the mix walks, and jumps at a step."""
    random = np.random.default_rng(seed)
    kinds = random.dirichlet(np.full(EXPERTS, 0.5), (KINDS, 2))
    mix, rows = np.full(KINDS, 1.0), []
    for step in range(STEPS):
        mix = mix * np.exp(walk * random.normal(size=KINDS))
        if step == jump:
            mix = np.roll(mix * np.array([8.0, 1, 1, 1, 1, 1]), 3)
        part = random.dirichlet(20 * mix / mix.sum())
        rows.append(random.poisson(4000 * np.tensordot(part, kinds, axes=1)) + 1)
    return LoadProfile.from_counts(np.array(rows, dtype=float))


def test_a_jump_is_found_at_its_step():
    for seed in range(3):
        jump = find_jump(stream(seed, walk=0.02, jump=145), 20)
        assert jump.found
        assert jump.step is not None
        assert abs(jump.step - 145) <= 3


def test_false_alarms_are_as_rare_as_stated():
    """At a rate of a tenth, over streams that stand still and that walk."""
    for walk in (0.0, 0.05):
        alarms = [
            find_jump(stream(seed, walk=walk), 20, false_alarm_rate=0.1).found
            for seed in range(100, 140)
        ]
        # 99.9% of binomial draws of 40 at a tenth are at most 11.
        assert sum(alarms) <= 11


def test_a_short_stream_does_not_tell():
    short = stream(0, jump=30).windows(0, 40)
    assert find_jump(short, 20).p_value == 1.0
    assert not find_jump(short, 20).found


def test_steps_that_are_all_alike_are_no_jump():
    same = LoadProfile.from_counts(np.ones((160, 2, 8)))
    assert not find_jump(same, 20).found


def test_bad_values_are_refused():
    with pytest.raises(InvalidInput, match="num_new"):
        find_jump(stream(0), 0)
    with pytest.raises(InvalidInput, match="false_alarm_rate"):
        find_jump(stream(0), 20, false_alarm_rate=1.0)
