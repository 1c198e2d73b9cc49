"""Loads that engines record: vLLM's JSON lines, and the folders of TensorRT-LLM and Omni."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb.engines import omni
from eplb.errors import InvalidInput
from eplb.profiles import read_profile
from eplb.slots import Placement
from eplb.source import open_source

GOOD = {
    "record_type": "eplb_load_stats", "version": 1, "step": 5, "num_ranks": 2,
    "expert_load": [[1, 2, 3, 4]], "p2l_map": [[0, 1, 2, 0]],
}  # fmt: skip


def lines(path, *records, end="\n"):
    text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text(text + end)
    return path


@pytest.fixture
def jsonl(tmp_path):
    return tmp_path / "loads.jsonl"


def test_slots_add_up_to_logical_experts(jsonl):
    moved = {**GOOD, "step": 6, "p2l_map": [[2, 1, 0, -1]]}
    other = {"record_type": "eplb_load_meta", "anything": 1}
    profile = read_profile(lines(jsonl, other, GOOD, "", moved))
    assert np.array_equal(profile.counts_WLE, [[[5, 2, 3]], [[3, 2, 1]]])
    assert profile.metadata["steps"] == [5, 6]


@given(data=st.data())
def test_loads_of_any_map(tmp_path_factory, data):
    """Against plain loops."""
    experts, slots = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    windows, layers = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    maps = random.integers(-1, experts, (windows, layers, slots))
    maps[0, 0, 0] = experts - 1
    loads = random.integers(1, 100, maps.shape)
    records = [
        {**GOOD, "expert_load": load.tolist(), "p2l_map": p2l.tolist()}
        for load, p2l in zip(loads, maps, strict=True)
    ]
    expected = np.zeros((windows, layers, experts))
    for w, layer, slot in np.ndindex(maps.shape):
        if maps[w, layer, slot] >= 0:
            expected[w, layer, maps[w, layer, slot]] += loads[w, layer, slot]
    profile = read_profile(lines(tmp_path_factory.mktemp("loads") / "x.jsonl", *records))
    used_W, used_L = expected.any(axis=(1, 2)), expected.any(axis=(0, 2))
    assert np.array_equal(profile.counts_WLE, expected[used_W][:, used_L])
    assert profile.layer_ids == tuple(np.flatnonzero(used_L).tolist())


def test_a_line_cut_off_at_the_end_is_left_out_with_a_warning(jsonl):
    with pytest.warns(UserWarning, match="line 2 was cut off"):
        profile = read_profile(lines(jsonl, GOOD, json.dumps(GOOD)[:40], end=""))
    assert profile.num_windows == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2: expected a record with 'record_type'"),
        ({**GOOD, "record_type": "eplb_initial_mapping"}, "must be 'eplb_load_stats'"),
        ({**GOOD, "version": 2}, "line 2: version must be 1, got 2"),
        ({**GOOD, "expert_load": [[1, 2], [3]]}, "line 2: expert_load must be numbers"),
        ({**GOOD, "expert_load": [["a"] * 4]}, "line 2: expert_load must be numbers"),
        ({**GOOD, "expert_load": [[1, 2]]}, "line 2: p2l_map is [1, 4] and expert_load [1, 2]"),
        ({**GOOD, "p2l_map": [[0.5] * 4]}, "line 2: p2l_map must be numbers"),
        ({**GOOD, "p2l_map": [[10**30] * 4]}, "line 2: p2l_map must be numbers"),
        ({**GOOD, "p2l_map": [[10**9] * 4]}, "ids outside -1 to"),
        ({**GOOD, "expert_load": [[1]], "p2l_map": [[0]]}, "keep recordings of different servers"),
        ('{"record_type": "x", "record_type": "y"}', "comes twice"),
    ],
)
def test_bad_records(jsonl, record, message):
    with pytest.raises(InvalidInput) as error:
        read_profile(lines(jsonl, GOOD, record))
    assert message in str(error.value)
    assert jsonl.name in str(error.value)


def test_no_records(jsonl):
    with pytest.raises(InvalidInput, match="has no record of the type 'eplb_load_stats'"):
        read_profile(lines(jsonl, {"record_type": "session_metadata"}))


@pytest.fixture
def trt(tmp_path):
    """Write a recording of TensorRT-LLM; returns what to call with changes."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    folder = tmp_path / "expert_statistic"
    folder.mkdir()

    def write(ranks, meta=None):
        meta = {"num_experts": 3, "num_experts_per_token": 2} if meta is None else meta
        (folder / "meta_info.json").write_text(json.dumps(meta))
        for i, counts in enumerate(ranks):
            save_file({k: np.array(v) for k, v in counts.items()}, folder / f"rank{i}.safetensors")
        save_file({"1_3": np.zeros((9, 9))}, folder / "rank0_raw.safetensors")
        return folder

    return write


def test_ranks_of_tensorrt_llm_add_up(trt):
    first = {"100_3": [1, 2, 3], "100_61": [4, 0, 0], "101_3": [1, 1, 1], "101_61": [0, 0, 9]}
    profile = read_profile(trt([first, {"100_3": [10, 0, 0]}]))
    assert profile.layer_ids == (3, 61)
    assert np.array_equal(profile.counts_WLE, [[[11, 2, 3], [4, 0, 0]], [[1, 1, 1], [0, 0, 9]]])
    assert profile.metadata["top_k"] == 2


@pytest.mark.parametrize(
    ("ranks", "meta", "message"),
    [
        ([{"100_3": [1, 2]}], None, "100_3 must be 3 whole numbers, got int64 of [2]"),
        ([{"100_3": [1.0, 2, 3]}], None, "got float64"),
        ([{"layer": [1, 2, 3]}], None, "key 'layer' is not an iteration and a layer"),
        ([{"1_3": [1, 2, 3], "2_4": [1, 2, 3]}], None, "not every iteration has every layer"),
        ([], None, "has no rank*.safetensors"),
        ([{"1_3": [1, 2, 3]}], {"num_experts": 3, "ep_size": 4}, "has 1 rank*.safetensors and"),
        ([{"1_3": [1, 2, 3]}], {}, "must be an object with 'num_experts'"),
        ([{"1_3": [1, 2, 3]}], {"num_experts": -1}, "num_experts must be a whole number"),
    ],
)
def test_bad_recordings_of_tensorrt_llm(trt, ranks, meta, message):
    with pytest.raises(InvalidInput) as error:
        read_profile(trt(ranks, meta))
    assert message in str(error.value)


def test_damaged_safetensors(trt):
    folder = trt([{"1_3": [1, 2, 3]}])
    path = folder / "rank0.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InvalidInput, match=r"rank0\.safetensors is not a readable safetensors"):
        read_profile(folder)


@pytest.fixture
def dumps(tmp_path):
    """Write dumps of Omni-placement into a folder named as its guide names it."""
    folder = tmp_path / "decoder"
    folder.mkdir()

    def write(files):
        for (step, rank), rows in files.items():
            text = "".join("\t".join(map(str, row)) + "\t\n" for row in rows)
            (folder / f"activation_counts_recordstep_{step}_rank_{rank}.txt").write_text(text)
        return folder

    return write


def test_dumps_of_all_ranks_and_of_one(dumps):
    profile = read_profile(dumps({(2, 0): [[5, 6], [7, 8]], (10, 0): [[1, 0], [0, 1]]}))
    assert np.array_equal(profile.counts_WLE, [[[5, 6], [7, 8]], [[1, 0], [0, 1]]])
    assert profile.phase_W == ("decode", "decode")
    both = read_profile(dumps({(s, r): [[s, r + 1], [1, 1]] for s in (2, 10) for r in (0, 1)}))
    assert np.array_equal(both.counts_WLE[0], [[2, 1, 2, 2], [1, 1, 1, 1]])


def test_dumps_through_the_placement_that_was_served(dumps):
    """Columns are slots, rank by rank, each rank's experts by id; one slot here is empty."""
    placement = Placement(
        phys_to_log_LS=np.array([[0, 2, 1, 2], [1, 2, 0, -1]]), layer_ids=(0, 1), num_experts=3
    )
    folder = dumps({(0, 0): [[1, 2, 3, 4], [5, 6, 7, 0]]})
    profile = omni.read_statistics(open_source(folder, folder=True), placement)
    assert np.array_equal(profile.counts_WLE[0], [[1, 3, 6], [7, 5, 6]])
    other = Placement(phys_to_log_LS=np.array([[0, 1]]), layer_ids=(0,), num_experts=2)
    with pytest.raises(InvalidInput, match="give the one that was served"):
        omni.read_statistics(open_source(folder, folder=True), other)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({(0, 0): [[1, 2]], (0, 1): [[1, 2]], (1, 0): [[1, 2]]}, "step 1 has no dump of rank 1"),
        ({(0, 0): [[1, 2]], (1, 0): [[1, 2, 3]]}, "step 1 has [layers, slots] [1, 3]"),
        ({(0, 0): [[1, 2], [3]]}, "not a readable table of counts"),
        ({(0, 0): [["x", 2]]}, "not a readable table of counts"),
        ({(0, 0): [[10**30, 2]]}, "not a readable table of counts"),
        ({(0, 0): [[-1, 2]]}, "negative"),
        ({(0, 0): []}, "not a readable table of counts"),
        ({(0, 0): [[1]], (0, 1): [[1], [2]]}, "decoder is not a readable recording"),
    ],
)
def test_bad_dumps(dumps, files, message):
    with pytest.raises(InvalidInput) as error:
        read_profile(dumps(files))
    assert message in str(error.value)


def test_other_folders(tmp_path):
    with pytest.raises(
        InvalidInput, match=r"is a directory; name a profile file, or a folder with meta_info\.json"
    ):
        read_profile(tmp_path)
