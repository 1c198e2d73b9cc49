"""``eplb export`` and ``eplb import``, and reading what engines record."""

import json

import numpy as np
import pytest
from strategies import plan_of

from eplb.cli.engine_options import ENGINE_NAMES
from eplb.engines.convert import ENGINES
from eplb.placement.greedy import place_greedy
from eplb.plan_file import read_plan, write_plan
from eplb.profiles import read_profile
from eplb.slots import Placement
from eplb.topology import Topology


@pytest.fixture
def plan(run, loads):
    """Return a plan of those loads in the current folder: 16 experts on 4 ranks of 5 slots."""
    load_LE = read_profile(loads / "day.npz").mean_load_LE().astype(np.float32)
    rows_LS, _ = place_greedy(load_LE, num_slots=20, num_ranks=4, distinct_ranks=True)
    placement = Placement(phys_to_log_LS=rows_LS, layer_ids=(1, 2), num_experts=16)
    topology = Topology(num_nodes=2, ranks_per_node=2, slots_per_rank=5)
    write_plan(plan_of(placement, topology), "plan.yaml")
    return "plan.yaml"


def test_the_names_are_those_of_the_registry():
    assert tuple(ENGINES) == ENGINE_NAMES


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_out_and_in(run, plan, engine):
    file = f"file{ENGINES[engine].suffixes[0]}"
    out = run("export", plan, "--to", engine, "-o", file, "--json")
    assert (out.code, out.err) == (0, "")
    report = json.loads(out.out)
    assert set(report) == {"path", "engine", "release", "digest", "remarks", "launch"}
    assert any(file in line for line in report["launch"])
    back = run("import", file, "--from", engine, "--nodes", 2, "--ranks-per-node", 2, "-o",
               "back.yaml", "--json")  # fmt: skip
    assert back.code == 0
    assert json.loads(back.out)["digest"] == read_plan("back.yaml").digest()
    rows, found = (
        read_plan(name).placement.phys_to_log_LS[-2:].reshape(2, 4, -1)
        for name in (plan, "back.yaml")
    )
    if engine == "omni":
        rows, found = np.sort(rows), np.sort(found)
    assert np.array_equal(rows, found)


def test_what_a_person_reads(run, plan):
    out = run("export", plan, "--to", "sglang", "-o", "map.pt").out
    assert "Written for sglang (0.5.23), and read back: map.pt" in out
    assert "- a map from a file is split by nearness, not 'even'" in out
    assert "--ep-num-redundant-experts 4" in out
    out = run("import", "map.pt", "--from", "sglang", "--nodes", 2, "--ranks-per-node", 2,
              "--moe-layers", "0:3", "-o", "back.yaml").out  # fmt: skip
    assert out == "EP4x5, 3 layers (0-2), 16 experts; written: back.yaml\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "plan.yaml", "--to", "sglng", "-o", "x.pt"], "did you mean 'sglang'"),
        (["export", "plan.yaml", "--to", "sglang", "-o", "x.yaml"], "plans from .pt or .json"),
        (["export", "plan.yaml", "--to", "sglang", "-o", "no/x.pt"], "does not exist; create it"),
        (["export", "none.yaml", "--to", "sglang", "-o", "x.pt"], "none.yaml does not exist"),
        (["export", "plan.yaml", "--to", "sglang", "-o", "x.pt", "--moe-layers", "3"],
         "'3' is no range of layers"),
        (["import", "plan.yaml", "--from", "tensorrt-llm", "--nodes", 1, "--ranks-per-node", 2,
          "-o", "x.yaml"], "looks like a file of this project"),
        (["import", "none.pt", "--from", "sglang", "--nodes", 1, "--ranks-per-node", 2, "-o",
          "x.yaml"], "none.pt does not exist"),
    ],
)  # fmt: skip
def test_one_line_and_exit_code_2(run, plan, tmp_path, words, message):
    result = run(*words)
    assert result.code == 2
    assert result.out == ""
    assert message in result.err
    assert result.err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_recordings_of_engines_are_profiles(run, tmp_path):
    record = {"record_type": "eplb_load_stats", "version": 1, "step": 1,
              "expert_load": [[9, 1, 2, 3]] * 2, "p2l_map": [[0, 1, 2, 0]] * 2}  # fmt: skip
    (tmp_path / "loads.jsonl").write_text(json.dumps(record) + "\n")
    out = run("profile", "convert", "loads.jsonl", "--moe-layers", "3:5", "-o", "x.npz", "--json")
    assert json.loads(out.out)["shape"] == [1, 2, 3]
    assert np.load(tmp_path / "x.npz")["layer_ids"].tolist() == [3, 4]


def test_dumps_of_omni_are_read_through_the_plan_that_was_served(run, plan, tmp_path):
    assert run("export", plan, "--to", "omni", "-o", "pattern.npy").code == 0
    assert run("import", "pattern.npy", "--from", "omni", "--nodes", 2, "--ranks-per-node", 2,
               "-o", "served.yaml").code == 0  # fmt: skip
    rows = read_plan("served.yaml").placement.phys_to_log_LS
    folder = tmp_path / "prefill"
    folder.mkdir()
    text = "".join("\t".join(["1"] * rows.shape[1]) + "\t\n" for _ in rows)
    (folder / "activation_counts_recordstep_0_rank_0.txt").write_text(text)
    out = run("profile", "convert", "prefill", "--placement", "served.yaml", "-o", "x.npz")
    assert out.code == 0
    counts = np.load(tmp_path / "x.npz")["counts"][0]
    assert np.array_equal(counts, [np.bincount(row, minlength=16) for row in rows])
    wrong = run("profile", "convert", "x.npz", "--placement", "served.yaml", "-o", "y.npz")
    assert (wrong.code, "not a folder of Omni" in wrong.err) == (2, True)


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_loads_as_sglang_plans_for_them_at_start(run, loads, suffix):
    assert run("profile", "convert", loads / "day.npz", "-o", f"counts{suffix}").code == 0
    assert run("profile", "convert", f"counts{suffix}", "-o", "back.npz").code == 0
    before, after = read_profile(loads / "day.npz"), read_profile("back.npz")
    assert np.array_equal(after.counts_WLE, before.counts_WLE)
    assert after.layer_ids == before.layer_ids
