"""Routers beside their definitions, written out token by token."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from eplb.errors import InvalidInput  # noqa: E402
from eplb.runtime.ep.router import SigmoidRouter, SoftmaxRouter  # noqa: E402


def filled(router, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in router.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return router, torch.randn(13, 6, generator=generator)


@pytest.mark.parametrize(("groups", "per_token"), [(1, 1), (4, 2), (4, 4), (2, 1)])
def test_sigmoid_router_chooses_groups_by_their_two_best(groups, per_token):
    router, x = filled(
        SigmoidRouter(6, 16, 4, num_groups=groups, groups_per_token=per_token, scale=2.5), groups
    )
    topk, weight = router(x)
    for t in range(len(x)):
        score = 1 / (1 + np.exp(-(router.weight @ x[t]).numpy().astype(float)))
        biased = score + router.bias.numpy()
        parts = np.split(np.arange(16), groups)
        rank = sorted(range(groups), key=lambda g: -np.sort(biased[parts[g]])[-2:].sum())
        allowed = np.concatenate([parts[g] for g in rank[:per_token]])
        expected = allowed[np.argsort(-biased[allowed])[:4]]
        assert topk[t].tolist() == expected.tolist()
        assert np.allclose(weight[t], 2.5 * score[expected] / score[expected].sum(), atol=1e-6)


@pytest.mark.parametrize("renormalise", [True, False])
def test_softmax_router(renormalise):
    router, x = filled(SoftmaxRouter(6, 16, 4, renormalise=renormalise), 5)
    topk, weight = router(x)
    score = torch.softmax(x @ router.weight.T, 1)
    assert torch.equal(topk, score.argsort(1, descending=True)[:, :4])
    chosen = score.gather(1, topk)
    assert torch.allclose(weight, chosen / chosen.sum(1, keepdim=True) if renormalise else chosen)


def test_no_tokens_are_routed():
    for router in (SoftmaxRouter(6, 16, 4), SigmoidRouter(6, 16, 4, num_groups=4,
                                                          groups_per_token=2)):  # fmt: skip
        topk, weight = router(torch.zeros(0, 6))
        assert topk.shape == weight.shape == (0, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 17}, r"top_k \(17\) must be 1 to num_experts \(16\)"),
        ({"num_groups": 3}, r"must divide into num_groups \(3\)"),
        ({"num_groups": 16}, "of two experts or more"),
        ({"num_groups": 4, "groups_per_token": 5}, r"groups_per_token \(5\) must be 1 to"),
        ({"num_groups": 8, "groups_per_token": 1}, "1 groups of 2 experts are fewer than top_k"),
    ],
)
def test_impossible_routers_are_refused(options, message):
    with pytest.raises(InvalidInput, match=message):
        SigmoidRouter(**({"hidden_size": 6, "num_experts": 16, "top_k": 4} | options))
