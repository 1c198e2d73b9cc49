"""What is written loads in torch, under its safest setting, and in our own reader."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from eplb.source import open_source
from eplb.torch_zip import load_pt
from eplb.torch_zip_writer import dump_pt

ARRAYS = hnp.arrays(
    st.sampled_from([np.int32, np.int64, np.float32, np.float64]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
TENSORS = st.dictionaries(st.text(min_size=1, max_size=8), ARRAYS, min_size=1, max_size=3)


@given(TENSORS)
def test_torch_reads_it_without_unpickling_anything_else(tensors):
    torch = pytest.importorskip("torch")
    loaded = torch.load(io.BytesIO(dump_pt(tensors)), weights_only=True)
    assert loaded.keys() == tensors.keys()
    for name, array in tensors.items():
        assert loaded[name].numpy().dtype == array.dtype
        assert np.array_equal(loaded[name].numpy(), array, equal_nan=True)
        assert loaded[name].is_contiguous()


@given(TENSORS)
def test_our_reader_reads_it(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("pt") / "x.pt"
    path.write_bytes(dump_pt(tensors))
    loaded = load_pt(open_source(path))
    assert loaded.keys() == tensors.keys()
    assert all(np.array_equal(loaded[n], a, equal_nan=True) for n, a in tensors.items())


def test_the_same_tensors_give_the_same_bytes():
    tensors = {"a": np.arange(6).reshape(2, 3), "b": np.arange(6).reshape(3, 2).T}
    assert dump_pt(tensors) == dump_pt({k: v.copy() for k, v in tensors.items()})


def test_large_tensors_load_memory_mapped(tmp_path):
    torch = pytest.importorskip("torch")
    array = np.arange(2**18).reshape(2, -1)
    (tmp_path / "x.pt").write_bytes(dump_pt({"t": array}))
    loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert np.array_equal(loaded["t"].numpy(), array)
