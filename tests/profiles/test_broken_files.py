"""Files that hold no loads: one line that says so, and nothing else ever."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb.errors import EplbError, InvalidInput
from eplb.load_profile import LoadProfile
from eplb.profiles import read_profile, read_profiles, read_routings
from eplb.profiles.read import READERS
from eplb.profiles.write import WRITERS

GOOD = np.arange(1, 13).reshape(2, 2, 3)


def npz(path, **arrays):
    np.savez(path, **arrays)


def npy_header(path, header):
    """An .npy file of nothing but a header."""
    text = header.encode().ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)


ARRAYS = [
    ("one dimension", np.ones(4), "must be"),
    ("four dimensions", np.ones((1, 1, 1, 1)), "4 dimension"),
    ("no experts", np.ones((2, 0)), "each at least 1"),
    ("text", np.array([["a", "b"]]), "must be numbers"),
    ("complex", np.ones((2, 2), complex), "must be numbers"),
    ("times", np.zeros((2, 2), "datetime64[s]"), "must be numbers"),
    ("records", np.zeros((2, 2), [("a", int)]), "must be numbers"),
    ("negative", -np.ones((2, 2)), "negative"),
    ("nan", np.full((2, 2), np.nan), "NaN"),
    ("infinite", np.full((2, 2), np.inf), "infinite"),
    ("zero", np.zeros((2, 2)), "all counts are zero"),
    ("objects", np.array([[1, None]], object), "is not a readable"),
]


@pytest.mark.parametrize(("what", "array", "message"), ARRAYS)
def test_arrays(tmp_path, what, array, message):
    np.save(tmp_path / "p.npy", array, allow_pickle=True)
    np.savez(tmp_path / "p.npz", counts=array)
    for name in ("p.npy", "p.npz"):
        with pytest.raises(InvalidInput, match=message) as raised:
            read_profile(tmp_path / name)
        assert name in str(raised.value)


NPZ = [
    ({"counts": GOOD, "layer_ids": [1]}, "1 layer_ids for 2 layers"),
    ({"counts": GOOD, "layer_ids": [2, 1]}, "increasing"),
    ({"counts": GOOD, "layer_ids": [0.5, 1.5]}, "whole numbers"),
    ({"counts": GOOD, "scenario": ["a"]}, "1 scenario labels for 2 windows"),
    ({"counts": GOOD, "scenario": [1, 2]}, "scenario must be text"),
    ({"counts": GOOD, "phase": ["prefil", "decode"]}, "did you mean 'prefill'"),
    ({"counts": GOOD, "tokens": [1, 2, 3]}, "tokens must be 2 finite numbers"),
    ({"counts": GOOD, "tokens": ["a", "b"]}, "tokens must be numbers"),
    ({"counts": GOOD, "time_s": [0, np.nan]}, "time_s must be 2 finite numbers"),
    ({"counts": GOOD, "metadata": "not json"}, "metadata must be the text of a JSON object"),
    ({"counts": GOOD, "metadata": "[1]"}, "metadata must be the text of a JSON object"),
    ({"other": np.ones(3)}, "no array 'counts', nor any other"),
]


@pytest.mark.parametrize(("arrays", "message"), NPZ)
def test_npz_labels(tmp_path, arrays, message):
    npz(tmp_path / "p.npz", **{k: np.array(v) for k, v in arrays.items()})
    with pytest.raises(InvalidInput, match=message):
        read_profile(tmp_path / "p.npz")


TEXTS = [
    ("p.csv", "1,2,3\n4,5\n", "line 2: 2 cells where line 1 has 3"),
    ("p.csv", "1,2\n3,x\n", "line 2: 'x' is not a number"),
    ("p.csv", "layer,0,1\n", "a header and no rows"),
    ("p.csv", "# only a remark\n", "has no rows"),
    ("p.csv", "layer,window\n1,2\n", "names no expert columns"),
    ("p.csv", "layer,layer,0\n1,2,3\n", "names 'layer' twice"),
    ("p.csv", "layer,0\n1,2\n1,3\n", "add a column 'window'"),
    ("p.csv", "layer,0\none,2\n", "'one' is not a layer id"),
    ("p.csv", "window,layer,0\na,1,2\nb,2,3\n", "every window must name each of the 2 layers"),
    ("p.csv", "1,nan\n", "NaN"),
    ("p.csv", "1,\x00\n", "p.csv"),
    ("p.csv", "1,-2\n", "negative"),
    ("p.csv", "1,2,x\n4,5,6\n", "line 1: 'x' is not a number"),
    ("p.csv", "1,2,\n4,5,6\n", "line 1: '' is not a number"),
    ("p.csv", ",2,3\n4,5,6\n", "line 1: '' is not a number"),
    ("p.csv", "1,2\n# 3,4\n5,6\n", "line 2: '# 3' is not a number"),
    ("p.json", "{", "is not a readable JSON file"),
    ("p.json", "[1]", "has no 'logical_count'"),
    ("p.json", '{"logical_count": [[1, 2], [3]]}', "different length"),
    ("p.json", '{"logical_count": [["1"]]}', "must be numbers"),
    ("p.json", '{"logical_count": [[NaN, 1]]}', "NaN"),
    ("p.json", '{"logical_count": null}', "must be numbers"),
    ("p.json", f'{{"logical_count": [[{"9" * 400}]]}}', "p.json"),
    ("p.json", "[" * 100_000, "is not a readable JSON file"),
    ("p.parquet", "PAR1", "known: .csv, .journal, .json, .jsonl, .npy, .npz, .pt"),
    ("p", "1,2", "unknown profile format"),
]


@pytest.mark.parametrize(("name", "text", "message"), TEXTS)
def test_texts(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidInput, match=message) as raised:
        read_profile(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_latin_1_is_no_table(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"1,2\n\xe9,3\n")
    with pytest.raises(InvalidInput, match="is not a readable table"):
        read_profile(tmp_path / "p.csv")


@pytest.mark.parametrize("suffix", READERS)
def test_what_is_no_file(tmp_path, suffix):
    path = tmp_path / f"p{suffix}"
    with pytest.raises(InvalidInput, match="does not exist; check the path"):
        read_profile(path)
    path.touch()
    with pytest.raises(InvalidInput, match="is empty; record again"):
        read_profile(path)
    path.unlink()
    path.mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(InvalidInput, match="is not a regular file"):
        read_profile(tmp_path / "pipe.npz")
    with pytest.raises(InvalidInput, match="is a directory; name a profile file"):
        read_profile(path)
    with pytest.raises(InvalidInput, match="cannot read"):
        read_profile(f"p\0{suffix}")


@pytest.mark.parametrize("shape", [(10**6, 10**6), (10**30, 2), (2, -3)])
def test_absurd_headers_ask_for_no_memory(tmp_path, shape):
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}"
    npy_header(tmp_path / "p.npy", header)
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive:
        archive.writestr("counts.npy", (tmp_path / "p.npy").read_bytes())
    for name in ("p.npy", "p.npz"):
        with pytest.raises(InvalidInput):
            read_profile(tmp_path / name)


def test_npz_members_larger_than_their_header(tmp_path):
    stream = io.BytesIO()
    np.save(stream, GOOD)
    with zipfile.ZipFile(tmp_path / "p.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("counts.npy", stream.getvalue() + bytes(1 << 20))
    with pytest.raises(InvalidInput, match="longer than its header says"):
        read_profile(tmp_path / "p.npz")


def test_profiles_of_two_models(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    np.save(tmp_path / "b.npy", np.ones((2, 4)))
    np.save(tmp_path / "c.npy", np.ones((3, 3)))
    with pytest.raises(InvalidInput, match=r"4 experts, a\.npy has 3"):
        read_profiles([tmp_path / "a.npy", tmp_path / "b.npy"])
    with pytest.raises(InvalidInput, match=r"ids 2 are in one only"):
        read_profiles([tmp_path / "a.npy", tmp_path / "c.npy"])


def only_eplb_errors(path, data):
    path.write_bytes(data)
    for reader in (read_profile, read_routings):
        try:
            reader(path)
        except EplbError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert len(str(error)) < 600  # noqa: PT017


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def valid_files():
    """A small valid file of every format, and dumps that torch would write."""
    profile = LoadProfile.from_counts(GOOD, scenario=["a", "b"], metadata={"model": "m"})
    files = {suffix: encode(profile) for suffix, (encode, _) in WRITERS.items()}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("d/data.pkl", pickle.dumps({"logical_count": GOOD.tolist(), "rank": 0}))
        archive.writestr("d/byteorder", b"little")
        archive.writestr("d/data/0", bytes(64))
    files[".pt"] = stream.getvalue()
    return files


VALID = valid_files()


def mutated(draw, data):
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        data[at : at + draw(st.integers(0, 6))] = draw(st.binary(max_size=6))
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


@pytest.mark.parametrize("suffix", VALID)
@settings(max_examples=500)
@given(data=st.data())
def test_fuzzed_files_raise_only_our_errors(folder, suffix, data):
    kind = data.draw(st.sampled_from(["bytes", "mutated", "member"]))
    content = VALID[suffix]
    if kind == "bytes":
        content = data.draw(st.binary(min_size=1, max_size=200))
    elif kind == "member" and suffix in (".npz", ".pt"):
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
            chosen = data.draw(st.sampled_from(old.namelist()))
            for name in old.namelist():
                member = old.read(name)
                new.writestr(name, mutated(data.draw, member) if name == chosen else member)
        content = stream.getvalue()
    else:
        content = mutated(data.draw, content)
    only_eplb_errors(folder / f"p{suffix}", content)


CELLS = st.one_of(st.integers(-2, 99).map(str), st.text(max_size=4), st.just("layer"))


@settings(max_examples=500)
@given(st.lists(st.lists(CELLS, max_size=4), max_size=5))
def test_fuzzed_tables_raise_only_our_errors(folder, table):
    text = "\n".join(",".join(row) for row in table)
    only_eplb_errors(folder / "p.csv", text.encode("utf-8", "surrogatepass") or b" ")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=500)
@given(JSON)
def test_fuzzed_json_raises_only_our_errors(folder, value):
    only_eplb_errors(folder / "p.json", json.dumps({"logical_count": value}).encode())


@settings(max_examples=500)
@given(JSON, st.booleans())
def test_fuzzed_pickles_raise_only_our_errors(folder, value, as_records):
    content = {"records": value, "last_physical_to_logical_map": value}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        content = content if as_records else {"logical_count": value}
        archive.writestr("d/data.pkl", pickle.dumps(content))
    only_eplb_errors(folder / "p.pt", stream.getvalue())


def test_reading_imports_no_torch_and_no_terminal():
    code = (
        "import sys, eplb.profiles; "
        "print([m for m in ('torch', 'rich', 'click', 'yaml') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
