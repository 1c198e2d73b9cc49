"""What spawned processes do in the tests of the hot swap.

It is a module of its own because spawned processes import it by name.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ep_ranks import batch, fill, make_experts, make_group, start

from eplb.errors import InvalidInput, MigrationFailed
from eplb.model import MoEModel
from eplb.plan import Plan
from eplb.plan_file import read_plan
from eplb.runtime.batch_work import WrongChecksum
from eplb.runtime.ep.exchange import NO_FAULT, Told
from eplb.runtime.ep.expert_slots import ExpertSlots
from eplb.runtime.ep.experts import gated_layout
from eplb.runtime.ep.layer import EPMoELayer
from eplb.runtime.ep.reference import reference_output, relative_error
from eplb.runtime.ep.tables import PlacementTables
from eplb.runtime.liveness import Liveness, RanksLost
from eplb.runtime.manager import PlacementManager
from eplb.runtime.recovery import _restore, recover
from eplb.runtime.swap import Stage
from eplb.slots import Placement
from eplb.topology import Topology

LAYER_IDS = (3, 4, 7)
NUM_EXPERTS, TOP_K, HIDDEN, INNER = 10, 3, 16, 8
MOST_STEPS = 2000


def swap_plan(seed, num_ranks, slots_per_rank, *, split="even", revision="r1", ranks_per_node=None):
    """A random plan of three layers, some slots repeated, some empty."""
    rng = np.random.default_rng(seed)
    num_slots = num_ranks * slots_per_rank
    rows = np.full((len(LAYER_IDS), num_slots), -1)
    for row in rows:
        order = rng.permutation(num_slots)
        row[order[:NUM_EXPERTS]] = rng.permutation(NUM_EXPERTS)
        row[order[NUM_EXPERTS:]] = rng.integers(-1, NUM_EXPERTS, num_slots - NUM_EXPERTS)
    weights = None
    if split == "weighted":
        weights = np.where(rows >= 0, 1.0, 0.0)
        for row, weight in zip(rows, weights, strict=True):
            count = np.bincount(row[row >= 0], minlength=NUM_EXPERTS)
            weight[row >= 0] /= count[row[row >= 0]]
    ranks_per_node = ranks_per_node or num_ranks
    return Plan(
        model=MoEModel(
            name="toy", num_experts=NUM_EXPERTS, layer_ids=LAYER_IDS, top_k=TOP_K,
            revision=revision,
        ),
        topology=Topology(
            num_nodes=num_ranks // ranks_per_node, ranks_per_node=ranks_per_node,
            slots_per_rank=slots_per_rank,
        ),
        placement=Placement(
            phys_to_log_LS=rows, layer_ids=LAYER_IDS, num_experts=NUM_EXPERTS,
            split_weights_LS=weights,
        ),
        split=split,
    )  # fmt: skip


def make_swap_group(num_processes, folder, name="calls", **options):
    """A group whose store is, as under torchrun, a server; files would be asked at every step."""
    group = make_group(num_processes, folder, name, **options)
    store = None
    if group.process == 0:
        store = dist.TCPStore("127.0.0.1", 0, num_processes, is_master=True, wait_for_workers=False)
    port = int(group.gather_text(str(store.port) if store else "")[0])
    group.store = store or dist.TCPStore("127.0.0.1", port, num_processes, is_master=False)
    return group


class Serving:
    """A model of three layers under load, compared with its reference at every step."""

    def __init__(self, group, plan, **options):
        self.group, self.plan = group, plan
        self.layout = gated_layout(HIDDEN, INNER, torch.float32)
        self.experts = {
            layer_id: make_experts(self.layout, layer_id, NUM_EXPERTS) for layer_id in LAYER_IDS
        }
        self.layers = [self._layer(plan, layer_id) for layer_id in LAYER_IDS]
        self.steps = 0
        self.manager = PlacementManager(group, **{"spare_rows": 6, **options})
        self.manager.attach(self.layers, plan)

    def load(self, layer_id, expert):
        """What the checkpoint has of an expert."""
        return {name: every[expert] for name, every in self.experts[layer_id].items()}

    def _layer(self, plan, layer_id):
        tables = PlacementTables.of_plan(plan, layer_id, self.group)
        slots = ExpertSlots(self.layout, tables.slots_per_rank * self.group.ranks_per_process)
        first = self.group.first_rank * tables.slots_per_rank
        fill(slots, tables.phys_to_log_S, first, self.experts[layer_id])
        queue = []
        layer = EPMoELayer(
            self.group, tables, slots, lambda _: queue.pop(0), hidden_size=HIDDEN, payload="fp32"
        )
        layer.routing = queue
        return layer

    def step(self):
        """One step of the model, with as many tokens as it pleases; nothing may be lost."""
        result = self.manager.step()
        rng = np.random.default_rng([self.steps, self.group.process])
        self.steps += 1
        pairs = torch.zeros(2, dtype=torch.int64)
        for layer in self.layers:
            x, topk, weight = batch(rng, NUM_EXPERTS, HIDDEN, TOP_K, int(rng.choice([0, 1, 5, 12])))
            layer.routing.append((topk, weight))
            y = layer(x)
            experts = self.experts[layer.layer_id]
            assert relative_error(y, reference_output(x, topk, weight, experts)) < 1e-5
            pairs += torch.tensor([int((topk >= 0).sum()), sum(layer.received_pairs)])
        dist.all_reduce(pairs, group=self.group.control)
        assert pairs[0] == pairs[1]
        return result

    def run(self, until=None):
        """Serve until a swap ends, or until a condition that holds at one step everywhere."""
        for _ in range(MOST_STEPS):
            result = self.step()
            if result is not None or (until is not None and until()):
                return result
        raise AssertionError(f"no end after {MOST_STEPS} steps: {self.manager.status()}")

    def reach(self, stage, batch_number=0):
        """Serve until the swap is at a stage."""
        status = self.manager.status
        self.run(lambda: status().stage is stage and status().batch == batch_number)

    def swap(self, plan):
        self.manager.begin_swap(plan)
        result = self.run()
        assert result.error is None, result.error
        self.check_in_force(plan)

    def check_in_force(self, plan):
        """The plan, and its weights in their slots, on this process."""
        status = self.manager.status()
        assert status.stage is Stage.IDLE
        assert self.manager.plan.digest() == plan.digest() == status.in_force
        num_slots = self.layers[0].slots.num_slots
        first = self.group.process * num_slots
        for row, layer in enumerate(self.layers):
            assert np.array_equal(layer.tables.phys_to_log_S, plan.placement.phys_to_log_LS[row])
            for slot in range(num_slots):
                held = int(plan.placement.phys_to_log_LS[row, first + slot])
                if held >= 0:
                    for name, value in self.load(layer.layer_id, held).items():
                        assert torch.equal(layer.slots.tensor(name)[slot], value)

    def close(self):
        self.manager.close()


def random_swaps(process, num_processes, folder, cases):
    """Swaps between random plans under load, case by case."""
    start(process, num_processes, folder)
    for name, (group_options, options, number) in cases.items():
        group = make_swap_group(num_processes, folder, name, **group_options)
        splits = ("even", "nearest", "weighted")
        threads = threading.active_count()

        def plan(seed, group=group, splits=splits):
            return swap_plan(
                seed, group.num_ranks, 4, split=splits[seed % 3],
                ranks_per_node=group.ranks_per_node,
            )  # fmt: skip

        serving = Serving(group, plan(0), **options)
        pool = serving.manager._work.spare.rows.data_ptr()
        for seed in range(1, number + 1):
            serving.swap(plan(seed))
        assert serving.manager.status().moved_bytes > 0
        assert serving.manager._work.spare.rows.data_ptr() == pool
        serving.close()
        serving.step()
        group.barrier()
        assert threading.active_count() <= threads + 1
    dist.destroy_process_group()


# Faults. Each begins and ends with the old plan in force on all processes of one group.


def faults(process, num_processes, folder, names, options):
    """Go through faults one after the other in one group, which shows that serving goes on."""
    start(process, num_processes, folder)
    group = make_swap_group(num_processes, folder)
    serving = Serving(group, swap_plan(0, num_processes, 5), **options)
    for number, name in enumerate(names):
        try:
            (FAULTS | FAULTS_OF_PARTS)[name](serving, swap_plan(number + 1, num_processes, 5))
            serving.check_in_force(serving.plan)
            # Whatever was wrong is over: the next swap is done.
            serving.manager.deadline_s = 60.0
            serving.plan = swap_plan(1000 + number, num_processes, 5)
            serving.swap(serving.plan)
        except BaseException as error:
            raise AssertionError(f"fault {name!r}") from error
    serving.close()
    group.barrier()
    dist.destroy_process_group()


def expect_rollback(serving, match):
    result = serving.run()
    assert result.error is not None
    with pytest.raises(MigrationFailed, match=match):
        raise result.error
    assert serving.manager.status().error == str(result.error)


def other_plan(serving, plan):
    """One process is given another plan."""
    if serving.group.process == 1:
        plan = swap_plan(99, serving.group.num_ranks, 5)
    serving.manager.begin_swap(plan)
    expect_rollback(serving, "do not hold the same plan.*disagree: new_digest is sha256:")


def alone_in_it(serving, plan):
    """One process begins and the others do not."""
    serving.manager.deadline_s = 0.3
    if serving.group.process == 1:
        serving.manager.begin_swap(plan)
        expect_rollback(serving, "the deadline passed.*no begin_swap from process 0, 2")
    else:
        epoch = serving.manager.status().epoch
        serving.run(lambda: serving.manager.status().epoch > epoch)


def wrong_plans(serving, plan):
    """Plans that cannot follow the one in force are refused before anything happens."""
    manager, num_ranks = serving.manager, serving.group.num_ranks
    for wrong, match in (
        (swap_plan(1, num_ranks, 5, revision="r2"), "for revision r2 and .* revision r1"),
        (swap_plan(1, num_ranks, 5, revision=None), "for revision None"),
        (swap_plan(1, num_ranks, 6), "for slots a rank 6"),
        (swap_plan(1, 2 * num_ranks, 5), "for ranks 6"),
        (swap_plan(1, num_ranks, 5, ranks_per_node=1), "for ranks a node 1"),
    ):
        with pytest.raises(InvalidInput, match=match):
            manager.begin_swap(wrong)
    assert manager.status().stage is Stage.IDLE
    with pytest.raises(MigrationFailed, match="no swap is under way"):
        manager.abort()
    serving.step()


def two_at_once(serving, plan):
    """A second swap is refused and leaves the first as it is; it is aborted then."""
    serving.manager.begin_swap(plan)
    with pytest.raises(MigrationFailed, match="a swap is under way"):
        serving.manager.begin_swap(plan)
    serving.reach(Stage.MOVING)
    with pytest.raises(MigrationFailed, match="a swap is under way"):
        serving.manager.begin_swap(plan)
    serving.manager.abort()
    expect_rollback(serving, r"abort\(\) was called")


def aborted(stage, batch_number, serving, plan):
    """One process aborts."""
    serving.manager.begin_swap(plan)
    serving.reach(stage, batch_number)
    if serving.group.process == 2:
        serving.manager.abort()
    expect_rollback(serving, r"abort\(\) was called \(process 2: it was asked for\)")


def late(stage, batch_number, serving, plan):
    """The deadline passes on one process."""
    serving.manager.begin_swap(plan)
    serving.reach(stage, batch_number)
    if serving.group.process == 0:
        serving.manager._swap.deadline_s = 0.0
    expect_rollback(serving, f"the deadline passed.*at {stage.value}")


def memory_gone(name, batch_number, serving, plan):
    """An allocation fails on one process, in the work of a stage."""
    work, calls = serving.manager._work, [0]
    original = getattr(work, name)

    def fails(*arguments):
        calls[0] += 1
        if calls[0] == batch_number + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    if serving.group.process == 1:
        setattr(work, name, fails)
    serving.manager.begin_swap(plan)
    expect_rollback(serving, "memory ran out.*process 1: CUDA out of memory")
    if serving.group.process == 1:
        setattr(work, name, original)


def memory_gone_beside_serving(serving, plan):
    """An allocation fails in what the lane does under the experts' computation."""
    lane = serving.manager._work.lane

    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")

    serving.manager.begin_swap(plan)
    serving.reach(Stage.MOVING)
    if serving.group.process == 1:
        lane.add(fails, 0)
    expect_rollback(serving, "memory ran out.*process 1: CUDA out of memory")


def memory_gone_preparing(serving, plan):
    """The tables of the new plan cannot be made."""
    manager = serving.manager
    original = manager.tables_of

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    if serving.group.process == 0:
        manager.tables_of = fails
    manager.begin_swap(plan)
    expect_rollback(serving, "memory ran out.*process 0: CUDA out of memory")
    manager.tables_of = original


def corrupted(batch_number, serving, plan):
    """A bit flips on its way into a spare row."""
    work, done = serving.manager._work, []
    original = work.check

    def flip():
        if serving.manager.status().batch == batch_number and not done:
            done.append(batch_number)
            work.spare.rows[: work.spare.num_rows, 17] ^= 4
        original()

    if serving.group.process == 1:
        work.check = flip
    serving.manager.begin_swap(plan)
    expect_rollback(serving, r"wrong checksum \(process 1: layer \d, slot \d+: expert \d+ from")
    work.check = original


def corrupted_in_slot(serving, plan):
    """What was put into the slots does not add up."""
    work = serving.manager._work
    original = work._compare

    def differs(sums):
        if serving.manager.status().stage is Stage.SWITCHED:
            raise WrongChecksum("not what was loaded")
        original(sums)

    if serving.group.process == 2:
        work._compare = differs
    serving.manager.begin_swap(plan)
    expect_rollback(serving, r"wrong checksum \(process 2: not what was loaded\)")
    work._compare = original


def weights_changed(serving, plan):
    """The source itself no longer holds what was loaded."""
    manager = serving.manager
    checksums = manager._work._checksum_LE
    if serving.group.process == 0:
        manager._work._checksum_LE = checksums + 1
    manager.begin_swap(plan)
    expect_rollback(serving, "wrong checksum")
    manager._work._checksum_LE = checksums


def source_stalls(serving, plan):
    """A peer stops sending; the deadline ends it, and the alarm is seen before."""
    server, manager = serving.manager._equipment.server._server, serving.manager
    original, resume = server.find_row, threading.Event()

    def stalls(*arguments):
        resume.wait(30)
        return original(*arguments)

    if serving.group.process == 1:
        server.find_row = stalls
    manager.deadline_s, manager.alarm_s = 1.0, 0.2
    manager.begin_swap(plan)
    serving.reach(Stage.MOVING)
    if serving.group.process == 0:
        alarmed = []
        while not alarmed or not alarmed[-1]:
            alarmed.append(manager.status().is_stalled)
            time.sleep(0.02)
        assert manager.status().since_progress_s > 0.2
    expect_rollback(serving, "the deadline passed")
    manager.alarm_s = 10.0
    server.find_row = original
    resume.set()


def source_refuses(serving, plan):
    """A peer has no row to give."""
    server = serving.manager._equipment.server._server
    original = server.find_row
    if serving.group.process == 0:
        server.find_row = lambda *_: None
    serving.manager.begin_swap(plan)
    expect_rollback(serving, "a transfer failed.*from process 0: it has ended this swap")
    server.find_row = original


def source_hangs_up(serving, plan):
    """A peer's connection breaks in the middle of a row."""
    server = serving.manager._equipment.server._server
    original = server.find_row

    def breaks(*_):
        raise ConnectionAbortedError

    if serving.group.process == 2:
        server.find_row = breaks
    serving.manager.begin_swap(plan)
    expect_rollback(serving, "a transfer failed.*from process 2: it hung up")
    server.find_row = original


STAGES = (Stage.AGREEING, Stage.MOVING, Stage.CHECKING, Stage.SWITCHED)
FAULTS = {
    "another plan": other_plan,
    "alone": alone_in_it,
    "wrong plans": wrong_plans,
    "two at once": two_at_once,
    **{f"aborted, {stage.value}": partial(aborted, stage, 0) for stage in STAGES},
    **{f"aborted, {stage.value}, later": partial(aborted, stage, 1) for stage in STAGES[1:]},
    **{f"late, {stage.value}": partial(late, stage, 0) for stage in STAGES[1:]},
    "late, switched, later": partial(late, Stage.SWITCHED, 2),
    "no memory to move": partial(memory_gone, "move", 0),
    "no memory to move, later": partial(memory_gone, "move", 2),
    "no memory to check": partial(memory_gone, "check", 0),
    "no memory beside serving": memory_gone_beside_serving,
    "no memory for tables": memory_gone_preparing,
    "corrupted": partial(corrupted, 0),
    "corrupted, later": partial(corrupted, 1),
    "corrupted in its slot": corrupted_in_slot,
    "weights changed": weights_changed,
    "source stalls": source_stalls,
    "source refuses": source_refuses,
    "source hangs up": source_hangs_up,
}
# Where layers that moved together change over one at a step.
FAULTS_OF_PARTS = {
    "aborted, switching": partial(aborted, Stage.SWITCHING, 0),
    "aborted, all parts in": partial(aborted, Stage.SWITCHED, 0),
    "late, switching": partial(late, Stage.SWITCHING, 0),
    "corrupted in its slot, the last part": corrupted_in_slot,
}


def faults_of_one(process, num_processes, folder):
    """What fails on one process is raised on all at once, and the group is as good as before."""
    start(process, num_processes, folder)
    group = make_swap_group(num_processes, folder)
    plan = swap_plan(0, num_processes, 5)
    serving = Serving(group, plan, spare_rows=5)
    serving.manager.close()
    wrong = swap_plan(1, num_processes, 5) if process == 1 else plan
    with pytest.raises(InvalidInput, match="process 1: layer 3 serves another placement"):
        PlacementManager(group, spare_rows=5).attach(serving.layers, wrong)
    host = "203.0.113.1" if process == 0 else None
    with pytest.raises(InvalidInput, match=r"process 0: host .203\.0\.113\.1"):
        PlacementManager(group, spare_rows=5, host=host).attach(serving.layers, plan)

    def load(layer_id, expert):
        if process == 1:
            raise KeyError("w1")
        return serving.load(layer_id, expert)

    nothing = np.full_like(plan.placement.phys_to_log_LS, -1)
    with pytest.raises(MigrationFailed, match=r"failed on process 1: KeyError: .w1"):
        _restore(serving.manager, group, nothing, plan, load)
    serving.manager = PlacementManager(group, spare_rows=5)
    serving.manager.attach(serving.layers, plan)
    serving.swap(swap_plan(2, num_processes, 5))
    serving.close()
    group.barrier()
    dist.destroy_process_group()


# Deaths. A process kills itself; the others have to notice, agree, and go on without it.


def death(process, num_processes, folder, stage, batch_number, victim, options):
    """Serve and swap, lose a process at a stage, recover, serve and swap again."""
    start(process, num_processes, folder)
    group = make_swap_group(num_processes, folder, **options)
    liveness = Liveness(group)
    plan = swap_plan(0, group.num_ranks, 8, ranks_per_node=group.ranks_per_node)
    # All layers in one batch that changes over part by part, or each in a batch of its own.
    in_parts = stage in {Stage.SWITCHING, "apart, switching"}
    spare_rows = 8 * group.ranks_per_process * (len(LAYER_IDS) if in_parts else 1)
    switch_bytes = 1 if in_parts else None
    serving = Serving(
        group, plan, spare_rows=spare_rows, switch_bytes=switch_bytes, liveness=liveness
    )
    target = swap_plan(1, group.num_ranks, 8, ranks_per_node=group.ranks_per_node)
    with pytest.raises(RanksLost, match=f"process {victim} ") as caught:
        serve_until_death(serving, target, stage, batch_number, victim)
    loss = caught.value.loss
    recovered = recover(serving.manager, liveness, serving.load)
    (Path(folder) / f"loss{process}").write_text(
        json.dumps(
            {"dead": loss.dead, "digest": loss.digest, "seconds": loss.seconds,
             "loaded": recovered.num_loaded, "plan": recovered.plan.digest()}
        )
    )  # fmt: skip
    serving.group, serving.manager = recovered.group, recovered.manager
    assert not set(recovered.repaired.topology.ranks_in_service) & set(dead_ranks(group, loss))
    serving.check_in_force(recovered.plan)
    serving.step()
    ranks_per_node = recovered.group.ranks_per_node
    serving.swap(swap_plan(2, recovered.group.num_ranks, 8, ranks_per_node=ranks_per_node))
    serving.close()
    recovered.group.barrier()
    recovered.liveness.close()
    dist.destroy_process_group()


def dead_ranks(group, loss):
    return [
        p * group.ranks_per_process + i for p in loss.dead for i in range(group.ranks_per_process)
    ]


def serve_until_death(serving, target, stage, batch_number, victim):
    if stage == "apart":
        switch_apart(serving, target, victim, Stage.CHECKING, Stage.SWITCHED)
    if stage == "apart, switching":
        switch_apart(serving, target, victim, Stage.SWITCHING, Stage.SWITCHING)
    serving.manager.begin_swap(target)
    serving.reach(stage, batch_number)
    if serving.group.process == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        serving.step()


def switch_apart(serving, target, victim, before, after):
    """Lose a process when one survivor has switched and the other has not heard that all may."""
    manager = serving.manager
    manager.begin_swap(target)
    serving.reach(before)
    agreed = torch.tensor(0)
    while not agreed:
        assert manager.status().stage is before
        agreed = torch.tensor(int(manager._transaction.is_waiting))
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=serving.group.control)
        if not agreed:
            manager._go_on(manager._swap)
            manager._work.lane.pump()
    if serving.group.process == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    if serving.group.process == (victim + 1) % serving.group.num_processes:
        # What the next forward would have said.
        serving.layers[0]._words.hear([Told((manager._transaction.word(0), NO_FAULT), [], [])])
        manager.step()
        assert manager.status().stage is after
    while True:
        manager.liveness.check(1.0)


def _alone(work, process, num_processes, folder, arguments):
    try:
        work(process, num_processes, folder, *arguments)
    except BaseException:  # noqa: BLE001
        (Path(folder) / f"error{process}").write_text(traceback.format_exc())
        os._exit(1)


def run_apart(work, num_processes, folder, *arguments):
    """Run processes none of which is ended for another's sake; return their exit codes."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["swap_ranks"])
    processes = [
        context.Process(target=_alone, args=(work, p, num_processes, str(folder), arguments))
        for p in range(num_processes)
    ]
    for one in processes:
        one.start()
    for one in processes:
        one.join(300)
        one.kill()
        one.join()
    errors = sorted(Path(folder).glob("error*"))
    assert not errors, "\n".join(path.read_text() for path in errors)
    return [one.exitcode for one in processes]


def restarted(process, num_processes, folder, is_first):
    """All are killed when a swap has changed over some layers; started anew they go on."""
    start(process, num_processes, folder)
    group = make_swap_group(num_processes, folder)
    plan = read_plan(f"{folder}/plan.yaml")
    assert plan == swap_plan(0, num_processes, 5)
    serving = Serving(group, plan, spare_rows=5, plan_path=f"{folder}/plan.yaml")
    target = swap_plan(1, num_processes, 5)
    if is_first:
        serving.manager.begin_swap(target)
        serving.reach(Stage.SWITCHED, 1)
        os.kill(os.getpid(), signal.SIGKILL)
    serving.step()
    serving.check_in_force(plan)
    # One that is rolled back leaves the file as it is, and no other.
    serving.manager.begin_swap(target)
    serving.reach(Stage.MOVING)
    serving.manager.abort()
    expect_rollback(serving, r"abort\(\) was called")
    serving.swap(target)
    group.barrier()
    assert read_plan(f"{folder}/plan.yaml") == target
    # A file that cannot be replaced is told of, and serving goes on with the plan.
    group.barrier()
    if group.process == 0:
        Path(f"{folder}/plan.yaml").unlink()
        Path(f"{folder}/plan.yaml").mkdir()
    serving.manager.begin_swap(plan)
    error = serving.run().error
    assert (error is None) == (group.process != 0), error
    assert error is None or "the plan is in force and was not written" in str(error)
    serving.check_in_force(plan)
    serving.close()
    assert not list(Path(folder).glob(".plan.yaml*"))
    group.barrier()
    dist.destroy_process_group()
