"""What sampled routings tell: which experts are chosen together."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from eplb.profiles import co_activation


@given(
    arrays.arrays(
        np.int16,
        st.tuples(st.integers(0, 6), st.integers(1, 3), st.integers(1, 4)),
        elements=st.integers(-1, 6),
    )
)
def test_pairs_are_what_counting_gives(routings):
    expected = np.zeros((routings.shape[1], 5, 5), int)
    for token in routings:
        for layer, experts in enumerate(token):
            chosen = {int(e) for e in experts if 0 <= e < 5}
            for a, b in itertools.product(chosen, repeat=2):
                expected[layer, a, b] += 1
    assert np.array_equal(co_activation(routings, 5), expected)
