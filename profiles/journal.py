"""The journal of a recording in progress: windows are appended, and a torn end costs only itself.

``loads.npz`` is recorded as ``loads.npz.journal`` beside it and becomes one archive when the
recording is closed. Until then, or for ever where the process was killed, readers find the
journal under the name of the profile. It is a magic word and records; a record is its length, its
CRC-32 and a small ``.npz`` archive. The first record is the header (``layer_ids``, ``metadata``
and the like), every other one a window. Appending costs the same however long the recording is.
Shape letters: W windows, L layers, E logical experts.
"""

from __future__ import annotations

import fcntl
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from eplb.errors import InvalidInput
from eplb.files import check_writable
from eplb.source import journal_path

__all__ = ["Arrays", "Journal", "read_records"]

Arrays = Mapping[str, NDArray[Any]]

MAGIC = b"eplb/journal@1\n"
_FRAME = struct.Struct("<QI")
# A record is one window. This is far above 3 phases of 128 layers of 1,024 experts from 64 sources.
MAX_RECORD_BYTES = 1 << 30


class Journal:
    """A journal open for appending, by one process at a time.

    Parameters
    ----------
    path : path
        Of the profile that the recording will become; the journal lies beside it.
    header : mapping of name to array
        Written first.
    resume : bool
        Go on with the journal that a killed process left, if its header has the same layers.

    Raises
    ------
    InvalidInput
        The profile or another recording exists, or nothing can be written there.
    """

    def __init__(
        self, path: str | os.PathLike[str], header: Arrays, *, resume: bool = False
    ) -> None:
        target = check_writable(path)
        if target.exists():
            raise InvalidInput(
                f"{os.fspath(path)} exists; record to another file, or remove it first"
            )
        self.path = journal_path(target)
        mode = os.O_RDWR | os.O_CREAT | (0 if resume else os.O_EXCL)
        try:
            self._file = os.open(self.path, mode, 0o666)
        except FileExistsError:
            raise InvalidInput(
                f"{self.path} is a recording that goes on or was killed; resume it "
                "(resume=True), or convert and remove it"
            ) from None
        except OSError as error:
            raise InvalidInput(f"cannot write {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._end = (
                self._resume(header) if os.fstat(self._file).st_size else self._begin(header)
            )
        except BlockingIOError:
            os.close(self._file)
            raise InvalidInput(
                f"another process records to {self.path}; give each process its own file, or "
                "reduce over ranks"
            ) from None
        except BaseException:
            os.close(self._file)
            raise

    def append(self, arrays: Arrays) -> None:
        """Append a record.

        Raises
        ------
        OSError
            It could not be written, of a full disk for instance. The journal is as it was.
        """
        frame = _encode(arrays)
        try:
            written = 0
            while written < len(frame):
                written += os.pwrite(self._file, frame[written:], self._end + written)
            os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(frame)

    def close(self) -> None:
        """Close the file and let go of it."""
        os.close(self._file)

    def _begin(self, header: Arrays) -> int:
        start = MAGIC + _encode(header)
        try:
            os.pwrite(self._file, start, 0)
            os.fsync(self._file)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise InvalidInput(f"cannot write {self.path}: {error.strerror}") from None
        return len(start)

    def _resume(self, header: Arrays) -> int:
        end = 0
        for behind, record in read_records(self.path):
            if end == 0 and _layout(record) != _layout(header):
                raise InvalidInput(
                    f"{self.path} was recorded from another model (layers or experts differ); "
                    "record to another file"
                )
            end = behind
        if end == 0:
            return self._begin(header)
        os.ftruncate(self._file, end)
        return end


def read_records(
    path: str | os.PathLike[str], start: int = 0
) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """Yield the records of a journal, each with the offset behind it, up to its torn end.

    Parameters
    ----------
    path : path
        The journal.
    start : int
        An offset that was yielded before, to read what was appended since.

    Raises
    ------
    InvalidInput
        It is not a journal.

    Warns
    -----
    UserWarning
        A record amid the others is damaged: what stands behind it is lost.
    """
    with Path(path).open("rb") as stream:
        if start == 0:
            if stream.read(len(MAGIC)) != MAGIC[: os.fstat(stream.fileno()).st_size]:
                raise InvalidInput(f"{os.fspath(path)} is not a journal of a recording")
        else:
            stream.seek(start)
        while (record := _decode(stream, os.fspath(path))) is not None:
            yield stream.tell(), record


def _decode(stream: BinaryIO, name: str) -> dict[str, NDArray[Any]] | None:
    head = stream.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    length, checksum = _FRAME.unpack(head)
    left = os.fstat(stream.fileno()).st_size - stream.tell()
    if length > min(left, MAX_RECORD_BYTES):
        return None
    payload = stream.read(length)
    if zlib.crc32(payload) != checksum:
        if left > length:
            warnings.warn(f"{name}: a record is damaged; windows behind it are lost", stacklevel=2)
        return None
    with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
        return {array: archive[array] for array in archive.files}


def _encode(arrays: Arrays) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **arrays)
    payload = stream.getvalue()
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _layout(header: Arrays) -> dict[str, list[int]]:
    return {name: array.tolist() for name, array in header.items() if array.dtype.kind in "iu"}
