"""``.pt`` files: equal to what torch reads, and never run."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from eplb.errors import InvalidInput
from eplb.profiles import read_profile
from eplb.source import open_source
from eplb.torch_zip import load_pt


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "dump.pt"


def load(path):
    return load_pt(open_source(path))


DTYPES = [
    "bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8",
    "uint16", "uint32", "uint64", "uint8",
]  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(torch, path, name):
    tensor = torch.tensor([[0, 1, 2], [3, 100, 1]]).to(getattr(torch, name))
    torch.save({"t": tensor}, path)
    array = load(path)["t"]
    expected = tensor.float() if name == "bfloat16" else tensor
    assert array.dtype == expected.numpy().dtype
    assert np.array_equal(array, expected.numpy())


def test_views_and_shared_storages(torch, path):
    base = torch.arange(24).reshape(4, 6)
    views = [base, base[1:, 2:5], base.T, base[::2, ::3], base[0, 0], base[:0], base.permute(1, 0)]
    torch.save(views, path)
    for array, view in zip(load(path), views, strict=True):
        assert np.array_equal(array, view.numpy())
        assert array.shape == tuple(view.shape)


def test_plain_values(torch, path):
    content = {"a": None, "b": 1.5, "c": "text", "d": (1, [2, {3}]), "e": True}
    torch.save({**content, "t": torch.ones(2)}, path)
    loaded = load(path)
    assert {k: loaded[k] for k in content} == content


def test_stat_dump(torch, path):
    ring = torch.zeros((5, 4, 6), dtype=torch.int32)
    ring[:3, 1:] = torch.arange(1, 3 * 3 * 6 + 1).reshape(3, 3, 6)
    torch.save(
        {"rank": 0, "logical_count": ring, "average_utilization_rate_over_window": None}, path
    )
    profile = read_profile(path)
    assert profile.layer_ids == (1, 2, 3)
    assert np.array_equal(profile.counts_WLE, ring[:3, 1:].numpy())
    assert "ring" in profile.metadata["window_order"]


def test_per_pass_dump(torch, path):
    phys_to_log = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]])
    records = [
        {"forward_pass_id": i, "rank": 3, "gatherer_key": "primary",
         "global_physical_count": torch.tensor([[1, 2, 3, 4], [10, 20, 30, 40]]) * (i + 1)}
        for i in (0, 1, 1)
    ]  # fmt: skip
    torch.save({"records": records, "last_physical_to_logical_map": phys_to_log}, path)
    profile = read_profile(path)
    once = np.array([[5, 2, 3], [30, 60, 10]])
    assert np.array_equal(profile.counts_WLE, [once, 4 * once])
    assert profile.metadata["recorded_by_rank"] == 3
    assert "placement" in profile.metadata["assumes"]


def test_a_bare_tensor(torch, path):
    torch.save(torch.ones(3, 4), path)
    assert read_profile(path).counts_WLE.shape == (1, 3, 4)


class Calls:
    """Unpickled naively, this calls something."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def write_zip(path, pickled, compression=zipfile.ZIP_STORED, **records):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in records.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", data)


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch boom",), "posix.system"),
        (eval, ("open('boom', 'w')",), "(__builtin__|builtins).eval"),
        (Path.touch, (Path("boom"),), "(__builtin__|builtins).getattr"),
        (getattr, (Path, "cwd"), "(__builtin__|builtins).getattr"),
        (np.zeros, (3,), "numpy"),
    ],
)
def test_pickled_code_is_not_run(path, monkeypatch, function, args, name):
    monkeypatch.chdir(path.parent)
    write_zip(path, pickle.dumps(Calls(function, *args), protocol=2))
    with pytest.raises(InvalidInput, match=f"asks for {name}.*which is not run"):
        read_profile(path)
    assert list(Path().iterdir()) == [Path("dump.pt")]


def tensor_pickle(torch, size, stride, offset=0, key="0"):
    """A pickle of one tensor whose shape says what we like."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            is_storage = isinstance(obj, Storage)
            return ("storage", torch.LongStorage, key, "cpu", 4) if is_storage else None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"logical_count": Tensor()})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((100, 100), (100, 1), 0),
        ((2, 2), (2, 1), 3),
        ((10**9, 10**9), (0, 0), 0),
        ((2, 2), (-1, 1), 2),
        ((2, -2), (2, 1), 0),
        ((2, 2), (1,), 0),
        ((2, 2), (10**30, 1), 0),
        (("2", 2), (2, 1), 0),
    ],
)
def test_tensors_larger_than_their_storage(torch, path, size, stride, offset):
    write_zip(path, tensor_pickle(torch, size, stride, offset), data__0=bytes(32))
    with pytest.raises(InvalidInput, match="is not a readable"):
        read_profile(path)


def test_a_tensor_of_the_same_make_is_read(torch, path):
    data = np.arange(4, dtype="<i8").tobytes()
    write_zip(path, tensor_pickle(torch, (2, 2), (2, 1)), data__0=data)
    assert read_profile(path).counts_WLE.tolist() == [[[0, 1], [2, 3]]]


def test_a_missing_storage(torch, path):
    write_zip(path, tensor_pickle(torch, (2, 2), (2, 1), key="7"), data__0=bytes(32))
    with pytest.raises(InvalidInput, match="lacks the storage '7'"):
        read_profile(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(pickle.dumps({"logical_count": [[1]]})), "torch 1.6 or newer"),
        (lambda p: write_zip(p, b"N.", zipfile.ZIP_DEFLATED), "compressed records"),
        (lambda p: write_zip(p, b"N.", byteorder=b"big"), "big-endian"),
        (lambda p: write_zip(p, b"N.", **{"constants.pkl": b"N."}), "TorchScript"),
        (lambda p: write_zip(p, b"N."), "neither 'logical_count' nor 'records'"),
        (lambda p: write_zip(p, b""), "is not a readable torch file"),
        (lambda p: write_zip(p, b"(" * 10), "is not a readable torch file"),
        (lambda p: write_zip(p, pickle.dumps({"records": []})), "needs a list of records"),
        (lambda p: write_zip(p, pickle.dumps({"logical_count": "x"})), "must be numbers"),
    ],
)
def test_files_that_hold_no_loads(path, write, message):
    write(path)
    with pytest.raises(InvalidInput, match=message):
        read_profile(path)


def test_a_truncated_dump(torch, path):
    torch.save(torch.ones(3, 4), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput, match=r"not a zip file of torch\.save"):
        read_profile(path)
