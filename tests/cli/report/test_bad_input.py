"""What cannot be reported: one line with the remedy, and no file."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eplb
from eplb.cli.report.replay_section import replay_log
from eplb.errors import InvalidInput


def refused(result, tmp_path, *parts, code=2):
    assert result.code == code
    assert result.out == ""
    assert result.err.startswith("eplb: error: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err
    assert not (tmp_path / "report.html").exists()


def test_a_profile_of_another_model(run, planned, tmp_path):
    np.savez("other.npz", counts=np.ones((3, 3, 32)))
    result = run("report", "plan.yaml", "other.npz", "-o", "report.html")
    refused(result, tmp_path, "32 experts", "16", "profile of the plan's model")
    np.savez("layers.npz", counts=np.ones((2, 4, 16)))
    result = run("report", "plan.yaml", "layers.npz", "-o", "report.html")
    refused(result, tmp_path, "layer 0", "not in the plan", code=6)


def test_a_profile_that_names_another_model(run, planned, tmp_path):
    plan = eplb.read_plan("plan.yaml")
    model = dataclasses.replace(plan.model, name="deepseek-v3")
    eplb.write_plan(dataclasses.replace(plan, model=model), "named.yaml")
    counts = eplb.read_profile(planned / "day.npz").counts_WLE
    np.savez("k2.npz", counts=counts, layer_ids=[1, 2], metadata=json.dumps({"model": "kimi-k2"}))
    result = run("report", "named.yaml", "k2.npz", "-o", "report.html")
    refused(result, tmp_path, "kimi-k2", "deepseek-v3", "profile of the plan's model")


def test_a_plan_without_quality_figures(run, planned, tmp_path):
    plan = dataclasses.replace(eplb.read_plan("plan.yaml"), quality=None)
    eplb.write_plan(plan, "bare.yaml")
    words = ("report", "bare.yaml", planned / "day.npz", "-o", "report.html")
    refused(run(*words), tmp_path, "bare.yaml", "no quality figures", "--without-quality")
    assert run(*words, "--without-quality").code == 0
    assert (tmp_path / "report.html").exists()


def test_no_windows(run, planned, tmp_path):
    words = ("report", "plan.yaml", planned / "day.npz", "-o", "report.html")
    refused(run(*words, "--windows", "9:12"), tmp_path, "9:12", "choose within 0:6")
    refused(run(*words, "--phase", "decode"), tmp_path, "no decode windows")
    np.savez("zero.npz", counts=np.zeros((3, 3, 16)))
    refused(run("report", "plan.yaml", "zero.npz", "-o", "report.html"), tmp_path, "all counts are")


def test_an_unwritable_output(run, planned, tmp_path):
    for words in (
        ("report", "plan.yaml", planned / "day.npz", "-o"),
        ("profile", "show", planned / "day.npz", "--html"),
    ):
        refused(run(*words, "nowhere/r.html"), tmp_path, "nowhere", "does not exist", "create it")
        refused(run(*words, "."), tmp_path, "not a regular file")


def test_an_unwritable_report_stops_before_the_plan(run, loads, small, tmp_path):
    words = ("plan", loads / "day.npz", *small, "-o", "p.yaml", "--report", "nowhere/r.html")
    refused(run(*words), tmp_path, "nowhere")
    assert not (tmp_path / "p.yaml").exists()


def test_a_page_that_was_there_survives_an_error(run, planned, tmp_path):
    (tmp_path / "report.html").write_text("old")
    assert run("report", "plan.yaml", "missing.npz", "-o", "report.html").code == 2
    assert (tmp_path / "report.html").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".report")] == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"curve": [1]}', '{"curve": [{"moves": "x"}]}',
                                  '{"curve": [{"moves": 1, "imbalance": NaN}]}'])  # fmt: skip
def test_json_of_another_command(run, planned, tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    words = ("report", "plan.yaml", planned / "day.npz", "-o", "report.html")
    refused(run(*words, "--replay", "x.json"), tmp_path, "x.json")
    refused(run(*words, "--previous", "plan.yaml", "--replan", "x.json"), tmp_path, "x.json")


def test_a_curve_without_the_plan_it_starts_from(run, planned, tmp_path):
    words = ("report", "plan.yaml", planned / "day.npz", "-o", "report.html")
    refused(run(*words, "--replan", "x.json"), tmp_path, "--previous")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {
            "policy": json_values,
            "imbalance": json_values,
            "replans": st.lists(
                st.fixed_dictionaries({"step": json_values, "moved_experts": json_values}),
                max_size=3,
            ),
        }
    )
    | json_values
)
def test_any_json_is_a_log_or_refused(document):
    try:
        log = replay_log(document, "x.json")
    except InvalidInput as error:
        assert "x.json" in str(error)  # noqa: PT017
        return
    assert np.isfinite(log.imbalance_W).all()
    assert all(moved >= 0 for _, moved in log.replans)
