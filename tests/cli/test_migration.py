"""diff, replan and replay on the command line."""

import json


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
