"""Policies that live through a stream: what they may do, and what they are scored on."""

from dataclasses import replace

import numpy as np
import pytest

from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.metrics import evaluate
from eplb.model import MoEModel
from eplb.placement.replay import POLICIES, ReplayOptions, replay
from eplb.placement.solve import Effort
from eplb.problem import Problem
from eplb.topology import Topology

TOPOLOGY = Topology(num_nodes=2, ranks_per_node=2, slots_per_rank=5)
OPTIONS = ReplayOptions(every=10, warmup=30, effort=Effort(sweeps=20))


@pytest.fixture(scope="module")
def problem():
    """Sixty steps whose mix goes from one kind of traffic to another."""
    random = np.random.default_rng(0)
    kinds = random.dirichlet(np.full(16, 0.5), (2, 2))
    part = np.linspace(0, 1, 60)[:, np.newaxis, np.newaxis]
    counts = random.poisson(3000 * ((1 - part) * kinds[0] + part * kinds[1])) + 1
    profile = LoadProfile.from_counts(counts.astype(float))
    model = MoEModel(name="toy", num_experts=16, layer_ids=profile.layer_ids, num_groups=2)
    return Problem(profile=profile, model=model, topology=TOPOLOGY)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_scores_what_it_placed(problem, policy):
    result = replay(problem, replace(OPTIONS, policy=policy))
    assert [d.step for d in result.decisions] == [30, 40, 50]
    scored = np.arange(30, 60)
    if policy == "oracle":
        scored = scored[1::2]
    assert result.step_W.tolist() == scored.tolist()
    for step, value in zip(result.step_W, result.imbalance_W, strict=True):
        placement = result.decisions[(step - 30) // 10].placement
        window = problem.profile.windows(step, step + 1)
        expected = evaluate(window, placement, TOPOLOGY, "even").imbalance_mean
        assert value == pytest.approx(expected)


def test_policies_move_as_they_say(problem):
    moved = {
        policy: [d.moved for d in replay(problem, replace(OPTIONS, policy=policy)).decisions]
        for policy in POLICIES
    }
    assert moved["keep"] == [0, 0, 0]
    assert max(moved["follow"]) <= 0.04 * 40
    wide = replay(problem, replace(OPTIONS, policy="follow", max_share=0.2))
    assert 0 < max(d.moved for d in wide.decisions) <= 0.2 * 40
    assert sum(moved["resolve-matched"]) < sum(moved["resolve"])
    # A policy that never thinks it worth the while keeps its plan.
    resting = replace(OPTIONS, policy="follow-threshold", move_above=0.9)
    assert replay(problem, resting).moved == 0


def test_a_policy_does_not_see_the_future(problem):
    """Steps after a decision changed: the decision did not."""
    counts = problem.profile.counts_WLE.copy()
    counts[40:] = counts[40:, :, ::-1]
    other = replace(problem, profile=replace(problem.profile, counts_WLE=counts))
    for policy in ("resolve", "follow"):
        first, second = (
            replay(p, replace(OPTIONS, policy=policy)).decisions for p in (problem, other)
        )
        assert [d.placement for d in first[:2]] == [d.placement for d in second[:2]]
        assert first[2].placement != second[2].placement


@pytest.mark.parametrize("split", ["nearest", "weighted", "batch"])
def test_follow_knows_every_rule(problem, split):
    result = replay(replace(problem, split=split), replace(OPTIONS, max_share=0.2))
    assert (result.imbalance_W >= 1 - 1e-9).all()


def test_bad_options_are_refused(problem):
    with pytest.raises(InvalidInput, match="--warmup 60"):
        replay(problem, replace(OPTIONS, warmup=60))
    with pytest.raises(InvalidInput, match="did you mean"):
        replace(OPTIONS, policy="folow")
    with pytest.raises(InvalidInput, match="rest_below"):
        replace(OPTIONS, rest_below=0.5)
    with pytest.raises(InvalidInput, match="fractions"):
        replay(replace(problem, split="weighted"), replace(OPTIONS, policy="resolve-matched"))
    counts = problem.profile.counts_WLE.copy()
    counts[:30, 1] = 0
    idle = replace(problem, profile=replace(problem.profile, counts_WLE=counts))
    with pytest.raises(InvalidInput, match="layer 1 has no load"):
        replay(idle, OPTIONS)
