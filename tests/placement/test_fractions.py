"""The best fixed fractions of a placement."""

import numpy as np
import pytest
from exhaustive import score, tiny_layer
from hypothesis import given
from hypothesis import strategies as st
from strategies import loads, rows

from eplb.batch_split import batch_max_load
from eplb.placement.fractions import best_fractions, fraction_objective
from eplb.split import slot_share
from eplb.topology import Topology


@given(st.data())
def test_between_batch_and_even_and_whole(data):
    topology = Topology(num_nodes=1, ranks_per_node=4, slots_per_rank=3)
    load_WE = data.draw(loads(3, 7))
    load_WE *= 4 / load_WE.sum(axis=1, keepdims=True)
    row = data.draw(rows(7, topology))
    weight_W = np.array([0.5, 0.25, 0.25])
    fraction_S, objective = best_fractions(load_WE, weight_W, row, 4)
    assert (fraction_S >= 0).all()
    assert (fraction_S[row < 0] == 0).all()
    total_E = np.bincount(row[row >= 0], fraction_S[row >= 0], minlength=7)
    np.testing.assert_allclose(total_E, 1, rtol=1e-12)
    even_S = slot_share(row[np.newaxis], 7, topology, "even")[0]
    even = fraction_objective(load_WE, weight_W, row, even_S, 4)
    batch = weight_W @ batch_max_load(load_WE, row, 4)
    assert batch * (1 - 1e-6) <= objective <= even * (1 + 1e-6)


@given(st.data())
def test_one_window_is_split_as_by_batch(data):
    topology = Topology(num_nodes=1, ranks_per_node=5, slots_per_rank=2)
    load_WE = data.draw(loads(1, 6))
    load_WE *= 5 / load_WE.sum()
    row = data.draw(rows(6, topology))
    _, objective = best_fractions(load_WE, np.ones(1), row, 5)
    assert objective == pytest.approx(batch_max_load(load_WE, row, 5)[0], rel=1e-6)


def test_equals_a_dense_linear_programme():
    for seed in range(20):
        load_WE, weight_W, topology = tiny_layer(np.random.default_rng(seed), "weighted")
        num_experts = load_WE.shape[1]
        row = np.arange(topology.num_slots) % num_experts
        expected = score(load_WE, weight_W, row, topology, "weighted")
        assert best_fractions(load_WE, weight_W, row, topology.num_ranks)[1] == pytest.approx(
            expected, rel=1e-6
        )
