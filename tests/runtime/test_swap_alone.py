"""Swaps of one process that holds all ranks: what serving code may do to a manager, and when."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

from swap_ranks import LAYER_IDS, NUM_EXPERTS, Serving, expect_rollback, swap_plan  # noqa: E402

from eplb.errors import InvalidInput, MigrationFailed  # noqa: E402
from eplb.runtime.ep.group import EPGroup  # noqa: E402
from eplb.runtime.manager import PlacementManager  # noqa: E402
from eplb.runtime.moves import CHECKPOINT, swap_batches  # noqa: E402
from eplb.runtime.recovery import _restore  # noqa: E402
from eplb.runtime.swap import Stage  # noqa: E402

NUM_RANKS, PER_RANK = 3, 4


def plan(seed, **options):
    return swap_plan(seed, NUM_RANKS, PER_RANK, **options)


def with_slots(rows):
    """The plan whose layers have these experts in their slots."""
    one = plan(0)
    slots_LS = np.array(rows)
    return replace(one, placement=replace(one.placement, phys_to_log_LS=slots_LS))


@pytest.fixture
def group():
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield EPGroup(dist.group.WORLD, dist.PrefixStore("calls", store), num_ranks=NUM_RANKS)
    dist.destroy_process_group()


@pytest.fixture
def serve(group):
    """Make something served, and close it in the end."""
    made = []

    def make(first=None, **options):
        made.append(Serving(group, first or plan(0), **{"spare_rows": 12, **options}))
        return made[-1]

    yield make
    for serving in made:
        serving.manager.close()


def test_a_swap_whose_way_back_does_not_fit_is_refused_before_anything_moves(serve):
    """Emptied slots need no row on the way there, and one each on the way back."""
    rest = list(range(4, NUM_EXPERTS))
    old = with_slots([[0, 1, 2, 3, *rest, 0, 1]] * 3)
    new = with_slots(
        [[-1, -1, 2, 3, *rest, 0, 1], [0, 1, 2, 3, *rest, 1, 1], [0, 1, 2, 3, *rest, 1, 1]]
    )
    serving = serve(old, spare_rows=1)
    with pytest.raises(MigrationFailed, match=r"on the way back.*give spare_rows=2"):
        serving.manager.begin_swap(new)
    serving.check_in_force(old)
    serving.step()


def test_with_rows_for_the_way_back_a_late_failure_goes_back(serve):
    rest = list(range(4, NUM_EXPERTS))
    old = with_slots([[0, 1, 2, 3, *rest, 0, 1]] * 3)
    new = with_slots([[-1, -1, 2, 3, *rest, 0, 1], *[[1, 0, 2, 3, *rest, 0, 1]] * 2])
    serving = serve(old, spare_rows=2)
    serving.manager.begin_swap(new)
    serving.reach(Stage.MOVING, 1)
    serving.manager.abort()
    expect_rollback(serving, "it was asked for")
    serving.check_in_force(old)


def test_an_abort_from_another_thread_never_breaks_a_step(serve, monkeypatch):
    """What it read of the transaction may be old when it writes."""
    serving = serve()
    manager = serving.manager
    original = type(manager._transaction).abort
    reading, written = threading.Event(), threading.Event()

    def slowly(self, reason):
        made = original(self, reason)
        if threading.current_thread() is not threading.main_thread():
            reading.set()
            written.wait(5)
        return made

    monkeypatch.setattr(type(manager._transaction), "abort", slowly)
    manager.begin_swap(plan(1))
    thread = threading.Thread(target=manager.abort)
    thread.start()
    reading.wait(0.2)
    # The swap ends meanwhile.
    serving.run()
    written.set()
    thread.join()
    for _ in range(3):
        assert serving.step() is None
    assert manager.status().stage is Stage.IDLE
    serving.swap(plan(2))


def test_aborts_from_a_thread_at_any_time_leave_one_of_both_plans(serve):
    serving = serve(spare_rows=12, switch_bytes=1)
    manager, ending, now = serving.manager, threading.Event(), serving.manager.plan

    def pester():
        while not ending.wait(0.004):
            with suppress(MigrationFailed):
                manager.abort()
            manager.status()

    thread = threading.Thread(target=pester)
    thread.start()
    try:
        for seed in range(1, 16):
            manager.begin_swap(plan(seed))
            error = serving.run().error
            now = plan(seed) if error is None else now
            assert error is None or "it was asked for" in str(error)
            serving.check_in_force(now)
    finally:
        ending.set()
        thread.join()


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError])
def test_tables_that_cannot_be_made_end_the_swap_and_not_the_step(serve, error):
    serving = serve()
    original = serving.manager.tables_of

    def fails(*_):
        raise error("no such table")

    serving.manager.tables_of = fails
    serving.manager.begin_swap(plan(1))
    expect_rollback(serving, "it could not be prepared.*no such table")
    serving.manager.tables_of = original
    serving.swap(plan(1))


def test_without_its_store_a_swap_says_what_is_missing_and_serving_goes_on(serve):
    serving = serve()
    board = serving.manager._board

    class Gone:
        def __getattr__(self, name):
            def fails(*_):
                raise dist.DistNetworkError("the store is gone")

            return fails

    store, board._store = board._store, Gone()
    serving.manager.begin_swap(plan(1))
    expect_rollback(serving, "it could not be prepared.*the store is gone")
    board._store = store
    serving.swap(plan(1))


def test_a_managers_last_word_is_not_heard_by_the_next_one(group, serve):
    first = serve()
    first.manager.begin_swap(plan(1))
    first.reach(Stage.MOVING)
    first.manager.abort()
    first.step()
    # Between two steps, so that the layers have heard nothing since.
    assert "it was asked for" in str(first.manager.step().error)
    first.manager.close()
    first.manager = PlacementManager(group, spare_rows=12)
    first.manager.attach(first.layers, plan(0))
    first.swap(plan(1))


def test_a_closed_manager_keeps_out_of_the_next_ones_words(group, serve):
    serving = serve()
    old = serving.manager
    serving.swap(plan(1))
    old.close()
    old.close()
    assert old.step() is None
    with pytest.raises(InvalidInput, match="is closed"):
        old.begin_swap(plan(2))
    serving.manager = PlacementManager(group, spare_rows=12)
    serving.manager.attach(serving.layers, plan(1))
    serving.manager.begin_swap(plan(2))
    for _ in range(500):
        old.step()
        result = serving.step()
        old.step()
        if result is not None:
            break
    assert result is not None
    assert result.error is None
    serving.check_in_force(plan(2))


@pytest.mark.parametrize("stage", [Stage.AGREEING, Stage.MOVING, Stage.CHECKING, Stage.SWITCHED])
def test_close_in_the_middle_of_a_swap_ends_all_threads(serve, stage):
    before = threading.active_count()
    serving = serve(bytes_per_s=1e6)
    serving.manager.begin_swap(plan(1))
    serving.reach(stage)
    serving.manager.close()
    assert serving.manager.step() is None
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_manager_without_layers_says_so_and_can_be_closed(group):
    manager = PlacementManager(group, spare_rows=4)
    for call in (
        manager.step,
        manager.status,
        lambda: manager.plan,
        lambda: manager.begin_swap(plan(1)),
    ):
        with pytest.raises(InvalidInput, match=r"attach\(model, plan\) first"):
            call()
    manager.close()


def test_layers_are_attached_once_and_with_what_they_serve(group, serve):
    serving = serve()
    with pytest.raises(InvalidInput, match="make another one"):
        serving.manager.attach(serving.layers, plan(0))
    serving.manager.close()
    other = PlacementManager(group, spare_rows=4)
    with pytest.raises(InvalidInput, match="layer 3 serves another placement"):
        other.attach(serving.layers, plan(1))
    with pytest.raises(InvalidInput, match="layer 3 has 12 slots on this process and the plan 15"):
        other.attach(serving.layers, swap_plan(0, NUM_RANKS, 5))
    other.attach(serving.layers, plan(0))
    other.close()


@pytest.mark.parametrize(
    "options",
    [
        {"spare_rows": 0}, {"spare_rows": -1},
        {"bytes_per_s": 0}, {"bytes_per_s": float("nan")},
        {"switch_bytes": 0}, {"switch_bytes": float("nan")}, {"switch_bytes": float("inf")},
        {"deadline_s": -1.0}, {"deadline_s": float("nan")}, {"deadline_s": float("inf")},
        {"alarm_s": 0.0}, {"alarm_s": float("nan")},
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(group, options):
    (name,) = options
    with pytest.raises(InvalidInput, match=name):
        PlacementManager(group, **{"spare_rows": 4, **options})


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_group_has_a_timeout(group, timeout_s):
    for make in (partial(EPGroup, group.process_group, group.store), EPGroup.from_environment):
        with pytest.raises(InvalidInput, match="timeout_s"):
            make(timeout_s=timeout_s)


def test_more_lost_experts_than_spare_rows_are_restored(group, serve):
    serving = serve(spare_rows=1)
    slots_LS = plan(0).placement.phys_to_log_LS
    held = slots_LS.copy()
    held[:, 3:] = -1
    lost = [set(row[row >= 0]) - set(row[:3]) for row in slots_LS]
    for layer in serving.layers:
        layer.slots.rows[3:] = 0
    loaded = _restore(serving.manager, group, held, plan(0), serving.load)
    batches = swap_batches(
        held, slots_LS, slots_per_rank=PER_RANK, ranks_per_process=NUM_RANKS,
        ranks_per_node=NUM_RANKS, spare_rows=12,
    )  # fmt: skip
    assert loaded == sum(int((batch.source_M == CHECKPOINT).sum()) for batch in batches)
    assert loaded >= sum(map(len, lost)) > len(LAYER_IDS)
    serving.check_in_force(plan(0))


def test_a_swap_to_what_is_in_force_moves_nothing(serve):
    serving = serve()
    moved = serving.manager.status().moved_bytes
    for _ in range(3):
        serving.swap(plan(0))
    assert serving.manager.status().moved_bytes == moved
