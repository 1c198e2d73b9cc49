"""``eplb requests``, as users and programs call it."""

import json

import numpy as np
import pytest

DECODE = ("--phase", "decode", "--ranks", 4, "--kv-tokens", 20000, "--max-requests", 12)
PREFILL = ("--phase", "prefill", "--ranks", 4, "--kv-tokens", 20000, "--max-requests", 12)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path.with_name(tmp_path.name + "-trace.csv")
    rng = np.random.default_rng(0)
    rows = zip(np.cumsum(rng.exponential(0.1, 150)), rng.integers(1, 3000, 150),
               rng.integers(1, 150, 150), strict=True)  # fmt: skip
    lines = [f"{a:.3f},{p},{o}" for a, p, o in rows]
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (DECODE, {"kv_imbalance_mean", "requests_imbalance_mean"}),
        (PREFILL, {"attention_imbalance_mean", "tokens_imbalance_mean"}),
    ],
)
def test_compare_as_json(run, trace, options, keys):
    result = run("requests", "compare", trace, *options, "--seeds", 2, "--json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert report["utilisation"] == 0.8
    assert report["seeds"] == [0, 1]
    assert {"eplb", "vllm", "sglang-total-tokens", "tensorrt-llm", "random"} <= set(
        report["policies"]
    )
    for figures in report["policies"].values():
        assert set(figures) >= keys | {"step_balance", "tokens_per_s"}
        assert all(figures[key] >= 1 for key in keys)
        assert 0 < figures["step_balance"] <= 1 + 1e-12
        assert figures["tokens_per_s"] > 0


def test_five_seeds_unless_told_otherwise(run, trace):
    words = ("requests", "compare", trace, *DECODE, "--policies", "eplb, vllm", "--json")
    report = json.loads(run(*words).out)
    assert len(report["seeds"]) == 5
    assert list(report["policies"]) == ["eplb", "vllm"]
    assert "kv_imbalance_mean_ci95" in report["policies"]["eplb"]


def test_compare_prints_a_table(run, trace):
    result = run("requests", "compare", trace, *PREFILL, "--seeds", 1, "--policies", "eplb,random")
    assert "150 requests" in result.out
    assert "tokens imbalance" in result.out
    assert result.out.count("\n") < 12


def test_replay(run, trace, tmp_path):
    words = ("requests", "replay", trace, *DECODE, "--policy", "vllm", "--abort", 0.1)
    report = json.loads(run(*words, "--json").out)
    assert report["policy"] == "vllm"
    assert report["time_per_output_token_s_p99"] > 0
    pytest.importorskip("matplotlib")
    text = run(*words, "--plot", "picture.svg").out
    assert "picture.svg" in text
    assert (tmp_path / "picture.svg").read_bytes().startswith(b"<?xml")


def test_lines_left_out_are_warned_of(run, trace):
    with trace.open("a") as stream:
        stream.write("1,2\n")
    result = run("requests", "replay", trace, *DECODE, "--json")
    assert result.code == 0
    assert "1 unreadable lines left out: line 152" in result.err
    assert json.loads(result.out)["notes"]
    refused = run("requests", "replay", trace, *DECODE, "--max-bad-lines", 0)
    assert refused.code == 2
    assert "line 152" in refused.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("compare", "TRACE", *DECODE, "--policies", "epbl"), "did you mean 'eplb'"),
        (("compare", "TRACE", "--phase", "decode", "--ranks", 0), "0 is not in the range"),
        (("compare", "TRACE", "--phase", "train", "--ranks", 2), "unknown phase"),
        (("replay", "TRACE", *DECODE, "--lose-rank", 9), "rank 9 is not one of 0 to 3"),
        (("replay", "TRACE", *PREFILL, "--abort", 0.5), "decode only"),
        (("replay", "TRACE", *DECODE, "--plot", "a.bmp"), "png, svg, pdf"),
        (("replay", "none.csv", *DECODE), "does not exist"),
        (("replay", ".", *DECODE), "client_rates.csv.gz"),
        (("replay", "TRACE", "--phase", "prefill", "--ranks", 2, "--kv-tokens", 9), "--kv-tokens"),
    ],
)
def test_bad_input_is_one_line_and_code_2(run, trace, words, message):
    result = run("requests", *(trace if word == "TRACE" else word for word in words))
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert result.out == ""
