"""The parts of a swap by themselves: spare rows, budget, what is in force, rows over TCP."""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from swap_ranks import swap_plan  # noqa: E402
from torch.distributed import HashStore  # noqa: E402

from eplb.errors import InvalidInput, MigrationFailed  # noqa: E402
from eplb.runtime import lane as lane_module  # noqa: E402
from eplb.runtime import row_fetch, row_server  # noqa: E402
from eplb.runtime.in_force import InForce  # noqa: E402
from eplb.runtime.lane import Pacer, SideLane  # noqa: E402
from eplb.runtime.row_fetch import Fetch, RowFetcher  # noqa: E402
from eplb.runtime.row_server import RowServer  # noqa: E402
from eplb.runtime.spare_rows import SpareRows  # noqa: E402

CPU = torch.device("cpu")


def zeros(shape):
    return torch.zeros(shape, dtype=torch.uint8)


@given(st.integers(1, 6), st.data())
def test_rows_put_in_come_back_as_they_were(num_rows, data):
    spare = SpareRows(num_rows, 8, zeros)
    slots = torch.arange(10, dtype=torch.uint8)[:, None].expand(10, 8).contiguous()
    before = slots.clone()
    for _ in range(3):
        number = data.draw(st.integers(0, num_rows))
        chosen = data.draw(st.permutations(range(10)))[:number]
        waiting = data.draw(st.permutations(range(num_rows)))[:number]
        for place, row in enumerate(waiting):
            spare.rows[row] = 100 + place
        spare.put_in([slots[i] for i in chosen], waiting)
        for place, slot in enumerate(chosen):
            assert (slots[slot] == 100 + place).all()
        spare.put_back()
        assert torch.equal(slots, before)
    with pytest.raises(InvalidInput, match="spare_rows"):
        SpareRows(0, 8, zeros)


@given(
    st.floats(1e3, 1e8), st.integers(10**4, 10**6),
    st.lists(st.floats(0, 0.5), min_size=1, max_size=40),
)  # fmt: skip
def test_a_budget_is_kept_over_every_stretch_of_time(rate, size, gaps):
    with pytest.MonkeyPatch.context() as patch:
        now = [0.0]
        patch.setattr(lane_module.time, "monotonic", lambda: now[0])
        pacer = Pacer(rate, size)
        granted = 0
        for gap in gaps:
            now[0] += gap
            while not (wait_s := pacer.wait_s(size)):
                granted += size
            assert granted <= max(2 * size, 0.02 * rate) + now[0] * rate * 1.001
            now[0] += wait_s * 1.000001
            assert pacer.wait_s(size) == 0.0, "after waiting as long as was said"
            granted += size
        now[0] += 1000.0
        pacer.rest()
        assert pacer.wait_s(size) == 0.0
        assert pacer.wait_s(size) > 0.0, "rest saves up one burst"
    assert Pacer(None, size).wait_s(10**12) == 0.0


def test_two_threads_together_get_no_more_than_the_budget(monkeypatch):
    """The lane and the fetcher of one process; in no time there is what was saved up."""
    monkeypatch.setattr(lane_module.time, "monotonic", lambda: 0.0)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        pacer, granted = Pacer(1.0, 100_000), [0, 0]

        def ask(own):
            while not pacer.wait_s(1):
                granted[own] += 1

        threads = [threading.Thread(target=ask, args=(own,)) for own in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert sum(granted) == 100_000


def test_what_fails_on_the_lane_is_kept_for_the_swap_and_not_raised_into_serving():
    lane = SideLane(CPU, Pacer(None, 1))
    done = []
    lane.add(lambda: done.append(1), 5)
    lane.add(lambda: torch.zeros(2) @ torch.zeros(3), 5)
    lane.add(lambda: done.append(2), 5)
    lane.pump()
    assert isinstance(lane.error, RuntimeError)
    assert done == [1]
    assert lane.is_idle
    lane.clear()
    assert lane.error is None


@given(st.lists(st.sampled_from([(0,), (1,), (0, 2), (1, 2)]), max_size=4))
def test_the_same_in_force_has_the_same_digest_however_it_came_about(steps):
    old, new = swap_plan(0, 2, 6), swap_plan(1, 2, 6)
    in_force, layers = InForce.of(old, old.digest()), set()
    for number, rows in enumerate(steps):
        if number % 3 == 2:
            in_force, layers = in_force.returned(rows), layers - set(rows)
        else:
            in_force = in_force.switched(new, new.digest(), rows)
            layers |= set(rows)
        assert in_force.is_mixed == bool(layers)
        direct = InForce.of(old, old.digest())
        if layers:
            direct = direct.switched(new, new.digest(), sorted(layers))
        assert in_force.digest == direct.digest
        held = in_force.plan().placement.phys_to_log_LS
        assert np.array_equal(held, in_force.slots_LS())
        for row in range(3):
            source = new if row in layers else old
            assert np.array_equal(held[row], source.placement.phys_to_log_LS[row])
    if len(layers) == 3:
        assert in_force.digest == in_force.plan().digest() == new.digest()


def test_layers_of_two_split_rules_make_a_plan_of_the_new_rule():
    even, weighted = swap_plan(0, 2, 6), swap_plan(1, 2, 6, split="weighted")
    for old, new in ((even, weighted), (weighted, even)):
        plan = InForce.of(old, old.digest()).switched(new, new.digest(), [1]).plan()
        assert plan.split == new.split
        assert (plan.placement.split_weights_LS is None) == (new.split == "even")


class Source:
    """A server with ten rows of one layer, of which some are refused."""

    def __init__(self):
        self.rows = torch.randint(0, 256, (10, 4096), dtype=torch.uint8)
        self.server = RowServer(self.find, "127.0.0.1")
        self.store = HashStore()
        self.store.set("7", self.server.address)
        self.fetcher = RowFetcher(self.store, Pacer(None, 4096), 5.0)

    def find(self, epoch, layer, slot):
        return self.rows[slot] if (epoch, layer) == (3, 0) and 0 <= slot < 10 else None

    def fetch(self, epoch, slots):
        into = torch.zeros(len(slots), 4096, dtype=torch.uint8)
        self.fetcher.start(
            epoch, [Fetch(7, 0, slot, row) for slot, row in zip(slots, into, strict=True)]
        )
        while not self.fetcher.poll():
            time.sleep(0.001)
        return into

    def close(self):
        self.fetcher.close()
        self.server.close()


@pytest.fixture
def source():
    made = Source()
    yield made
    made.close()


def test_rows_come_over_as_they_are_and_after_a_refusal_again(source):
    assert torch.equal(source.fetch(3, [4, 0, 9]), source.rows[[4, 0, 9]])
    with pytest.raises(MigrationFailed, match="from process 7: it has ended this swap"):
        source.fetch(2, [1])
    assert torch.equal(source.fetch(3, [1]), source.rows[[1]])
    source.fetcher.cancel()
    assert torch.equal(source.fetch(3, [2]), source.rows[[2]])
    assert source.fetcher.done_bytes == 5 * 4096


@settings(max_examples=20, deadline=None)
@given(garbage=st.binary(max_size=200))
def test_strangers_get_nothing_and_disturb_nobody(garbage):
    source = Source()
    try:
        host, port, _ = source.server.address.split()
        with socket.create_connection((host, int(port)), 5) as stranger:
            answer = b""
            with suppress(OSError):  # The server may have hung up already.
                stranger.sendall(garbage + bytes(40))
                stranger.shutdown(socket.SHUT_WR)
                answer = stranger.recv(10)
            assert answer == b""
        assert torch.equal(source.fetch(3, [5]), source.rows[[5]])
    finally:
        source.close()


def wait_until(holds):
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_strangers_that_say_nothing_are_hung_up_on_and_peers_are_not(source, monkeypatch):
    source.fetch(3, [1])
    monkeypatch.setattr(row_server, "STRANGER_S", 0.2)
    host, port, _ = source.server.address.split()
    with socket.create_connection((host, int(port)), 5) as stranger:
        stranger.sendall(b"GET / HTTP/1.1")
        assert stranger.recv(1) == b""
    time.sleep(0.3)
    before = dict(source.fetcher._connections)
    assert torch.equal(source.fetch(3, [2]), source.rows[[2]])
    assert source.fetcher._connections == before, "it was the same connection"


def test_a_closed_server_serves_nobody_any_more():
    """Its threads would hold the model's memory for as long as anybody stays connected."""
    before = set(threading.enumerate())

    def number():
        return len(set(threading.enumerate()) - before)

    source = Source()
    source.fetch(3, [1])
    host, port, _ = source.server.address.split()
    with socket.create_connection((host, int(port)), 5):
        wait_until(lambda: number() == 3)
        source.server.close()
        wait_until(lambda: number() == 0)
        with pytest.raises(MigrationFailed):
            source.fetch(3, [1])
        source.fetcher.close()


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1 port 00"])
def test_what_was_not_fetched_never_counts_as_there(source, address):
    source.store.set("7", address)
    with pytest.raises(MigrationFailed, match="could not be fetched from process 7"):
        source.fetch(3, [1])


def test_a_fetch_withdrawn_while_it_connects_ends_at_once(source, monkeypatch):
    """Its peer never answers, and its socket is there only after all were closed."""
    deaf = socket.create_server(("127.0.0.1", 0))
    source.fetcher._timeout_s = 60.0
    connecting, go_on = threading.Event(), threading.Event()
    original = socket.create_connection

    def slowly(*arguments):
        made = original(*arguments)
        connecting.set()
        go_on.wait(20)
        return made

    monkeypatch.setattr(row_fetch.socket, "create_connection", slowly)
    source.store.set("7", f"127.0.0.1 {deaf.getsockname()[1]} 00")
    source.fetcher.start(3, [Fetch(7, 0, 1, torch.zeros(4096, dtype=torch.uint8))])
    connecting.wait(5)
    # It waits for no host that is gone.
    source.fetcher.close()
    assert not source.fetcher.is_idle
    go_on.set()
    # Long before its timeout.
    wait_until(lambda: source.fetcher.is_idle)
    assert not source.fetcher._connections
    deaf.close()


def test_an_address_of_another_machine_is_refused_with_the_remedy():
    with pytest.raises(InvalidInput, match=r"host '203\.0\.113\.1' cannot be listened at.*host="):
        RowServer(lambda *_: None, "203.0.113.1")
