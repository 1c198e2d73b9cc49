"""A process killed at every stage of a swap: what the others agree on, and how they go on."""

from __future__ import annotations

import json
import signal

import pytest

pytest.importorskip("torch")

from swap_ranks import death, restarted, run_apart, swap_plan

from eplb.plan_file import write_plan
from eplb.runtime.swap import Stage

NODES = {"num_ranks": 8, "ranks_per_node": 4}
# Stage and batch, who dies of how many, group; the one that serves the store among them.
CASES = {
    "agreeing": (Stage.AGREEING, 0, 0, 3, {}),
    "moving": (Stage.MOVING, 0, 2, 3, {}),
    "checking": (Stage.CHECKING, 1, 0, 3, {}),
    "switched": (Stage.SWITCHED, 2, 1, 3, {}),
    "switched on one": ("apart", 0, 0, 3, {}),
    "switching": (Stage.SWITCHING, 0, 1, 3, {}),
    "a part further on one": ("apart, switching", 0, 0, 3, {}),
    "virtual ranks, nodes": (Stage.MOVING, 0, 3, 4, NODES),
}


@pytest.mark.parametrize("case", CASES)
def test_survivors_agree_stop_and_go_on_from_the_repaired_plan(case, tmp_path):
    stage, batch, victim, num_processes, options = CASES[case]
    codes = run_apart(death, num_processes, tmp_path, stage, batch, victim, options)
    assert codes == [-signal.SIGKILL if p == victim else 0 for p in range(num_processes)]
    told = [
        json.loads((tmp_path / f"loss{p}").read_text()) for p in range(num_processes) if p != victim
    ]
    assert all(one["dead"] == [victim] for one in told)
    assert len({(one["digest"], one["plan"]) for one in told}) == 1
    old = swap_plan(0, options.get("num_ranks", 3), 8, ranks_per_node=options.get("ranks_per_node"))
    if stage in {Stage.AGREEING, Stage.MOVING, "apart", "apart, switching"}:
        assert told[0]["digest"] == old.digest()
    else:
        assert told[0]["digest"] != old.digest()


def test_processes_restarted_in_the_middle_of_a_swap_begin_from_the_old_plan(tmp_path):
    write_plan(swap_plan(0, 2, 5), tmp_path / "plan.yaml")
    assert run_apart(restarted, 2, tmp_path, True) == [-signal.SIGKILL] * 2
    (tmp_path / "store").unlink(missing_ok=True)
    (tmp_path / "calls").unlink(missing_ok=True)
    assert run_apart(restarted, 2, tmp_path, False) == [0, 0]
