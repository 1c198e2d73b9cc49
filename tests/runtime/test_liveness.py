"""What processes conclude from each other's views: agreement without a process started."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from eplb.errors import ServingFailed
from eplb.runtime.survivors import View, agreed_digest, agreed_loss, watched_by


@given(st.integers(1, 300), st.data())
def test_the_loss_of_a_whole_node_is_seen_from_beyond_it(num_processes, data):
    size = data.draw(st.integers(1, 16))
    first = data.draw(st.integers(0, num_processes - 1))
    node = {(first + i) % num_processes for i in range(min(size, num_processes - 1))}
    watchers = {
        p: {q for q in range(num_processes) if p in watched_by(q, num_processes)} for p in node
    }
    # Somebody who is left misses somebody of it, and then all send to all.
    assert not node or any(watchers[p] - node for p in node)
    assert all(p not in watched_by(p, num_processes) for p in range(num_processes))
    assert len(watched_by(0, num_processes)) <= num_processes.bit_length()


@given(st.data())
def test_two_processes_never_conclude_different_losses_from_the_same_views(data):
    num = data.draw(st.integers(2, 5))
    sets = st.frozensets(st.integers(0, num - 1), max_size=num - 1)
    views = {
        p: View(data.draw(sets), "a", None)
        for p in data.draw(st.sets(st.integers(0, num - 1), min_size=1))
    }
    found = {p: agreed_loss(p, views, num) for p in views}
    for p, dead in found.items():
        if dead:
            assert p not in dead
            survivors = set(range(num)) - dead
            assert all(found[q] == dead for q in survivors)


def test_nobody_concludes_before_all_survivors_have_spoken():
    dead = frozenset({2})
    views = {0: View(dead, "a", None), 1: View(frozenset(), "a", None)}
    assert not agreed_loss(0, views, 3)
    views[1] = View(dead, "a", None)
    assert agreed_loss(0, views, 3) == dead
    assert not agreed_loss(0, views, 4)


@pytest.mark.parametrize(
    ("views", "digest"),
    [
        ([("a", None), ("a", None)], "a"),
        ([("b", "a"), ("a", None)], "a"),
        ([("b", "a"), ("b", "a")], "b"),
        ([("b", None), ("b", "a")], "b"),
        ([("c", "b"), ("b", None), ("c", "b")], "b"),
        # Within a switch of several parts: where it began.
        ([("b", "a"), ("c", "a"), ("b", "a")], "a"),
    ],
)
def test_survivors_that_are_a_switch_apart_have_one_placement_in_common(views, digest):
    assert agreed_digest(View(frozenset(), *view) for view in views) == digest


def test_survivors_without_one_in_common_are_told_so():
    with pytest.raises(ServingFailed, match="no placement in common"):
        agreed_digest([View(frozenset(), "a", None), View(frozenset(), "b", None)])
