"""What the commands do, as users and programs call them."""

import json

import numpy as np
import pytest
import yaml

import eplb

FIGURES = {
    "imbalance_mean",
    "imbalance_p95",
    "imbalance_worst",
    "imbalance_worst_layer",
    "imbalance_cvar",
    "balancedness",
    "max_receive_rows_mean",
    "max_receive_rows_worst",
}


def test_demo_plans_the_sample(run, tmp_path):
    result = run("demo")
    assert (result.code, result.err) == (0, "")
    assert "EP32x9" in result.out
    assert "not fitted to" in result.out
    assert eplb.read_plan(tmp_path / "demo-plan.yaml").topology.num_ranks == 32


def test_demo_as_json_says_the_plan_helps_on_unseen_windows(run):
    report = json.loads(run("demo", "--json").out)
    unseen = report["unseen"]
    assert unseen["after"]["imbalance_mean"] < unseen["before"]["imbalance_mean"]


def test_plan_writes_a_plan_and_reports_it(run, loads, small, tmp_path):
    result = run("plan", loads / "day.npz", *small, "-o", "plan.yaml", "--json")
    report = json.loads(result.out)
    assert result.err == ""
    assert report["path"] == "plan.yaml"
    assert report["status"] in {"optimal", "feasible"}
    assert report["time_s"] >= 0
    quality = report["quality"]
    assert set(quality) == {"imbalance_mean", "imbalance_worst", "bound_mean", "gap_mean"}
    assert 1 <= quality["bound_mean"] <= quality["imbalance_mean"] <= quality["imbalance_worst"]

    document = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert list(document["layers"]) == [1, 2]
    assert all(len(slots) == 20 for slots in document["layers"].values())
    assert document["quality"] == quality
    assert document["digest"] == report["digest"]
    for slots in document["layers"].values():
        for rank in np.reshape(slots, (4, 5)):
            assert len(set(rank.tolist())) == 5


def test_evaluate_scores_without_fitting(run, loads, small):
    run("plan", loads / "day.npz", *small, "-o", "plan.yaml")
    report = json.loads(run("evaluate", "plan.yaml", loads / "night.npz", "--json").out)
    assert set(report) >= FIGURES
    assert set(report["by_layer"]) == {"1", "2"}
    assert set(report["by_scenario"]) == {"default"}
    assert all(set(layer) == FIGURES for layer in report["by_layer"].values())
    plan = eplb.read_plan("plan.yaml")
    profile = eplb.read_profile(loads / "night.npz")
    score = eplb.evaluate(profile, plan.placement, plan.topology, "even")
    assert report["imbalance_mean"] == score.imbalance_mean


def test_evaluating_the_fitted_profile_gives_the_plans_quality(run, loads, small):
    fitted = json.loads(run("plan", loads / "day.npz", *small, "-o", "p.yaml", "--json").out)
    scored = json.loads(run("evaluate", "p.yaml", loads / "day.npz", "--json").out)
    for figure in ("imbalance_mean", "imbalance_worst"):
        assert scored[figure] == fitted["quality"][figure]


def test_several_profiles_are_scenarios(run, loads, small):
    both = (loads / "day.npz", loads / "night.npz")
    run("plan", *both, *small, "-o", "plan.yaml")
    report = json.loads(run("evaluate", "plan.yaml", *both, "--json").out)
    assert set(report["by_scenario"]) == {"day.npz", "night.npz"}
    text = run("evaluate", "plan.yaml", *both).out
    assert "day.npz" in text
    assert "balancedness" in text


def test_windows_are_cut_from_each_profile(run, loads, small):
    def imbalance(windows):
        report = run("evaluate", "p.yaml", loads / "day.npz", "--windows", windows, "--json")
        return json.loads(report.out)["imbalance_mean"]

    run("plan", loads / "day.npz", *small, "-o", "p.yaml", "--windows", ":4")
    assert imbalance(":4") == eplb.read_plan("p.yaml").quality.imbalance_mean
    assert 4 * imbalance(":4") + 2 * imbalance("4:") == pytest.approx(6 * imbalance("0:6"))


@pytest.mark.parametrize("split", ["even", "nearest"])
def test_split_rules(run, loads, small, split):
    run("plan", loads / "day.npz", *small, "--split", split, "-o", "plan.yaml")
    assert eplb.read_plan("plan.yaml").split == split
    report = json.loads(run("evaluate", "plan.yaml", loads / "day.npz", "--json").out)
    assert report["split"] == split
    other = "nearest" if split == "even" else "even"
    changed = run("evaluate", "plan.yaml", loads / "day.npz", "--split", other, "--json")
    assert json.loads(changed.out)["imbalance_mean"] != report["imbalance_mean"]


def test_hierarchical_keeps_groups_in_nodes(run, loads, small):
    result = run(
        "plan", loads / "day.npz", *small, "--hierarchical", "--groups", 4, "-o", "plan.yaml"
    )
    assert result.code == 0
    for slots in eplb.read_plan("plan.yaml").placement.phys_to_log_LS:
        first, second = (set((node // 4).tolist()) for node in slots.reshape(2, 10))
        assert not first & second


def test_model_preset_names_and_sizes_the_plan(run, shared_data):
    profile = f"{shared_data}/deepseek_v3_sglang/logical_count.npz:prefill_in1024"
    topology = ("--topology", "h800", "--nodes", 4, "--slots-per-rank", 9)
    result = run("plan", profile, *topology, "--model", "deepseek-v3", "-o", "plan.yaml")
    assert "redundancy costs 2.55 GB a rank" in result.out
    plan = eplb.read_plan("plan.yaml")
    assert plan.model.expert_bytes == 44040192
    assert plan.topology.ranks_per_node == 8
    assert plan.topology.inter_node_bytes_per_s == 50e9


def test_routings_add_the_tokens_received(run):
    run("demo")
    routings = np.random.default_rng(0).integers(0, 256, (50, 8, 8))
    np.save("routings.npy", routings)
    np.savez("loads.npz", counts=np.ones((8, 256)))
    words = ("evaluate", "demo-plan.yaml", "loads.npz", "--routings", "routings.npy")
    tokens = json.loads(run(*words, "--json").out)["receive_tokens"]
    assert tokens["tokens"] == 50
    assert 1 <= tokens["ranks_per_token_mean"] <= 8
    assert "ranks a token is sent to" in run(*words).out


def test_profile_show(run, loads):
    text = run("profile", "show", loads / "day.npz", loads / "night.npz").out
    assert "12 windows" in text
    assert "drift between scenarios" in text
    report = json.loads(run("profile", "show", loads / "day.npz", "--json").out)
    assert report["num_windows"] == 6
    assert set(report["layers"]) == {"1", "2"}


@pytest.mark.parametrize("suffix", ["npz", "csv", "json", "npy"])
def test_profile_convert_keeps_the_loads(run, loads, suffix):
    result = run("profile", "convert", loads / "day.npz", "-o", f"out.{suffix}")
    assert result.code == 0
    before, after = eplb.read_profile(loads / "day.npz"), eplb.read_profile(f"out.{suffix}")
    assert np.array_equal(before.counts_WLE, after.counts_WLE)
    assert before.layer_ids == after.layer_ids


def test_profile_convert_says_what_a_format_cannot_hold(run, loads):
    result = run(
        "profile", "convert", loads / "day.npz", "-o", "out.npy", "--scenario", "noon",
        "--phase", "decode",
    )  # fmt: skip
    assert "cannot hold scenario, phase; use .npz" in result.err
    run("profile", "convert", loads / "day.npz", "-o", "out.npz", "--phase", "decode")
    assert set(eplb.read_profile("out.npz").phase_W) == {"decode"}


def test_versions(run):
    assert json.loads(run("versions", "--json").out)["eplb-toolkit"] == eplb.__version__
    text = run("versions").out
    assert all(f"{name} " in text for name in ("numpy", "scipy", "numba", "ortools", "torch"))


def test_every_command_has_help(run):
    for command in ("demo", "plan", "evaluate", "profile", "versions"):
        assert command in run("--help").out
        assert run(command, "--help").out.startswith(f"Usage: eplb {command}")


def test_examples_in_help_stand_on_a_line_of_their_own(run):
    for command in (["plan"], ["evaluate"], ["profile", "show"], ["profile", "convert"]):
        text = run(*command, "--help").out
        assert "\\b" not in text
        assert f"\n  eplb {' '.join(command)} " in text
