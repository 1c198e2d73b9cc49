"""What each format means, and that it comes back."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from strategies import profiles

from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.profiles import read_profile, read_profiles, read_routings, write_profile
from eplb.profiles.write import WRITERS

COUNTS = np.array([[[0, 0, 0], [1, 2, 3], [4, 5, 6]], [[0, 0, 0], [7, 8, 9], [1, 0, 1]]])


def labelled():
    return LoadProfile.from_counts(
        COUNTS,
        scenario=["day", "night"],
        phase=["prefill", "decode"],
        tokens=[6, 9],
        time_s=[0.0, 60.5],
        metadata={"model": "toy", "top_k": 1},
    )


@pytest.mark.parametrize("suffix", WRITERS)
@given(profile=profiles())
def test_loads_and_layer_ids_come_back(suffix, profile, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / f"loads{suffix}"
    write_profile(profile, path)
    back = read_profile(path)
    # A window or layer without load is not a recording of one.
    used = LoadProfile.from_counts(profile.counts_WLE, layer_ids=profile.layer_ids)
    assert np.array_equal(back.counts_WLE, used.counts_WLE)
    assert back.layer_ids == used.layer_ids


def test_npz_keeps_everything(tmp_path):
    assert write_profile(labelled(), tmp_path / "p.npz") == ()
    back = read_profile(tmp_path / "p.npz")
    assert back == labelled()
    assert back.layer_ids == (1, 2)
    with np.load(tmp_path / "p.npz") as arrays:
        assert arrays["counts"].dtype == np.uint8


@pytest.mark.parametrize(
    ("suffix", "lost"),
    [
        ("csv", ("tokens", "time_s", "metadata")),
        ("npy", ("scenario", "phase", "tokens", "time_s", "metadata")),
        ("json", ("scenario", "phase", "tokens", "time_s", "metadata")),
    ],
)
def test_other_formats_say_what_they_lose(tmp_path, suffix, lost):
    assert write_profile(labelled(), tmp_path / f"p.{suffix}") == lost
    back = read_profile(tmp_path / f"p.{suffix}")
    if suffix == "csv":
        assert (back.scenario_W, back.phase_W) == (("day", "night"), ("prefill", "decode"))


def test_fractional_counts_come_back_exactly(tmp_path):
    profile = LoadProfile.from_counts([[1 / 3, 2e-7], [0.1, 1e12]])
    for suffix in WRITERS:
        write_profile(profile, tmp_path / f"p{suffix}")
        assert np.array_equal(read_profile(tmp_path / f"p{suffix}").counts_WLE, profile.counts_WLE)


def test_npz_labels_may_be_one_for_all(tmp_path):
    np.savez(
        tmp_path / "p.npz", counts=COUNTS, scenario=np.array("noon"), phase=np.array("decode"),
        layer_ids=[0, 5, 9], metadata=np.array('{"model": "m"}'), unrelated=np.array(["x"]),
    )  # fmt: skip
    profile = read_profile(tmp_path / "p.npz")
    assert profile.scenario_W == ("noon", "noon")
    assert profile.phase_W == ("decode", "decode")
    assert profile.layer_ids == (5, 9)
    assert profile.metadata == {"model": "m"}


def test_named_arrays(tmp_path):
    np.savez(tmp_path / "p.npz", one=COUNTS[0], many=COUNTS)
    assert read_profile(f"{tmp_path}/p.npz:one").num_windows == 1
    profile = read_profile(f"{tmp_path}/p.npz:many")
    assert (profile.num_windows, profile.source) == (2, "p.npz:many")
    with pytest.raises(InvalidInput, match=r"name one as p.npz:one \(it has one \[3, 3\], many"):
        read_profile(tmp_path / "p.npz")


def test_a_colon_in_a_file_name_is_no_array(tmp_path):
    np.save(tmp_path / "a:b.npy", COUNTS)
    assert read_profile(tmp_path / "a:b.npy").source == "a:b.npy"


@pytest.mark.parametrize(
    ("text", "windows", "layer_ids"),
    [
        ("1,2,3\n4,5,6\n", 1, (0, 1)),
        ("0,0,0\n1,2,3\n", 1, (1,)),
        ("# recorded today\n1,2,3\n\n4,5,6\n", 1, (0, 1)),
        ("\ufeff1,2,3\r\n4,5,6\r\n", 1, (0, 1)),
        ("e0,e1,e2\n1,2,3\n4,5,6\n", 1, (0, 1)),
        ("layer,0,1\n7,2,3\n3,5,6\n", 1, (3, 7)),
        (",ep_0,ep_1\nlayer_3,2,3\nlayer_4,5,6\n", 1, (3, 4)),
        (",0,1\n3,2,3\n4,5,6\n", 1, (3, 4)),
        ("window,0,1\na,2,3\na,5,6\nb,1,1\nb,1,1\n", 2, (0, 1)),
        ("scenario,phase,window,layer,0\nx,decode,0,3,1\ny,prefill,1,3,1\n", 2, (3,)),
        ('"1","2"\n"3","4"\n', 1, (0, 1)),
    ],
)
def test_csv_tables(tmp_path, text, windows, layer_ids):
    (tmp_path / "p.csv").write_bytes(text.encode())
    profile = read_profile(tmp_path / "p.csv")
    assert (profile.num_windows, profile.layer_ids) == (windows, layer_ids)


def test_csv_puts_rows_where_their_labels_say(tmp_path):
    (tmp_path / "p.csv").write_text("window,layer,0,1\nb,2,5,6\na,1,3,4\nb,1,1,2\na,2,7,8\n")
    profile = read_profile(tmp_path / "p.csv")
    assert profile.counts_WLE.tolist() == [[[1, 2], [5, 6]], [[3, 4], [7, 8]]]


def test_csv_scenarios_may_look_like_remarks(tmp_path):
    write_profile(replace(labelled(), scenario_W=("#1", "#2")), tmp_path / "p.csv")
    back = read_profile(tmp_path / "p.csv")
    assert back.scenario_W == ("#1", "#2")
    assert np.array_equal(back.counts_WLE, labelled().counts_WLE)


@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_a_row_for_every_layer_is_not_written_for_absurd_ids(tmp_path, suffix):
    profile = replace(labelled(), layer_ids=(1, 10**12))
    with pytest.raises(InvalidInput, match="has a layer 1000000000000"):
        write_profile(profile, tmp_path / f"p.{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_file_name_that_is_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"a\xffb.npy")
    np.save(path, COUNTS)
    assert read_profile(path).source == r"a\udcffb.npy"


def test_sglang_json(tmp_path):
    content = {"rank": 0, "logical_count": COUNTS.tolist(), "anything": None}
    (tmp_path / "p.json").write_text(json.dumps(content))
    profile = read_profile(tmp_path / "p.json")
    assert profile.layer_ids == (1, 2)
    assert "ring" in profile.metadata["window_order"]


def test_several_files_are_scenarios(tmp_path):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", COUNTS)
    merged = read_profiles([tmp_path / "a.npy", tmp_path / "b.npy"])
    assert merged.scenarios == ("a.npy", "b.npy")


def test_routings(tmp_path):
    topk = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    np.save(tmp_path / "r.npy", topk)
    np.savez(tmp_path / "r.npz", routings=topk, other=topk + 1, flat=topk[0])
    assert np.array_equal(read_routings(tmp_path / "r.npy"), topk)
    assert np.array_equal(read_routings(tmp_path / "r.npz"), topk)
    assert np.array_equal(read_routings(f"{tmp_path}/r.npz:other"), topk + 1)
    with pytest.raises(InvalidInput, match="did you mean 'other'"):
        read_routings(f"{tmp_path}/r.npz:othr")
    with pytest.raises(InvalidInput, match=r"\[tokens, layers, top_k\]"):
        read_routings(f"{tmp_path}/r.npz:flat")


def test_recorded_loads(shared_data):
    profile = read_profile(f"{shared_data}/deepseek_v3_sglang/logical_count.npz:prefill_in1024")
    assert profile.layer_ids == tuple(range(3, 61))
    assert read_profile(shared_data / "moe_lm_256" / "drift_a.npz").num_windows == 480
    assert read_routings(f"{shared_data}/moe_lm_256/tokens.npz:french").shape == (16384, 8, 8)
