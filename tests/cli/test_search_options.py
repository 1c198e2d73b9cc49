"""Options of ``eplb plan`` that ask for more than greedy."""

import json

import numpy as np
import pytest

import eplb

QUICK = ("--solver", "search", "--sweeps", 5)


@pytest.fixture
def plan(run, loads, small):
    """Run ``eplb plan`` on the first recording; return its JSON document."""

    def call(*options, profiles=("day.npz",)):
        files = [loads / name for name in profiles]
        result = run("plan", *files, *small, *options, "-o", "plan.yaml", "--json")
        assert (result.code, result.err) == (0, "")
        return json.loads(result.out)

    return call


@pytest.mark.parametrize("split", ["even", "nearest", "weighted", "batch"])
@pytest.mark.parametrize("objective", ["mean", "worst", "cvar"])
def test_objectives_and_rules(run, plan, loads, split, objective):
    report = plan(*QUICK, "--split", split, "--objective", objective)
    quality, balance = report["quality"], report["balance"]
    if objective != "mean":
        assert quality["objective"] == balance[f"imbalance_{objective}"]
        assert 1 - 1e-12 <= quality["bound"] <= quality["objective"]
        assert quality["gap"] == pytest.approx(quality["objective"] / quality["bound"] - 1)
    read = eplb.read_plan("plan.yaml")
    assert (read.split, read.statistic) == (split, objective)
    assert (read.placement.split_weights_LS is not None) == (split == "weighted")
    scored = json.loads(run("evaluate", "plan.yaml", loads / "day.npz", "--json").out)
    assert scored["split"] == split
    assert scored["imbalance_mean"] == pytest.approx(quality["imbalance_mean"], rel=1e-12)
    assert scored["imbalance_worst"] == pytest.approx(quality["imbalance_worst"], rel=1e-12)


def test_evaluate_under_another_rule(run, plan, loads):
    plan(*QUICK, "--split", "weighted")

    def imbalance(split):
        words = ("evaluate", "plan.yaml", loads / "day.npz", "--split", split, "--json")
        return json.loads(run(*words).out)["imbalance_mean"]

    # A batch is split at its best, and fixed fractions are one of the splits.
    assert imbalance("batch") <= imbalance("weighted") <= imbalance("even")


def test_evaluate_needs_fractions_for_weighted(run, plan, loads):
    plan("--split", "even")
    result = run("evaluate", "plan.yaml", loads / "day.npz", "--split", "weighted")
    assert result.code == 2
    assert "plan with --split weighted" in result.err
    assert result.err.count("\n") == 1


def test_holdout_scores_what_was_not_fitted(run, plan, loads, small):
    report = plan("--holdout", "34%", profiles=("day.npz", "night.npz"))
    # A third of six windows of each.
    assert report["holdout"]["windows"] == 4
    assert eplb.read_plan("plan.yaml").provenance["profile_windows"] == 8
    words = (loads / "day.npz", loads / "night.npz", "--windows", "4:", "--json")
    scored = json.loads(run("evaluate", "plan.yaml", *words).out)
    assert report["holdout"]["imbalance_mean"] == pytest.approx(scored["imbalance_mean"])
    shown = run("plan", loads / "day.npz", *small, "--holdout", 0.1, "-o", "plan.yaml").out
    assert "on 1 window it was not fitted to" in shown


def test_holdout_needs_a_window_to_fit(run, loads, small):
    one = (loads / "day.npz", "--windows", ":1")
    result = run("plan", *one, *small, "--holdout", "50%", "-o", "plan.yaml")
    assert result.code == 2
    assert "leaves nothing to fit" in result.err


def test_phase_chooses_windows(run, loads, small, plan):
    counts = np.load(loads / "day.npz")["counts"]
    phase = ["prefill", "decode"] * 3
    np.savez(loads / "both.npz", counts=counts, phase=phase)
    plan("--phase", "decode", profiles=("both.npz",))
    both = eplb.read_plan("plan.yaml")
    np.savez(loads / "decode.npz", counts=counts[1::2], phase=phase[1::2])
    plan(profiles=("decode.npz",))
    assert both.placement == eplb.read_plan("plan.yaml").placement
    result = run("plan", loads / "day.npz", *small, "--phase", "prefill", "-o", "plan.yaml")
    assert result.code == 2
    assert "has no prefill windows (it has mixed)" in result.err


def test_a_plan_is_never_worse_than_the_previous_one(run, plan, loads, small):
    first = plan("--solver", "search", "--sweeps", 50)
    run("plan", loads / "day.npz", *small, *QUICK, "--previous", "plan.yaml", "-o", "next.yaml")
    again = eplb.read_plan("next.yaml").quality
    assert again.imbalance_mean <= first["quality"]["imbalance_mean"]


@pytest.mark.parametrize("split", ["even", "batch"])
def test_seed_and_sweeps_give_the_same_bytes(tmp_path, plan, split):
    texts = []
    for _ in range(2):
        plan(*QUICK, "--seed", 5, "--split", split)
        texts.append((tmp_path / "plan.yaml").read_bytes())
    assert texts[0] == texts[1]


def test_notes_say_what_was_fitted(run, plan, loads, small):
    notes = plan(*QUICK, profiles=("day.npz", "night.npz"))["notes"]
    assert notes == {"windows_recorded": 12, "windows_kept": 12, "windows_added": 2, "sweeps": 5}
    assert plan(*QUICK, "--recorded-only")["notes"]["windows_added"] == 0
    provenance = eplb.read_plan("plan.yaml").provenance
    assert provenance["windows_added"] == 0
    both = (loads / "day.npz", loads / "night.npz")
    shown = run("plan", *both, *small, *QUICK, "-o", "plan.yaml").out
    assert "Fitted to 12 of 12 recorded windows and 2 that are likely to come." in shown


def test_out_of_time_there_is_a_plan(plan):
    report = plan("--solver", "search", "--time-limit", "0")
    assert report["stop_reason"] == "time_limit"
    assert eplb.read_plan("plan.yaml").placement.num_layers == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--time-limit", "nan"), "'nan' is not a number of seconds"),
        (("--time-limit", "inf"), "'inf' is not a number of seconds"),
        (("--time-limit", "-1"), "'-1' is not a number of seconds"),
        (("--time-limit", "soon"), "'soon' is not a number of seconds"),
        (("--holdout", "1.5"), "is not a part between 0 and 1"),
        (("--holdout", "nan%"), "is not a part between 0 and 1"),
        (("--sweeps", "0"), "0 is not in the range"),
        (("--objective", "wurst"), "did you mean 'worst'"),
        (("--solver", "serch"), "did you mean 'search'"),
        (("--phase", "decoding"), "did you mean 'decode'"),
        (("--solver", "exact", "--objective", "worst"), "use --solver search"),
        (("--solver", "exact", "--sweeps", "9"), "--solver exact makes no sweeps"),
        (("--sweeps", "9"), "--solver greedy makes no sweeps"),
        ((*QUICK, "--time-limit", "1"), "are two budgets; give one"),
        (("--previous", "plan.yaml"), "--previous says nothing to it"),
        ((*QUICK, "--previous", "none.yaml"), "none.yaml does not exist"),
    ],
)
def test_refused(run, loads, small, tmp_path, options, message):
    result = run("plan", loads / "day.npz", *small, *options, "-o", "out.yaml")
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out.yaml").exists()
