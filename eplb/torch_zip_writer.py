"""Write tensors as ``torch.save`` does, without torch.

The layout is described in :mod:`eplb.torch_zip`. The pickle is put together from its opcodes,
since pickling a reference to a function needs the function, and that is torch's.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["dump_pt"]

_STORAGES = {"int32": "IntStorage", "int64": "LongStorage", "float32": "FloatStorage",
             "float64": "DoubleStorage"}  # fmt: skip
_EPOCH = (1980, 1, 1, 0, 0, 0)


def dump_pt(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the bytes of a ``.pt`` file with a dict of tensors, the same for the same tensors.

    Parameters
    ----------
    tensors : mapping of str to array
        Of int32, int64, float32 or float64.
    """
    arrays = {name: np.array(array, order="C") for name, array in tensors.items()}
    content = b"".join(
        _plain(name) + _tensor(str(i), array) for i, (name, array) in enumerate(arrays.items())
    )
    records = {
        "data.pkl": pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + content
        + pickle.SETITEMS + pickle.STOP,
        "byteorder": b"little",
        "version": b"3\n",
    }  # fmt: skip
    for i, array in enumerate(arrays.values()):
        records[f"data/{i}"] = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _EPOCH), data)
    return stream.getvalue()


def _tensor(key: str, array: NDArray[Any]) -> bytes:
    """Return the call of torch._utils._rebuild_tensor_v2 that makes a tensor of a storage."""
    # Strides count elements, as torch counts them.
    stride = tuple(step // array.itemsize for step in array.strides)
    storage = (
        pickle.MARK + _plain("storage") + _name("torch", _STORAGES[array.dtype.name])
        + _plain(key) + _plain("cpu") + _plain(array.size) + pickle.TUPLE + pickle.BINPERSID
    )  # fmt: skip
    no_hooks = _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = (
        pickle.MARK + storage + _plain(0) + _plain(array.shape) + _plain(stride) + _plain(False)
        + no_hooks + pickle.TUPLE
    )  # fmt: skip
    return _name("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode("ascii")


def _plain(value: str | int | bool | tuple[int, ...]) -> bytes:
    """Return the opcodes of a plain value: its pickle without the frame."""
    return pickle.dumps(value, protocol=2)[2:-1]
