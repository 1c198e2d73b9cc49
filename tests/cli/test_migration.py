"""diff, replan and replay on the command line."""

import json
from pathlib import Path

from eplb.plan_file import read_plan


def planned(run, loads, small, name, output):
    assert run("plan", loads / f"{name}.npz", *small, "-o", output).code == 0


def test_diff_of_a_plan_with_itself_is_empty(run, loads, small):
    planned(run, loads, small, "day", "a.yaml")
    report = json.loads(run("diff", "a.yaml", "a.yaml", "--json").out)
    assert (report["moved_experts"], report["rounds"]) == (0, 0)


def test_diff_prices_moves_by_layer_and_link(run, loads, small):
    planned(run, loads, small, "day", "a.yaml")
    planned(run, loads, small, "night", "b.yaml")
    words = ("diff", "a.yaml", "b.yaml", "--topology", "h800", "--expert-bytes", 1000)
    report = json.loads(run(*words, "--json").out)
    moved = report["moved_experts"]
    assert moved > 0
    assert report["moved_bytes"] == 1000 * moved
    assert report["rounds"] == report["min_rounds"]
    assert report["seconds"] > 0
    for part in ("by_layer", "by_link"):
        assert sum(x["moved_experts"] for x in report[part].values()) == moved
    assert run(*words).code == 0
    refused = run(*words, "--spare-slots", 0)
    assert refused.code == 7
    assert "give" in refused.err


def test_replan_keeps_the_limit(run, loads, small):
    planned(run, loads, small, "day", "a.yaml")
    words = ("replan", "a.yaml", loads / "night.npz", "--max-moves", 2, "-o", "b.yaml")
    report = json.loads(run(*words, "--json").out)
    assert report["moved_experts"] <= 2
    diff = json.loads(run("diff", "a.yaml", "b.yaml", "--json").out)
    assert diff["moved_experts"] == report["moved_experts"]
    assert run("replan", "a.yaml", loads / "night.npz", "--max-moves", "x%").code == 2


def test_replan_weighs_moves_against_their_transfer(run, loads, small):
    planned(run, loads, small, "day", "a.yaml")
    words = ("replan", "a.yaml", loads / "night.npz", "--max-moves", "50%", "--topology", "h800")
    charge = ("--step-ms", 10, "--expert-bytes", 10**6)
    worth = json.loads(run(*words, *charge, "--horizon", 10000, "--json").out)
    assert worth["decision"] == "move"
    assert worth["gain_seconds"] > worth["transfer_seconds"] > 0
    assert worth["forecast_after"] < worth["forecast_before"]
    kept = json.loads(run(*words, "--step-ms", 1e-6, "--expert-bytes", 10**9, "--horizon", 1,
                          "--json").out)  # fmt: skip
    assert (kept["decision"], kept["moved_experts"]) == ("keep", 0)
    assert "gain" in kept["reason"]
    text = run(*words, "--step-ms", 1e-6, "--expert-bytes", 10**9, "--horizon", 1).out
    assert "Keep the plan, because" in text
    assert "replan: " in run(*words, *charge, "--horizon", 10000).out
    for wrong, word in (
        ((*words, "--step-ms", 1), "--horizon"),
        ((*words, "--step-ms", 1, "--horizon", 9), "--expert-bytes"),
        ((*words[:-2], *charge, "--horizon", 9), "--topology"),
    ):
        refused = run(*wrong)
        assert refused.code == 2
        assert word in refused.err


def test_a_plan_that_was_replanned_says_so(run, loads, small):
    planned(run, loads, small, "day", "a.yaml")
    assert run("replan", "a.yaml", loads / "night.npz", "--max-moves", 3, "-o", "b.yaml").code == 0
    before, after = (read_plan(name) for name in ("a.yaml", "b.yaml"))
    assert after.provenance["solver"] == "replan"
    assert after.provenance["previous"] == before.digest()
    assert after.quality is not None
    balance = json.loads(run("evaluate", "b.yaml", loads / "night.npz", "--json").out)
    assert after.quality.imbalance_mean == balance["imbalance_mean"]


def test_plan_from_a_previous_one_keeps_the_limit(run, loads, small):
    planned(run, loads, small, "day", "a.yaml")
    words = ("plan", loads / "night.npz", *small, "--solver", "search", "-o", "b.yaml")
    assert run(*words, "--previous", "a.yaml", "--max-moves", 3).code == 0
    diff = json.loads(run("diff", "a.yaml", "b.yaml", "--json").out)
    assert 0 < diff["moved_experts"] <= 3
    for wrong in (("--max-moves", 3), ("--previous", "a.yaml", "--max-moves", "x"),
                  ("--previous", "a.yaml", "--max-moves", 3, "--sweeps", 5)):  # fmt: skip
        assert run(*words, *wrong).code == 2


def test_replay_charges_moves_and_draws(run, loads, small):
    words = ("replay", loads / "day.npz", "--every", 2, *small, "--policy", "resolve")
    charge = ("--topology", "h800", "--step-ms", 1, "--expert-bytes", 10**6)
    report = json.loads(run(*words, *charge, "--plot", "a.svg", "--json").out)
    assert report["transfer_seconds"] > 0
    assert report["imbalance_charged"] > report["imbalance_mean"]
    assert report["moved_bytes"] == 10**6 * report["moved_experts"]
    assert Path("a.svg").read_bytes().startswith(b"<?xml")
    assert run(*words, *charge).code == 0
    for wrong, word in (
        (("--plot", "a.bmp"), "png"),
        (("--plans", loads / "day.npz"), "--plans"),
        (("--step-ms", 1), "--expert-bytes"),
    ):
        refused = run(*words, *wrong)
        assert refused.code == 2
        assert word in refused.err


def test_replay_writes_the_plans_in_force(run, loads, small):
    words = ("replay", loads / "day.npz", "--every", 2, *small, "--policy", "resolve")
    report = json.loads(run(*words, "--plans", "plans", "--json").out)
    assert [x["step"] for x in report["replans"]] == [2, 4]
    assert sum(x["moved_experts"] for x in report["replans"]) == report["moved_experts"]
    assert len(report["imbalance"]) == 4
    assert run("evaluate", "plans/step-000004.yaml", loads / "day.npz").code == 0
    refused = run(*words, "--warmup", 6)
    assert refused.code == 2
    assert "--warmup" in refused.err


def test_replay_takes_the_cluster_from_a_file(run, loads, small):
    counts, speeds = "num_nodes: 2, ranks_per_node: 2", "intra_node_bytes_per_s: 1.0e+9"
    Path("cluster.yaml").write_text(f"{{{counts}, {speeds}, inter_node_bytes_per_s: 1.0e+8}}")
    words = ("replay", loads / "day.npz", "--every", 2, "--policy", "resolve")
    charge = ("--step-ms", 1, "--expert-bytes", 10**6, "--topology", "cluster.yaml")
    slots = small[small.index("--slots-per-rank") + 1]
    report = json.loads(run(*words, *charge, "--slots-per-rank", slots, "--json").out)
    assert report["transfer_seconds"] > 0
    refused = run(*words, "--slots-per-rank", slots)
    assert refused.code == 2
    assert "--nodes is missing" in refused.err
