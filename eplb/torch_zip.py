"""Read ``torch.save`` files without torch, and without running what they contain.

A ``.pt`` file is a zip archive: a pickle that says which tensors there are, and a record of raw
bytes for each storage (torch/serialization.py and caffe2/serialize/inline_container.h). Unpickling
can call anything that the pickle names, so the names are limited here to the few that tensors
need, and these are stand-ins of our own: whatever else a file asks for ends the reading.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from eplb.errors import InvalidInput
from eplb.source import Source, parsing

__all__ = ["load_pt"]


@dataclass(frozen=True, slots=True)
class _StorageType:
    """A storage class by its element type; bfloat16 has none in numpy."""

    dtype: str
    is_bfloat16: bool = False


_STORAGE_TYPES = {
    "BFloat16Storage": _StorageType("<u2", is_bfloat16=True),
    "BoolStorage": _StorageType("|b1"),
    "ByteStorage": _StorageType("|u1"),
    "CharStorage": _StorageType("|i1"),
    "DoubleStorage": _StorageType("<f8"),
    "FloatStorage": _StorageType("<f4"),
    "HalfStorage": _StorageType("<f2"),
    "IntStorage": _StorageType("<i4"),
    "LongStorage": _StorageType("<i8"),
    "ShortStorage": _StorageType("<i2"),
}
# Types without a storage class of their own are saved as bytes with a dtype beside them.
_DTYPES = {"uint16": "<u2", "uint32": "<u4", "uint64": "<u8"}


def load_pt(source: Source) -> Any:
    """Return what ``torch.save`` wrote, with arrays in place of tensors.

    Raises
    ------
    InvalidInput
        The file is not a zip of ``torch.save``, is damaged, or asks for anything but tensors,
        numbers, text and containers.
    """
    with parsing(source, "torch file"):
        if not zipfile.is_zipfile(source.path):
            raise InvalidInput(
                f"{source.name} is not a zip file of torch.save; load it with the torch that wrote "
                "it and save it again with torch 1.6 or newer"
            )
        with zipfile.ZipFile(source.path) as archive:
            records = _records(archive, source)
            if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
                raise InvalidInput(f"{source.name} was written on a big-endian machine")
            if "data.pkl" not in records or "constants.pkl" in records:
                raise InvalidInput(
                    f"{source.name} holds no saved tensors (a TorchScript model?); give a dump of "
                    "the recorder"
                )
            pickled = archive.read(records["data.pkl"])
            return _Unpickler(pickled, archive, records, source).load()


def _records(archive: zipfile.ZipFile, source: Source) -> dict[str, zipfile.ZipInfo]:
    """Return the records by name, without the folder that all of them lie in."""
    records = {}
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            # torch stores its records as they are: a compressed one is not torch's, and could
            # unpack to anything.
            raise InvalidInput(f"{source.name} holds compressed records, which torch never writes")
        _, slash, name = info.filename.partition("/")
        if slash:
            records[name] = info
    return records


class _Unpickler(pickle.Unpickler):
    """Unpickles tensors, numbers, text and containers, and nothing else."""

    GLOBALS: ClassVar[dict[tuple[str, str], Any]] = {
        ("collections", "OrderedDict"): dict,
        ("__builtin__", "set"): set,
        ("builtins", "set"): set,
        ("torch", "Size"): tuple,
        **{("torch", name): kind for name, kind in _STORAGE_TYPES.items()},
        **{("torch", name): _StorageType(dtype) for name, dtype in _DTYPES.items()},
        ("torch.storage", "UntypedStorage"): _StorageType("|u1"),
    }

    def __init__(
        self,
        pickled: bytes,
        archive: zipfile.ZipFile,
        records: dict[str, zipfile.ZipInfo],
        source: Source,
    ) -> None:
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self._archive, self._records, self._source = archive, records, source
        self._storages: dict[str, NDArray[np.uint8]] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) in self.GLOBALS:
            return self.GLOBALS[module_name, global_name]
        if module_name == "torch._utils" and global_name == "_rebuild_tensor_v2":
            return _tensor
        if module_name == "torch._utils" and global_name == "_rebuild_tensor_v3":
            return _tensor_of_dtype
        raise InvalidInput(
            f"{self._source.name} asks for {module_name}.{global_name}, which is not run; give a "
            "file that holds only tensors, numbers, text and containers"
        )

    def persistent_load(self, pid: Any, /) -> tuple[_StorageType, NDArray[np.uint8]]:
        kind, storage_type, key, _, _ = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise InvalidInput(f"{self._source.name} refers to something that is not a storage")
        if key not in self._storages:
            if f"data/{key}" not in self._records:
                raise InvalidInput(f"{self._source.name} lacks the storage {key!r} of a tensor")
            data = self._archive.read(self._records[f"data/{key}"])
            self._storages[key] = np.frombuffer(data, np.uint8)
        return storage_type, self._storages[key]


def _tensor(
    storage: tuple[_StorageType, NDArray[np.uint8]],
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_: Any,
) -> NDArray[Any]:
    """Return a copy of the elements that a view of a storage shows."""
    storage_type, data = storage
    dtype = np.dtype(storage_type.dtype)
    elements = data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor has an impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = int(np.prod(size, dtype=object))
    # More elements than the storage has would be a view that repeats them: no recorder writes
    # one, and it could stand for any amount of memory.
    if count and (last >= len(elements) or count > len(elements)):
        raise ValueError("a tensor is larger than its storage")
    if not count:
        return np.zeros(size, dtype)
    view = np.lib.stride_tricks.as_strided(
        elements[offset:], size, [step * dtype.itemsize for step in stride], writeable=False
    )
    values: NDArray[Any] = view.copy()
    if storage_type.is_bfloat16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _tensor_of_dtype(
    storage: tuple[_StorageType, NDArray[np.uint8]],
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: _StorageType,
    *_: Any,
) -> NDArray[Any]:
    """Return a tensor whose element type is beside its storage of bytes."""
    return _tensor((dtype, storage[1]), offset, size, stride, requires_grad, hooks)
