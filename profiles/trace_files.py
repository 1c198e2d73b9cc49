"""Request traces from files: plain and Azure csv, Mooncake jsonl.

Lines that cannot be read are left out, counted and reported with their numbers; a file with too
many of them is refused.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Iterator
from datetime import datetime
from os import PathLike

import numpy as np

from eplb.errors import InvalidInput
from eplb.profiles.request_trace import MAX_TOKENS, RequestTrace
from eplb.source import Source, open_source, parsing
from eplb.strict_json import parse_json

__all__ = ["read_trace"]

# Bad lines that are put up with: this part of all, and this many in a small file.
MAX_BAD_PART, MAX_BAD_LINES = 0.01, 5
REPORTED = 5
# One request: arrival in seconds, prompt and output tokens, prefix blocks.
Row = tuple[float, int, int, list[int]]

# Column names by what they hold, in lower case: the plain layout, and that of
# Azure/AzurePublicDataset (AzureLLMInferenceTrace_*.csv).
COLUMNS = {
    "arrival_s": "arrival", "timestamp": "arrival",
    "prompt_tokens": "prompt", "contexttokens": "prompt",
    "output_tokens": "output", "generatedtokens": "output",
}  # fmt: skip


def read_trace(spec: str | PathLike[str], *, max_bad_lines: int | None = None) -> RequestTrace:
    """Read a trace: ``.csv`` (plain or Azure's), ``.jsonl`` (Mooncake's), each also with ``.gz``.

    Parameters
    ----------
    spec : path
    max_bad_lines : int, optional
        Unreadable lines that are left out; the default is one in a hundred, or 5 in a small file.

    Raises
    ------
    InvalidInput
        Not a trace, or too many unreadable lines.
    """
    source = open_source(spec)
    name = source.name.lower().removesuffix(".gz")
    if not name.endswith((".csv", ".jsonl")):
        raise InvalidInput(
            f"{source.name} is not a request trace; give .csv (arrival_s, prompt_tokens, "
            "output_tokens) or Mooncake's .jsonl"
        )
    with parsing(source, "request trace"):
        data = source.path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
        rows = _csv_rows(text, source) if name.endswith(".csv") else _jsonl_rows(text)
        return _trace(rows, source, max_bad_lines)


def _trace(
    rows: Iterator[tuple[int, Callable[[], Row]]], source: Source, max_bad_lines: int | None
) -> RequestTrace:
    good: list[Row] = []
    bad: list[str] = []
    for number, parse in rows:
        try:
            good.append(parse())
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            reason = " ".join(str(error).split())[:80] or type(error).__name__
            bad.append(f"line {number} ({reason})")
    allowed = max_bad_lines
    if allowed is None:
        allowed = max(MAX_BAD_LINES, int(MAX_BAD_PART * len(good)))
    listed = ", ".join(bad[:REPORTED]) + (" and others" if len(bad) > REPORTED else "")
    if len(bad) > allowed or not good:
        raise InvalidInput(
            f"{source.name}: {len(bad)} of {len(bad) + len(good)} lines are not requests: "
            f"{listed or 'there are none'}; at most {allowed} are left out (--max-bad-lines)"
        )
    notes = [f"{len(bad)} unreadable lines left out: {listed}"] if bad else []
    arrival = np.array([row[0] for row in good])
    back = int((np.diff(arrival) < 0).sum())
    if back:
        notes.append(f"the clock goes back {back} times; requests put in order of arrival")
    order = np.argsort(arrival, kind="stable")
    blocks = [good[i][3] for i in order]
    return RequestTrace(
        arrival_s_Q=arrival[order] - arrival.min(),
        prompt_tokens_Q=np.array([good[i][1] for i in order]),
        output_tokens_Q=np.array([good[i][2] for i in order]),
        first_block_Q=np.cumsum([0, *map(len, blocks)]),
        block_B=np.array([block for row in blocks for block in row], np.int64),
        source=source.name,
        notes=tuple(notes),
    )


def _csv_rows(text: str, source: Source) -> Iterator[tuple[int, Callable[[], Row]]]:
    table = csv.reader(io.StringIO(text, newline=""))
    header = [cell.strip().lower() for cell in next(table, [])]
    at = {COLUMNS[name]: i for i, name in enumerate(header) if name in COLUMNS}
    missing = {"arrival", "prompt", "output"} - at.keys()
    if missing:
        raise InvalidInput(
            f"{source.name} has the columns {', '.join(header)[:80]}; a trace needs arrival_s, "
            "prompt_tokens and output_tokens in its first line"
        )

    def parser(cells: list[str]) -> Callable[[], Row]:
        return lambda: (
            _seconds(cells[at["arrival"]]),
            _tokens(cells[at["prompt"]]),
            _tokens(cells[at["output"]]),
            [],
        )

    for cells in table:
        if any(cell.strip() for cell in cells):
            yield table.line_num, parser(cells)


def _jsonl_rows(text: str) -> Iterator[tuple[int, Callable[[], Row]]]:
    """Mooncake's traces: ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``."""

    def parser(line: str) -> Callable[[], Row]:
        def parse() -> Row:
            row = parse_json(line)
            blocks = row.get("hash_ids", [])
            if not all(type(block) is int and abs(block) < 1 << 62 for block in blocks):
                raise ValueError("hash_ids must be whole numbers")
            return (
                _seconds(str(row["timestamp"])) / 1e3,
                _tokens(str(row["input_length"])),
                _tokens(str(row["output_length"])),
                blocks,
            )

        return parse

    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, parser(line)


def _seconds(text: str) -> float:
    """Return seconds; Azure's files have dates with seven digits of a second."""
    try:
        value = float(text)
    except ValueError:
        value = datetime.fromisoformat(text.strip()).timestamp()
    if not abs(value) < 1e15:
        raise ValueError(f"arrival {text.strip()[:20]!r} is not a time")
    return value


def _tokens(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_TOKENS:
        raise ValueError(f"{value} tokens")
    return value
