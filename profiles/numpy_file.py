"""``.npz`` profiles and bare arrays, read without unpickling anything."""

from __future__ import annotations

import json
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb.errors import InvalidInput, unknown_name
from eplb.load_profile import LoadProfile
from eplb.source import Source, parsing

__all__ = ["Members", "read_npy", "read_npz"]

# Members are read whole. This is several times the largest profile worth recording.
MAX_MEMBER_BYTES = 16 << 30


class Members:
    """The arrays of an ``.npz`` archive, read one by one when asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source
        with parsing(source, ".npz archive"), zipfile.ZipFile(source.path) as archive:
            self._infos = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
        if not self._infos:
            raise InvalidInput(f"{source.name} holds no arrays; save counts with numpy.savez")

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return sorted(self._infos)

    def read(self, name: str) -> NDArray[Any]:
        """Read an array.

        Raises
        ------
        InvalidInput
            It cannot be read, or would have to be unpickled.
        """
        if self._infos[name].file_size > MAX_MEMBER_BYTES:
            raise InvalidInput(
                f"{self._source.name}: array {name!r} claims {self._infos[name].file_size} bytes; "
                "split the recording"
            )
        with (
            parsing(self._source, ".npz archive"),
            zipfile.ZipFile(self._source.path) as archive,
            archive.open(self._infos[name]) as stream,
        ):
            array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
            # An archive's checksum is only compared once a member was read to its end.
            if stream.read(1):
                raise InvalidInput(
                    f"{self._source.name}: array {name!r} is longer than its header says"
                )
            return array

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of numeric arrays of two or three dimensions."""
        found = {}
        with parsing(self._source, ".npz archive"), zipfile.ZipFile(self._source.path) as archive:
            for name, info in self._infos.items():
                with archive.open(info) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }.get(version)
                    if read is None:
                        continue
                    shape, _, dtype = read(stream)
                if len(shape) in (2, 3) and dtype.kind in "uifb":
                    found[name] = shape
        return found


def read_npz(source: Source) -> LoadProfile:
    """Read the profile file of this project, or one named array of any ``.npz``."""
    members = Members(source)
    if source.array is not None and source.array not in members:
        raise unknown_name(f"array in {source.path.name}:", source.array, members.names)
    if source.array is not None and source.array != "counts":
        # The recorder keeps layers of multi-token prediction apart: mtp_counts, mtp_layer_ids.
        ids = f"{source.array.removesuffix('counts')}layer_ids"
        named = ids != "layer_ids" and source.array.endswith("counts") and ids in members
        return LoadProfile.from_counts(
            members.read(source.array),
            layer_ids=_whole(members.read(ids), source) if named else None,
            source=source.name,
        )
    if "counts" not in members:
        shapes = members.shapes()
        if not shapes:
            raise InvalidInput(
                f"{source.name} has no array 'counts', nor any other of two or three dimensions"
            )
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:8])
        raise InvalidInput(
            f"{source.name} has no array 'counts'; name one as {source.path.name}:"
            f"{next(iter(shapes))} (it has {listed}{', ...' if len(shapes) > 8 else ''})"
        )

    def optional(name: str) -> NDArray[Any] | None:
        return members.read(name) if name in members else None

    with parsing(source, "profile"):
        layer_ids = optional("layer_ids")
        return LoadProfile.from_counts(
            members.read("counts"),
            layer_ids=None if layer_ids is None else _whole(layer_ids, source),
            scenario=_labels(optional("scenario"), "default", "scenario", source),
            phase=_labels(optional("phase"), "mixed", "phase", source),
            tokens=_numbers(optional("tokens"), "tokens", source),
            time_s=_numbers(optional("time_s"), "time_s", source),
            metadata=_metadata(optional("metadata"), source),
            source=source.name,
        )


def read_npy(source: Source) -> LoadProfile:
    """Read counts ``[L, E]`` or ``[W, L, E]``."""
    with parsing(source, ".npy array"):
        counts = np.lib.format.open_memmap(source.path, mode="r")
        return LoadProfile.from_counts(counts, source=source.name)


def _whole(layer_ids: NDArray[Any], source: Source) -> list[int]:
    if layer_ids.ndim != 1 or layer_ids.dtype.kind not in "iu":
        raise InvalidInput(f"{source.name}: layer_ids must be whole numbers, one a layer")
    ids: list[int] = layer_ids.tolist()
    return ids


def _labels(array: NDArray[Any] | None, default: str, name: str, source: Source) -> Any:
    if array is None:
        return default
    if array.dtype.kind not in "US" or array.ndim > 1:
        raise InvalidInput(f"{source.name}: {name} must be text, one for all windows or one each")
    texts = array.astype(np.str_)
    return str(texts) if array.ndim == 0 else texts.tolist()


def _numbers(array: NDArray[Any] | None, name: str, source: Source) -> NDArray[Any] | None:
    if array is not None and array.dtype.kind not in "uif":
        raise InvalidInput(f"{source.name}: {name} must be numbers, got {array.dtype}")
    return array


def _metadata(array: NDArray[Any] | None, source: Source) -> dict[str, Any]:
    if array is None:
        return {}
    text = array.tobytes().decode() if array.dtype.kind in "uS" else str(array)
    if array.ndim and array.dtype.kind == "U":
        text = "".join(array.ravel().tolist())
    try:
        metadata = json.loads(text.rstrip("\0"))
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise InvalidInput(f"{source.name}: metadata must be the text of a JSON object")
    return metadata
