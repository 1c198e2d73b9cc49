"""Writing files so that a crash leaves the old one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from eplb.errors import EplbError, InvalidInput

__all__ = ["check_writable", "write_atomic", "writing"]


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Return the file that ``path`` leads to, after making sure that it can be written.

    Asked before long work, so that an unwritable output is found first.

    Raises
    ------
    InvalidInput
        The folder is missing or not writable, or the path is not a regular file.
    """
    try:
        target = Path(os.path.realpath(path))
        target.exists()
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot write {os.fspath(path)!r}: {_reason(error)}") from None
    if not target.parent.is_dir():
        raise InvalidInput(
            f"cannot write {os.fspath(path)}: the folder {target.parent} does not exist; create "
            "it first"
        )
    if target.exists() and not target.is_file():
        raise InvalidInput(f"cannot write {os.fspath(path)}: it is not a regular file; name a file")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InvalidInput(
            f"cannot write {os.fspath(path)}: no permission in {target.parent}; choose another "
            "folder"
        )
    return target


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` as a whole: readers see the old file or the new one.

    Raises
    ------
    InvalidInput
        The file cannot be written; nothing was changed.
    """
    with writing(path) as stream:
        stream.write(data)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Give a stream whose contents replace ``path`` as a whole when the block ends well.

    Raises
    ------
    InvalidInput
        The file cannot be written; nothing was changed.
    """
    target = check_writable(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:40]}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                yield stream
                stream.flush()
                os.fchmod(stream.fileno(), _mode_for(target))
                os.fsync(stream.fileno())
            Path(name).replace(target)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
    except EplbError:
        raise
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"cannot write {os.fspath(path)}: {_reason(error)}; choose another place"
        ) from None


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _mode_for(target: Path) -> int:
    """Return the mode of the file replaced, or what the process gives new files."""
    if target.exists():
        return target.stat().st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
