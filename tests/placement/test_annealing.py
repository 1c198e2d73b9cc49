"""The compiled annealing of one layer: what it says of a placement is what the placement costs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb.placement.anneal_kernel import RULES, Layer, to_power
from eplb.placement.annealing import anneal
from eplb.split import slot_share
from eplb.topology import Topology


@pytest.mark.parametrize("doublings", [4, 5, 6, 7])
@pytest.mark.parametrize("load", [0.0, 0.7, 1.0, 1.3])
def test_power(load, doublings):
    assert to_power.py_func(load, doublings) == pytest.approx(load**2**doublings, rel=1e-12)


@settings(max_examples=40)
@given(
    st.sampled_from(["even", "nearest", "weighted"]),
    st.integers(1, 9),
    st.sampled_from([4, 5, 6, 7]),
    st.integers(0, 2**32),
)
def test_value_is_that_of_the_placement_kept(rule, num_windows, doublings, seed):
    num_ranks, slots_per_rank, num_experts, ranks_per_node = 4, 3, 9, 2
    random = np.random.default_rng(seed)
    load_EW = random.gamma(0.5, size=(num_experts, num_windows)) + 1e-3
    load_EW *= num_ranks / load_EW.sum(axis=0)
    slot_RK = np.append(np.arange(num_experts), [0, 1, 2]).reshape(slots_per_rank, num_ranks).T
    slot_RK = np.ascontiguousarray(slot_RK)
    count_E = np.bincount(slot_RK.ravel(), minlength=num_experts)
    layer = Layer(
        load_EW=load_EW,
        weight_W=random.dirichlet(np.ones(num_windows)),
        node_E=np.full(num_experts, -1),
        slot_RK=slot_RK,
        share_RK=1.0 / count_E[slot_RK],
        rule=RULES[rule],
        ranks_per_node=ranks_per_node,
        random=np.array([seed | 1], np.uint64),
    )
    best_RK, share_RK = slot_RK.copy(), layer.share_RK.copy()
    value = anneal(layer, 0.1, 1e-3, doublings, 20, best_RK, share_RK, np.inf)
    assert set(best_RK.ravel()) == set(range(num_experts))
    assert all(len(set(row)) == slots_per_rank for row in best_RK)
    if rule != "weighted":
        topology = Topology(
            num_nodes=num_ranks // ranks_per_node,
            ranks_per_node=ranks_per_node,
            slots_per_rank=slots_per_rank,
        )
        share_LS = slot_share(best_RK.reshape(1, -1), num_experts, topology, rule)
        share_RK = share_LS.reshape(best_RK.shape)
    part_E = np.bincount(best_RK.ravel(), share_RK.ravel(), minlength=num_experts)
    assert part_E == pytest.approx(np.ones(num_experts))
    load_RW = (load_EW[best_RK] * share_RK[:, :, np.newaxis]).sum(axis=1)
    assert value == pytest.approx(load_RW.max(axis=0) @ layer.weight_W, rel=1e-9)
