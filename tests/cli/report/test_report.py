"""The page of a plan: whole, self-contained, escaped, and with the figures of the evaluator."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

import eplb
from eplb.metrics import rank_load

VOID = {"meta", "link", "br", "input", "img", "hr"}


class Outline(HTMLParser):
    """Ids, links, and whether elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.open, self.addresses, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for name in ("href", "src", "action", "data", "poster", "srcset"):
            if name in attributes:
                self.addresses.append(attributes[name])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline(text):
    parser = Outline()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_well_formed_and_asks_for_nothing(report, loads):
    text, _ = report(loads / "day.npz")
    page = outline(text)
    assert len(page.ids) == len(set(page.ids))
    for address in page.addresses:
        assert address == "data:," or address[1:] in page.ids
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in text


def test_every_picture_has_words_and_a_table(report, loads):
    text, pictures = report(loads / "day.npz", loads / "night.npz")
    assert {"ranks-before", "ranks-after", "layers", "windows", "replicas", "drift"} <= set(
        pictures
    )
    figures = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    assert len(figures) == len(pictures)
    for figure in figures:
        assert re.search(r'role="img" aria-label="[^"]{20,}"', figure)
        assert "<figcaption" in figure
        assert "<details" in figure


def test_the_same_report_gives_the_same_bytes(report, loads):
    assert report(loads / "day.npz")[0] == report(loads / "day.npz")[0]


def test_rank_loads_are_those_of_the_evaluator_on_unseen_windows(report, loads):
    _, pictures = report(loads / "day.npz")
    plan = eplb.read_plan("plan.yaml")
    unseen = eplb.read_profile(loads / "day.npz").windows(4, None)
    load_WLR = rank_load(unseen, plan.placement, plan.topology, "even")
    relative_LR = (load_WLR / load_WLR.mean(axis=2, keepdims=True)).mean(axis=0)
    rows = pictures["ranks-after"]["series"][0]["rows"]
    assert rows == pytest.approx(relative_LR, abs=6e-4)
    scales = [pictures[f"ranks-{which}"]["visualMap"] for which in ("before", "after")]
    assert scales[0] == scales[1]


def test_imbalance_by_layer_is_never_below_its_bound(report, loads):
    _, pictures = report(loads / "day.npz")
    before, after, bound = (line["data"] for line in pictures["layers"]["series"])
    plan = eplb.read_plan("plan.yaml")
    unseen = eplb.read_profile(loads / "day.npz").windows(4, None)
    score = eplb.evaluate(unseen, plan.placement, plan.topology, "even")
    for (layer, value), (_, least) in zip(after, bound, strict=True):
        assert value == pytest.approx(score.by_layer[layer].imbalance_mean, abs=1e-4)
        assert 1 <= least <= value
    assert [layer for layer, _ in before] == [1, 2]


def test_fitted_windows_are_known_by_their_digest(report, run, loads, small):
    text, pictures = report(loads / "day.npz")
    assert "2 windows it was not fitted to" in text
    (band,) = pictures["windows"]["series"][0]["markArea"]["data"]
    assert (band[0]["xAxis"], band[1]["xAxis"]) == (0, 4)
    assert "fitted to none of these windows" in report(loads / "night.npz")[0]
    assert "4 windows it was fitted to" in report(loads / "day.npz", "--windows", ":4")[0]
    both = (loads / "day.npz", loads / "night.npz")
    run("plan", *both, *small, "--holdout", "33%", "-o", "plan.yaml")
    text, pictures = report(*both)
    assert "4 windows it was not fitted to" in text
    assert len(pictures["windows"]["series"][0]["markArea"]["data"]) == 2
    assert "By scenario" in text


def test_previous_plan_adds_moves(report, run, loads, small):
    run("plan", loads / "night.npz", *small, "-o", "old.yaml")
    text, pictures = report(loads / "day.npz", "--previous", "old.yaml")
    moves = json.loads(run("diff", "old.yaml", "plan.yaml", "--json").out)
    counts = pictures["moves-layers"]["series"][0]["data"]
    assert counts == [layer["moved_experts"] for layer in moves["by_layer"].values()]
    assert f"Bringing the plan in moves {moves['moved_experts']} experts" in text
    assert "Before: previous plan" in text


def test_curve_and_replays_are_drawn(report, run, loads, small):
    run("plan", loads / "night.npz", *small, "-o", "old.yaml")
    for name, words in (
        ("curve.json", ("replan", "old.yaml", loads / "day.npz")),
        ("keep.json", ("replay", loads / "day.npz", *small, "--every", 2, "--policy", "keep")),
        ("follow.json", ("replay", loads / "day.npz", *small, "--every", 2)),
    ):
        Path(name).write_text(run(*words, "--json").out)
    _, pictures = report(
        loads / "day.npz", "--previous", "old.yaml", "--replan", "curve.json",
        "--replay", "keep.json", "--replay", "follow.json",
    )  # fmt: skip
    kept = json.loads(Path("keep.json").read_text())
    assert [line["name"] for line in pictures["replay"]["series"]] == ["keep", "follow"]
    drawn = [value for _, value in pictures["replay"]["series"][0]["data"]]
    assert drawn == pytest.approx(kept["imbalance"], abs=1e-4)
    assert pictures["moves"]["series"][-1]["name"] == "replan"


def test_ranks_out_of_service_stay_empty(report, loads, planned):
    plan = eplb.read_plan("plan.yaml")
    topology = dataclasses.replace(plan.topology, slots_per_rank=6, ranks_out_of_service=(3,))
    slots_S = np.concatenate([np.arange(18) % 16, np.full(6, -1)])
    placement = dataclasses.replace(plan.placement, phys_to_log_LS=np.stack([slots_S] * 2))
    changed = dataclasses.replace(plan, topology=topology, placement=placement)
    eplb.write_plan(changed, "plan.yaml")
    text, pictures = report(loads / "day.npz")
    for which in ("ranks-before", "ranks-after"):
        rows = pictures[which]["series"][0]["rows"]
        assert all(row[3] is None and None not in row[:3] for row in rows)
    assert [line["name"] for line in pictures["layers"]["series"]] == [
        "initial placement",
        "this plan",
    ]
    assert "NaN" not in text.split('id="data-pictures"')[0]


def test_routings_add_tokens(report, loads):
    routings = np.random.default_rng(0).integers(0, 16, (50, 2, 4))
    np.save("routings.npy", routings)
    assert "nodes a token is sent to" in report(loads / "day.npz", "--routings", "routings.npy")[0]


def test_one_window_has_no_time(run, loads, small, tmp_path):
    run("plan", loads / "day.npz", *small, "--windows", ":1", "-o", "plan.yaml")
    result = run("report", "plan.yaml", loads / "day.npz", "--windows", ":1", "-o", "one.html",
                 "--json")  # fmt: skip
    done = json.loads(result.out)
    assert "windows" not in done["sections"]
    assert "drift" not in done["sections"]
    assert done["bytes"] == (tmp_path / "one.html").stat().st_size


@pytest.mark.parametrize("split", ["nearest", "weighted", "batch"])
def test_all_split_rules_are_reported(run, loads, small, split):
    assert run("plan", loads / "day.npz", *small, "--split", split, "-o", "plan.yaml").code == 0
    result = run("report", "plan.yaml", loads / "day.npz", "-o", "report.html", "--json")
    assert (result.code, result.err) == (0, "")
    assert "traffic" in json.loads(result.out)["sections"]


def test_what_files_say_is_text_and_nothing_else(report, loads):
    evil = "<script>alert(1)</script>\"'&{{ 7*7 }}"
    counts = eplb.read_profile(loads / "day.npz").counts_WLE
    scenario = [evil, "$after", "</script><img src=x onerror=alert(2)>"] * 2
    np.savez("evil.npz", counts=counts, layer_ids=[1, 2], scenario=scenario)
    text = yaml.safe_load(Path("plan.yaml").read_text())
    text["model"]["name"] = evil
    text["provenance"]["profile"] = evil
    del text["digest"]
    Path("plan.yaml").write_text(yaml.safe_dump(text))
    from eplb.cli.report.make import plan_page
    from eplb.cli.report.page import render

    with pytest.warns(UserWarning, match="no digest"):
        plan = eplb.read_plan("plan.yaml")
    page = render(plan_page(plan, evil, [eplb.read_profile("evil.npz")]))
    found = outline(page)
    assert found.tags.count("script") == 4
    assert "img" not in found.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "onerror=alert(2)>" not in page
    assert "{{ 7*7 }}" in page


def test_profile_show_writes_pictures(run, loads, tmp_path):
    result = run("profile", "show", loads / "day.npz", loads / "night.npz", "--html", "p.html")
    assert (result.code, result.err) == (0, "")
    text = (tmp_path / "p.html").read_text()
    outline(text)
    assert "Scenarios" in text
    assert 'id="picture-experts"' in text
    assert "Report written: p.html" in result.out


def test_replay_writes_pictures(run, loads, small, tmp_path):
    words = ("replay", loads / "day.npz", *small, "--every", 2, "--policy", "keep")
    result = run(*words, "--html", "r.html", "--json")
    assert result.code == 0
    assert json.loads(result.out)["policy"] == "keep"
    outline((tmp_path / "r.html").read_text())
    assert "Report written: s.html" in run(*words, "--html", "s.html").out


def test_plan_and_demo_write_reports(run, loads, small, tmp_path):
    result = run("plan", loads / "day.npz", *small, "-o", "p.yaml", "--report", "p.html", "--json")
    assert json.loads(result.out)["report"] == "p.html"
    outline((tmp_path / "p.html").read_text())
    result = run("demo", "-o", "d.yaml", "--report", "d.html")
    assert "Report written: d.html" in result.out
    assert "32 windows it was not fitted to" in (tmp_path / "d.html").read_text()
