"""Read a profile by what its file name says it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from eplb.engines import omni, tensorrt_llm_statistics, vllm
from eplb.engines.sglang_dump import read_json, read_pt
from eplb.errors import InvalidInput, unknown_name
from eplb.load_profile import LoadProfile, merge_profiles
from eplb.profiles.csv_file import read_csv
from eplb.profiles.journal_file import read_journal
from eplb.profiles.numpy_file import read_npy, read_npz
from eplb.source import Source, open_source

__all__ = ["READERS", "read_profile", "read_profiles"]

READERS: dict[str, Callable[[Source], LoadProfile]] = {
    ".csv": read_csv,
    ".journal": read_journal,
    ".json": read_json,
    ".jsonl": vllm.read_statistics,
    ".npy": read_npy,
    ".npz": read_npz,
    ".pt": read_pt,
}


def read_profile(spec: str | os.PathLike[str]) -> LoadProfile:
    """Read expert loads from a file.

    Parameters
    ----------
    spec : path
        ``.npz`` (an array of it as ``file.npz:array``; also of a recording that goes on or was
        killed, which lies in ``.npz.journal``), ``.npy``, ``.csv``, a dump of SGLang's expert
        distribution recorder (``.json``, ``.pt``), load statistics of vLLM (``.jsonl``), or a
        folder of statistics of TensorRT-LLM or Omni-placement.

    Raises
    ------
    InvalidInput
        The file cannot be read or holds no loads.
    """
    source = open_source(spec, folder=True)
    if source.path.is_dir():
        return _read_folder(source)
    if source.suffix not in READERS:
        raise unknown_name(f"profile format of {source.name}:", source.suffix, READERS)
    return READERS[source.suffix](source)


def _read_folder(source: Source) -> LoadProfile:
    """Read the recording of an engine that writes many files."""
    if (source.path / tensorrt_llm_statistics.META).is_file():
        return tensorrt_llm_statistics.read_statistics(source)
    if any(source.path.glob("activation_counts_recordstep_*")):
        return omni.read_statistics(source)
    raise InvalidInput(
        f"{source.name} is a directory; name a profile file, or a folder with "
        f"{tensorrt_llm_statistics.META} (TensorRT-LLM) or activation_counts_recordstep_* "
        "(Omni-placement)"
    )


def read_profiles(specs: Iterable[str | os.PathLike[str]]) -> LoadProfile:
    """Read several profiles of one model as scenarios of one.

    Raises
    ------
    InvalidInput
        One cannot be read, or they are not of one model.
    """
    return merge_profiles(read_profile(spec) for spec in specs)
