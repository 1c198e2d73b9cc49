"""What processes conclude from each other's views: agreement without a process started."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from eplb.errors import InvalidInput, ServingFailed
from eplb.runtime.liveness import Liveness
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


class ThreadGroup:
    """What the watch needs of a group, for threads instead of processes."""

    def __init__(self, process, num_processes, meeting):
        self.process, self.num_processes, self.ranks_per_process = process, num_processes, 1
        self.alarm, self.aborted, self._meeting = None, False, meeting

    def gather_text(self, text):
        barrier, told = self._meeting
        told[self.process] = text
        barrier.wait(5)
        found = [told[p] for p in range(self.num_processes)]
        barrier.wait(5)
        return found

    def abort(self):
        self.aborted = True


def watch_in_threads(num, **options):
    """The watches of a group whose processes are threads, or what each raised."""
    meeting, made = (threading.Barrier(num), {}), [None] * num

    def begin(process):
        try:
            own = {name: value[process] for name, value in options.items()}
            made[process] = Liveness(ThreadGroup(process, num, meeting), **own)
        except InvalidInput as error:
            made[process] = error

    threads = [threading.Thread(target=begin, args=(p,)) for p in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def test_survivors_without_a_common_placement_stop_and_say_why():
    """One had attached when the third died, and the other had not."""
    watches = watch_in_threads(3, timeout_s=[2.0] * 3, interval_s=[0.1] * 3, host=["127.0.0.1"] * 3)
    watches[0].report("a", None)
    watches[2].close()
    for one in watches[:2]:
        with pytest.raises(ServingFailed, match="no placement in common"):
            one.check(20.0)
        deadline = time.monotonic() + 5
        while not one.group.aborted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert one.group.aborted
        assert one.loss is None
        one.close()


def test_an_address_that_one_machine_lacks_is_told_to_all():
    hosts = ["127.0.0.1", "203.0.113.1", "127.0.0.1"]
    for error in watch_in_threads(3, host=hosts):
        with pytest.raises(InvalidInput, match=r"process 1: host '203\.0\.113\.1'"):
            raise error


def test_an_address_that_means_every_machine_its_own_is_told_to_all():
    """As of a machine whose /etc/hosts has its name at 127.0.1.1; others would take it for dead."""
    elsewhere = "0.0.0.0"  # noqa: S104  (any other address that this machine has)
    for error in watch_in_threads(3, host=["127.0.0.1", elsewhere, elsewhere]):
        with pytest.raises(InvalidInput, match=r"process 0 can be reached at 127\.0\.0\.1 only"):
            raise error


@pytest.mark.parametrize(
    "times", [(2.0, 2.0), (0.1, 0.2), (2.0, 0.0), (2.0, -1.0), (float("nan"), 0.1)]
)
def test_times_that_cannot_be_are_refused(times):
    timeout_s, interval_s = times
    with pytest.raises(InvalidInput, match="longer than interval_s"):
        Liveness(ThreadGroup(0, 1, None), timeout_s=timeout_s, interval_s=interval_s)


def test_a_flood_from_strangers_does_not_keep_a_process_from_its_heartbeat():
    class Flood:
        def settimeout(self, _):
            pass

        def recv(self, _):
            return b"no heartbeat"

    (watch,) = watch_in_threads(1, interval_s=[0.05], host=["127.0.0.1"])
    watch.close()
    watch._socket = Flood()
    heard = []
    thread = threading.Thread(target=lambda: heard.append(watch._hear()), daemon=True)
    thread.start()
    thread.join(5)
    assert heard == [False], "it returned, and knows that more is unread"
