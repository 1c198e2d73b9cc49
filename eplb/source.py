"""Files as readers get them: found, not empty, and with every parser error made an InvalidInput."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from eplb.errors import EplbError, InvalidInput

__all__ = ["JOURNAL_SUFFIX", "Source", "journal_path", "open_source", "parsing"]

JOURNAL_SUFFIX = ".journal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file to read, and the array of it that was asked for.

    Parameters
    ----------
    path : Path
    array : str, optional
        The part behind the colon of ``file.npz:array``.
    name : str
        Short name, for messages and scenarios.
    """

    path: Path
    array: str | None
    name: str

    @property
    def suffix(self) -> str:
        """The suffix that tells the format, in lower case."""
        return self.path.suffix.lower()


def journal_path(path: str | os.PathLike[str]) -> Path:
    """Return where the recording that will become the profile ``path`` is, while it goes on."""
    return Path(os.fspath(path) + JOURNAL_SUFFIX)


def open_source(spec: str | os.PathLike[str], *, folder: bool = False) -> Source:
    """Find the file that ``spec`` names, or with ``folder`` the folder if it is one.

    Raises
    ------
    InvalidInput
        It is missing, empty, not a regular file, or not readable.
    """
    text = os.fspath(spec)
    path, array = Path(text), None
    try:
        if not path.exists() and ":" in text:
            head, _, tail = text.rpartition(":")
            if head.lower().endswith((".npz", JOURNAL_SUFFIX)):
                path, array = Path(head), tail
        if path.is_dir() and folder:
            return Source(path=path, array=None, name=path.resolve().name)
        if path.is_dir():
            raise InvalidInput(f"{text} is a directory; name a profile file")
        if path.exists() and not path.is_file():
            # A pipe would be waited for, and can be read only once.
            raise InvalidInput(f"{text} is not a regular file; save it as one")
        name = path.name if array is None else f"{path.name}:{array}"
        # While a recording goes on, and after it was killed, its journal has all there is.
        if journal_path(path).exists():
            path = journal_path(path)
        with path.open("rb") as stream:
            if not stream.read(1):
                raise InvalidInput(f"{text} is empty; record again")
    except EplbError:
        raise
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"cannot read {text}: {getattr(error, 'strerror', None) or error}"
        ) from None
    # Bytes of a name that are not UTF-8 are lone surrogates in Python, which no file can hold.
    name = name.encode(errors="backslashreplace").decode()
    return Source(path=path, array=array, name=name)


@contextmanager
def parsing(source: Source, what: str) -> Iterator[None]:
    """Turn whatever a parser raises on bad bytes into one line; its warnings say no more."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except EplbError:
        raise
    except MemoryError:
        raise InvalidInput(
            f"{source.name} asks for more memory than there is; it is damaged or too large"
        ) from None
    except Exception as error:  # noqa: BLE001
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InvalidInput(
            f"{source.name} is not a readable {what}: {reason}; record or convert it again"
        ) from None
