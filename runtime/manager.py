"""What serving code holds to change the placement while it serves: :class:`PlacementManager`.

Every process calls :meth:`PlacementManager.step` between two steps of its model, and between two
such calls all processes run the same forwards. What happens when is decided by
:mod:`eplb.runtime.swap`, done by :mod:`eplb.runtime.batch_work`; here they meet clocks, plans and
errors.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from eplb.arrays import IntArray
from eplb.errors import EplbError, InvalidInput, MigrationFailed
from eplb.plan import Plan
from eplb.runtime.batch_work import SwapLayer, WrongChecksum
from eplb.runtime.checksums import expert_checksums
from eplb.runtime.ep.agreement import gather_sound
from eplb.runtime.ep.group import EPGroup
from eplb.runtime.ep.tables import PlacementTables
from eplb.runtime.equipment import Equipment
from eplb.runtime.in_force import InForce
from eplb.runtime.liveness import Liveness
from eplb.runtime.moves import (
    arriving_slots,
    check_spare_rows,
    layer_batches,
    rows_per_process,
)
from eplb.runtime.preparation import Prepared, Swap, TablesOf, prepare
from eplb.runtime.proposal import Proposal, check_successor
from eplb.runtime.served_layers import layers_served
from eplb.runtime.staged_plan import StagedPlan
from eplb.runtime.swap import Abort, AbortReason, Action, Stage, Transaction, abort_of, epoch_of
from eplb.runtime.swap_status import SwapResult, SwapStatus

__all__ = ["PlacementManager"]


class PlacementManager:
    """Puts plans in force under a running model.

    Making it and :meth:`attach` are collective; :meth:`begin_swap` is to be called by every process
    in any step, and the swap begins when all have.

    Parameters
    ----------
    group : EPGroup
    spare_rows : int
        Experts that can wait on a process, which bounds how many layers change over together. A
        layer whose every slot changes needs as many as the process has slots of it.
    bytes_per_s : float, optional
        Most that this process moves while it serves; no limit where left out.
    switch_bytes : int, optional
        Most that a step puts in place: layers that have moved together change over one after the
        other, as many a step as this allows, at least one. All of them at once where it is None.
    deadline_s : float
        A swap that has not ended by then is rolled back.
    alarm_s : float
        Without progress for so long, :attr:`SwapStatus.is_stalled` is set.
    plan_path : path, optional
        Process 0 puts the plan there when it is in force on all, so that a restart begins from it.
    tables_of : callable
        From a plan, a layer id and the group to what the layer's ``install`` takes.
    host : str, optional
        Address under which other processes reach this one; found out where left out.
    liveness : Liveness, optional
        Told what is in force; where it finds processes dead, :meth:`step` raises.

    Attributes
    ----------
    layers : list of SwapLayer
        In the order of the plan's layers.
    checksum_LE : array of int64, shape [L, E]
        Of each expert when it was attached.
    """

    def __init__(
        self,
        group: EPGroup,
        *,
        spare_rows: int,
        bytes_per_s: float | None = None,
        switch_bytes: int | None = 1 << 30,
        deadline_s: float = 60.0,
        alarm_s: float = 10.0,
        plan_path: str | os.PathLike[str] | None = None,
        tables_of: TablesOf = PlacementTables.of_plan,
        host: str | None = None,
        liveness: Liveness | None = None,
    ) -> None:
        if spare_rows < 1:
            raise InvalidInput(f"spare_rows ({spare_rows}) must be at least 1")
        if bytes_per_s is not None and not bytes_per_s > 0:
            raise InvalidInput(f"bytes_per_s must be positive, got {bytes_per_s}")
        if switch_bytes is not None and not 1 <= switch_bytes < math.inf:
            raise InvalidInput(f"switch_bytes must be at least 1, or None, got {switch_bytes}")
        for name, seconds in (("deadline_s", deadline_s), ("alarm_s", alarm_s)):
            if not 0 < seconds < math.inf:
                raise InvalidInput(f"{name} must be positive and finite, got {seconds}")
        self.group = group
        self.spare_rows, self.bytes_per_s = spare_rows, bytes_per_s
        self.switch_bytes = switch_bytes
        self.deadline_s, self.alarm_s = deadline_s, alarm_s
        self.plan_path, self.tables_of = plan_path, tables_of
        self.host, self.liveness = host, liveness
        self.layers: list[SwapLayer] = []
        self._equipment: Equipment | None = None
        self._is_closed = False
        self._transaction = Transaction()
        self._swap: Swap | None = None
        self._error: str | None = None
        self._returning_from: MigrationFailed | None = None
        self._moved_bytes = 0
        self._progress: tuple[int, Transaction] = (0, self._transaction)
        self._progress_s = time.monotonic()
        self._pool = ThreadPoolExecutor(1, "eplb-swap")
        self._plan_file: StagedPlan | None = None
        if plan_path is not None and group.process == 0:
            self._plan_file = StagedPlan(plan_path)

    def attach(self, model: nn.Module | Iterable[SwapLayer], plan: Plan) -> None:
        """Take charge of a model's layers, which serve under ``plan``. Collective.

        Digests of all experts are taken here, so the weights must be the loaded ones.

        Raises
        ------
        InvalidInput
            Layers and plan do not fit each other, processes serve different plans, or replicas of
            an expert differ; on all processes, also where it is one's fault.
        """
        if self._equipment is not None or self._is_closed:
            raise InvalidInput("this manager has had its layers; make another one to attach to")
        layers: list[SwapLayer] = []

        def own() -> str:
            layers[:] = layers_served(model, plan, self.group)
            row_bytes = layers[0].slots.layout.row_bytes
            self._layout_digest = layers[0].slots.layout.digest()
            self._rows_per_step = (
                None if self.switch_bytes is None else max(int(self.switch_bytes) // row_bytes, 1)
            )
            return f"{plan.digest()} {self._layout_digest} {self.spare_rows} {self._rows_per_step}"

        others = gather_sound(self.group, own)
        if len(set(others)) > 1:
            raise InvalidInput(
                f"processes serve different plans, layouts, spare rows or rows switched a step: "
                f"{sorted(set(others))}; start all from one plan, with the same options"
            )
        self._slots_per_process = layers[0].slots.num_slots
        self.layers = layers
        # What was last heard was said to another manager.
        self._transaction = Transaction(epoch_of(layers[0].word_min) + 1)
        self._is_captured = any(getattr(layer, "padded", False) for layer in layers)
        # On the thread that works for swaps, so that the first one finds it warm.
        here = self._submit(plan.placement.phys_to_log_LS, plan, None).result()
        self._tables = list(here.tables)
        self._in_force = InForce.of(plan, here.digest)
        self._fallback: InForce | None = None
        self.checksum_LE = expert_checksums(self.group, layers, plan)
        self._equipment = Equipment.connect(
            self.group, layers, self.checksum_LE, self._find_row, spare_rows=self.spare_rows,
            bytes_per_s=self.bytes_per_s, timeout_s=self.deadline_s, host=self.host,
        )  # fmt: skip
        self._work, self._board = self._equipment.work, self._equipment.board
        self._put_in_force(self._in_force, None)

    def begin_swap(self, plan: Plan) -> None:
        """Begin to put another plan in force; :meth:`step` goes on with it.

        Raises
        ------
        InvalidInput
            The plan cannot follow the one in force. Nothing has happened then.
        MigrationFailed
            A swap is under way, or a layer does not fit into the spare rows, there or back.
        """
        self._check_attached()
        if self._is_closed:
            raise InvalidInput("this manager is closed; make another one for the next swap")
        if self._swap is not None:
            raise MigrationFailed(
                f"a swap is under way ({self._transaction.stage.value}); wait for its end, or call "
                "abort()"
            )
        in_force = self._in_force
        check_successor(in_force.old, plan)
        going_back = False
        if in_force.is_mixed:
            digest = plan.digest()
            if digest not in {in_force.old_digest, in_force.new_digest}:
                raise MigrationFailed(
                    f"{len(in_force.layers)} layers are of the plan {in_force.new_digest} and the "
                    f"others of {in_force.old_digest}; swap to one of these first"
                )
            going_back = digest == in_force.old_digest
        self._begin(plan, is_returning=going_back)

    def step(self) -> SwapResult | None:
        """Go on with a swap. To be called by all processes between the same two steps.

        Returns
        -------
        SwapResult or None
            Where a swap ended with this call.

        Raises
        ------
        RanksLost
            Processes died, see :mod:`eplb.runtime.liveness`.
        """
        self._check_attached()
        if self._is_closed:
            return None
        if self.liveness is not None:
            self.liveness.check()
        word_min = self.layers[0].word_min
        self._transaction, action = self._transaction.hear(word_min)
        result = self._act(action, abort_of(word_min)) if action is not None else None
        if self._swap is not None:
            if self._is_captured:
                # No forward says when its dispatch is on the stream.
                self._work.lane.pump()
            self._go_on(self._swap)
        word = self._transaction.word(self.group.process)
        for layer in self.layers:
            layer.word = word
        self._note_progress()
        return result

    def abort(self) -> None:
        """Have all processes roll the swap back; one caller is enough, on any thread.

        It comes too late where the swap ends at the next step.

        Raises
        ------
        MigrationFailed
            No swap is under way.
        """
        swap = self._swap
        if swap is None:
            raise MigrationFailed("no swap is under way; there is nothing to abort")
        # The transaction is the serving thread's: it takes this up in its next step.
        swap.is_abort_asked = True

    def status(self) -> SwapStatus:
        """Return where a swap stands. May be called from any thread."""
        self._check_attached()
        transaction, swap = self._transaction, self._swap
        since_s = time.monotonic() - self._progress_s if swap is not None else 0.0
        return SwapStatus(
            stage=transaction.stage,
            epoch=transaction.epoch,
            in_force=self._in_force.digest,
            target=None if swap is None or not swap.is_published else swap.prepared.result().digest,
            is_returning=swap is not None and swap.is_returning,
            batch=transaction.batch,
            num_batches=transaction.num_batches,
            moved_bytes=self._moved_bytes,
            since_progress_s=since_s,
            is_stalled=since_s > self.alarm_s,
            error=self._error,
        )

    @property
    def plan(self) -> Plan:
        """The plan in force; while a swap changes layer after layer, what is in force of both."""
        self._check_attached()
        return self._in_force.plan()

    def successor(self, group: EPGroup, liveness: Liveness) -> PlacementManager:
        """Return a manager with the same options for another group, not attached yet."""
        return PlacementManager(
            group, spare_rows=self.spare_rows, bytes_per_s=self.bytes_per_s,
            switch_bytes=self.switch_bytes, deadline_s=self.deadline_s, alarm_s=self.alarm_s,
            plan_path=self.plan_path, tables_of=self.tables_of, host=self.host, liveness=liveness,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the layers, threads and memory. No swap may be under way."""
        if self._is_closed:
            return
        self._is_closed = True
        self._pool.shutdown()
        if self._plan_file is not None:
            self._plan_file.discard()
        if self._equipment is not None:
            for layer in self.layers:
                layer.word = 0
            self._equipment.close()

    def settle(self, digest: str) -> None:
        """After a loss: have in force what the survivors agreed on, going back one switch if need.

        Raises
        ------
        MigrationFailed
            This process cannot.
        """
        self._check_attached()
        if self._fallback is not None and digest == self._fallback.digest != self._in_force.digest:
            self._in_force, self._fallback = self._fallback, None
            self._work.roll_back(self._tables)
        if digest != self._in_force.digest:
            raise MigrationFailed(
                f"survivors agreed on {digest} and this process has {self._in_force.digest} in "
                "force; restart it from the checkpoint"
            )
        self._work.withdraw()
        self._swap = None

    def _begin(self, plan: Plan, *, is_returning: bool = False) -> None:
        old_LS, new_LS = self._in_force.slots_LS(), plan.placement.phys_to_log_LS
        batches = layer_batches(
            arriving_slots(old_LS, new_LS), self._slots_per_process, self.spare_rows,
            self._rows_per_step,
        )  # fmt: skip
        if len(batches) > 1 and not is_returning:
            # Slots that the new plan leaves empty arrive on the way back only.
            back_LS = arriving_slots(new_LS, self._in_force.old.placement.phys_to_log_LS)
            try:
                check_spare_rows(
                    rows_per_process(back_LS, self._slots_per_process), self.spare_rows
                )
            except MigrationFailed as error:
                raise MigrationFailed(f"on the way back, should the swap fail: {error}") from None
        # Peers may still be reading what was said of the last one.
        self._board.clear(self._transaction.epoch - 2)
        now_s = time.monotonic()
        self._swap = Swap(
            plan=plan,
            prepared=self._submit(old_LS, plan, self._plan_file),
            deadline_s=now_s + self.deadline_s,
            begun_s=now_s,
            is_returning=is_returning,
        )
        self._transaction = self._transaction.begin(map(len, batches))
        self._returning_from = None
        self._progress_s = now_s

    def _submit(
        self, old_LS: IntArray, plan: Plan, plan_file: StagedPlan | None
    ) -> Future[Prepared]:
        return self._pool.submit(
            prepare, self.group, old_LS, plan, spare_rows=self.spare_rows,
            rows_per_step=self._rows_per_step, tables_of=self.tables_of, plan_file=plan_file,
        )  # fmt: skip

    def _act(self, action: Action, abort: Abort | None) -> SwapResult | None:
        """Do what all processes do at this step."""
        swap, work = self._swap, self._work
        assert swap is not None
        if action is Action.ROLL_BACK:
            assert abort is not None
            return self._roll_back(swap, abort)
        prepared = swap.prepared.result()
        if action is Action.MOVE:
            self._settle(prepared, self._transaction.batch - 1)
            batch = prepared.batches[self._transaction.batch]
            self._attempt(lambda: work.move(self._transaction.epoch, batch))
        elif action is Action.CHECK:
            batch = prepared.batches[self._transaction.batch]
            received = batch.received_by(self.group.process, self._slots_per_process)
            self._moved_bytes += len(received) * work.spare.rows.shape[1]
            self._attempt(work.check)
        elif action is Action.SWITCH:
            part = self._transaction.num_parts_in - 1
            layers = prepared.batches[self._transaction.batch].parts[part]
            now = self._in_force
            after = (
                now.returned(layers)
                if swap.is_returning
                else now.switched(swap.plan, prepared.digest, layers)
            )
            # Until all parts are in everywhere, what this process can go back to is the beginning.
            self._put_in_force(after, self._fallback or now)
            work.switch(prepared.tables, part)
        else:
            return self._finish(swap, prepared)
        return None

    def _settle(self, prepared: Prepared, batch: int) -> None:
        """Note that a batch is in force everywhere, so that nothing goes back behind it."""
        self._put_in_force(self._in_force, None)
        self._work.end()
        if batch >= 0:
            for layer in prepared.batches[batch].layers:
                self._tables[layer] = prepared.tables[layer]

    def _go_on(self, swap: Swap) -> None:
        """Look whether this process is done with its stage, and in time."""
        if self._transaction.reason is not None:
            return
        if swap.is_abort_asked:
            self._fail(AbortReason.ASKED, "it was asked for")
            return
        if not self._transaction.is_waiting and self._attempt(lambda: self._is_done(swap)):
            self._transaction = self._transaction.complete()
        if self._transaction.reason is None and time.monotonic() > swap.deadline_s:
            self._fail(AbortReason.DEADLINE, self._lateness(swap))

    def _attempt(self, work: Callable[[], Any]) -> Any:
        """Do a part of a swap whose failure serving survives; None where it failed."""
        try:
            return work()
        except WrongChecksum as error:
            self._fail(AbortReason.CHECKSUM, str(error))
        except (MemoryError, torch.OutOfMemoryError) as error:
            self._fail(AbortReason.MEMORY, str(error))
        except Exception as error:  # noqa: BLE001  (tables_of is serving code's, and may raise any)
            reason = AbortReason.TRANSFER
            if self._transaction.stage is Stage.AGREEING:
                disagree = isinstance(error, MigrationFailed)
                reason = AbortReason.PLANS if disagree else AbortReason.PREPARING
            known = isinstance(error, (EplbError, RuntimeError, OSError))
            self._fail(reason, str(error) if known else f"{type(error).__name__}: {error}")
        return None

    def _is_done(self, swap: Swap) -> bool:
        """Return whether this process has completed its stage."""
        if self._transaction.stage is not Stage.AGREEING:
            return self._work.poll()
        # What an earlier swap left under way has to end before peers may write here again.
        if not swap.prepared.done() or not self._work.is_drained:
            return False
        epoch = self._transaction.epoch
        if not swap.is_published:
            self._board.publish(
                epoch,
                Proposal(
                    old_digest=self._in_force.digest,
                    new_digest=swap.prepared.result().digest,
                    layout_digest=self._layout_digest,
                    spare_rows=self.spare_rows,
                ),
            )
            swap.is_published = True
        return self._board.check(epoch)

    def _lateness(self, swap: Swap) -> str:
        stage = self._transaction.stage
        what = f"after {time.monotonic() - swap.begun_s:.1f} s it was at {stage.value}"
        if stage is Stage.AGREEING and swap.is_published:
            absent = self._board.absent(self._transaction.epoch)
            if absent:
                what += f"; no begin_swap from process {', '.join(map(str, absent))}"
        elif not self._transaction.is_waiting:
            what += ", itself not done"
        return f"{what} (deadline_s {self.deadline_s:g})"

    def _put_in_force(self, in_force: InForce, fallback: InForce | None) -> None:
        """Note what serves from now on and what this process can still go back to.

        The liveness is told first: it raises where processes are lost, and then nothing changes.
        """
        if self.liveness is not None:
            self.liveness.report(in_force.digest, None if fallback is None else fallback.digest)
        self._in_force, self._fallback = in_force, fallback

    def _fail(self, reason: AbortReason, why: str) -> None:
        """Want to roll back, and tell the others why."""
        assert self._swap is not None
        self._swap.why = why
        self._transaction = self._transaction.abort(reason)
        self._board.explain(self._transaction.epoch, why)

    def _roll_back(self, swap: Swap, abort: Abort) -> SwapResult | None:
        """Put back the old placement of the batch, and begin to return what had changed before."""
        if self._fallback is not None:
            self._put_in_force(self._fallback, None)
        self._work.roll_back(self._tables)
        self._swap = None
        why = swap.why
        if abort.process != self.group.process:
            why = self._board.explanation(abort.epoch, abort.process)
        cause = f"{abort.reason.text} (process {abort.process}{f': {why}' if why else ''})"
        if swap.is_returning:
            error = MigrationFailed(
                f"{self._returning_from}, and the way back was rolled back as well: {cause}; "
                f"{len(self._in_force.layers)} layers are of the new plan: begin_swap with the "
                "old plan, or the new, completes it"
            )
        else:
            error = MigrationFailed(f"swap rolled back: {cause}; the old placement serves on")
        self._error = str(error)
        if self._in_force.is_mixed and not swap.is_returning:
            self._begin(self._in_force.old, is_returning=True)
            self._returning_from = error
            return None
        return self._ended(swap, error)

    def _finish(self, swap: Swap, prepared: Prepared) -> SwapResult:
        """All layers are in force everywhere."""
        self._settle(prepared, len(prepared.batches) - 1)
        self._in_force = InForce.of(swap.plan, prepared.digest)
        self._swap = None
        if swap.is_returning and self._returning_from is not None:
            return self._ended(swap, self._returning_from)
        self._error = None
        error = None
        if self._plan_file is not None:
            try:
                self._plan_file.put_in_force()
            except InvalidInput as failure:
                error = MigrationFailed(f"the plan is in force and was not written: {failure}")
                self._error = str(error)
        return self._ended(swap, error)

    def _ended(self, swap: Swap, error: MigrationFailed | None) -> SwapResult:
        if self._plan_file is not None:
            # There is one where the plan did not come in force.
            self._pool.submit(self._plan_file.discard)
        return SwapResult(error=error, seconds=time.monotonic() - swap.begun_s)

    def _check_attached(self) -> None:
        if self._equipment is None:
            raise InvalidInput("this manager has no layers yet; attach(model, plan) first")

    def _find_row(self, epoch: int, layer: int, slot: int) -> torch.Tensor | None:
        """Return a row that a peer wants to fetch, as long as this process is in the same swap.

        The peer may be a step ahead: what it asks for has been in force since before all agreed to
        move it, and stays until the peer has it.
        """
        if epoch != self._transaction.epoch or self._transaction.stage is Stage.IDLE:
            return None
        if not (0 <= layer < len(self.layers) and 0 <= slot < self._slots_per_process):
            return None
        return self.layers[layer].slots.rows[slot]

    def _note_progress(self) -> None:
        seen = self._work.done_bytes, self._transaction
        if seen != self._progress:
            self._progress, self._progress_s = seen, time.monotonic()
