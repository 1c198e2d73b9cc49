"""Journals as profiles: read one as it stands, or turn a finished one into an ``.npz``.

The journal itself is in :mod:`eplb.profiles.journal`. Turning one into an archive reads it twice
and holds one window at a time, so that a recording may be longer than memory.
Shape letters: W windows, L layers, E logical experts.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from eplb.errors import InvalidInput
from eplb.files import writing
from eplb.load_profile import LoadProfile
from eplb.profiles.journal import read_records
from eplb.source import Source, parsing

__all__ = ["LABELS", "export_journal", "read_journal"]

# Arrays with one entry a window and phase; everything else of a window is an option.
LABELS = ("phase", "scenario", "steps", "time_s", "tokens")
Record = dict[str, NDArray[Any]]


def read_journal(source: Source) -> LoadProfile:
    """Read the windows that a recording has appended so far.

    Raises
    ------
    InvalidInput
        There are none, or the file is not a journal.
    """
    header, windows = _open(source.path)
    with parsing(source, "journal"):
        records = list(windows)
        name = source.array or "counts"
        if not records:
            raise InvalidInput(f"{source.name} has no window yet; wait for the first one to close")
        if name not in records[0]:
            raise InvalidInput(
                f"{source.name} has no array {name!r}; it has {', '.join(sorted(records[0]))}"
            )
        return LoadProfile.from_counts(
            np.concatenate([record[name] for record in records]),
            layer_ids=header[_ids_of(name)].tolist(),
            metadata=json.loads(str(header["metadata"])),
            source=source.name,
            **{
                label: np.concatenate([record[label] for record in records]).tolist()
                for label in ("scenario", "phase", "tokens", "time_s")
            },
        )


def export_journal(journal: Path, output: Path) -> int:
    """Write what a journal holds as ``.npz``, atomically.

    Returns
    -------
    num_windows : int
        Windows written; with none there is no file.

    Raises
    ------
    InvalidInput
        The journal or the output cannot be used; nothing was written.
    """
    header, windows = _open(journal)
    small: dict[str, list[NDArray[Any]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    most: dict[str, int] = {}
    for record in windows:
        for name, array in record.items():
            if name in LABELS:
                small.setdefault(name, []).append(array)
                continue
            known = shapes.get(name, (0, *array.shape[1:]))
            shapes[name] = (known[0] + len(array), *known[1:])
            most[name] = max(most.get(name, 0), int(array.max(initial=0)))
    if not shapes:
        return 0
    with writing(output) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in header.items():
            _add(archive, name, array.shape, array.dtype, iter([array]))
        for name, parts in small.items():
            joined = np.concatenate(parts)
            _add(archive, name, joined.shape, joined.dtype, iter([joined]))
        for name, shape in shapes.items():
            # Routings keep their sign: -1 marks what was not routed.
            dtype = np.dtype(np.int16) if name == "routings" else np.min_scalar_type(most[name])
            chunks = (record[name] for record in _open(journal)[1] if name in record)
            _add(archive, name, shape, dtype, chunks)
    return shapes["counts"][0]


def _open(path: Path) -> tuple[Record, Iterator[Record]]:
    records = (record for _, record in read_records(path))
    header = next(records, None)
    if header is None:
        raise InvalidInput(f"{path} has no header; the recording was killed at its start")
    return header, records


def _ids_of(name: str) -> str:
    return "mtp_layer_ids" if name.startswith("mtp_") else "layer_ids"


def _add(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: Iterator[NDArray[Any]],
) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        _write_header(member, shape, dtype)
        for chunk in chunks:
            member.write(np.ascontiguousarray(chunk, dtype).tobytes())


def _write_header(member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    description = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(member, description)
