"""``.csv`` profiles: a row a layer, a column an expert, and labels before them where wanted.

Without a header the rows are the layers in order. With one, its first columns may be ``scenario``,
``phase``, ``window`` and ``layer``, and the remaining ones are experts. Omni-placement's statistics
(rows ``layer_3``, columns ``ep_0`` and so on) read as that with an unnamed layer column. Lines that
start with ``#`` before all others are remarks.
"""

from __future__ import annotations

import csv
import io
from itertools import dropwhile

import numpy as np

from eplb.arrays import FloatArray
from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile
from eplb.source import Source, parsing

__all__ = ["LABELS", "read_csv", "to_csv"]

LABELS = ("scenario", "phase", "window", "layer")


def read_csv(source: Source) -> LoadProfile:
    """Read loads from a table."""
    with parsing(source, "table"):
        text = source.path.read_text(encoding="utf-8-sig")
        lines = [
            (number, cells)
            for number, cells in enumerate(csv.reader(io.StringIO(text, newline="")), start=1)
            if any(cell.strip() for cell in cells)
        ]
        lines = list(dropwhile(lambda line: line[1][0].lstrip().startswith("#"), lines))
        if not lines:
            raise InvalidInput(f"{source.name} has no rows; give one a layer")
        labels: list[str] = []
        if _is_header(lines[0][1]):
            labels = _header_labels(lines[0][1], source)
            lines = lines[1:]
        return _profile(lines, labels, source)


def _profile(lines: list[tuple[int, list[str]]], labels: list[str], source: Source) -> LoadProfile:
    if not lines:
        raise InvalidInput(f"{source.name} has a header and no rows; give one a layer")
    width = len(lines[0][1])
    for number, cells in lines:
        if len(cells) != width:
            raise InvalidInput(
                f"{source.name}, line {number}: {len(cells)} cells where line {lines[0][0]} has "
                f"{width}; give every row one cell an expert"
            )
    first = len(labels)
    values = _numbers(lines, first, source)
    column = {name: [cells[i].strip() for _, cells in lines] for i, name in enumerate(labels)}
    layers = [_layer_id(text, source) for text in column.get("layer", [])] or None
    if "window" not in column:
        if layers is None:
            return LoadProfile.from_counts(values, source=source.name)
        if len(set(layers)) != len(layers):
            raise InvalidInput(
                f"{source.name} names a layer twice; add a column 'window' before the experts"
            )
    windows = list(dict.fromkeys(column.get("window", ["0"])))
    at = {name: i for i, name in enumerate(windows)}
    window = [at[name] for name in column.get("window", ["0"] * len(lines))]
    if layers is None:
        seen = [0] * len(windows)
        layers = []
        for w in window:
            layers.append(seen[w])
            seen[w] += 1
    ids = sorted(set(layers))
    place = {layer_id: i for i, layer_id in enumerate(ids)}
    if len(lines) != len(windows) * len(ids) or len(set(zip(window, layers, strict=True))) != len(
        lines
    ):
        raise InvalidInput(
            f"{source.name}: every window must name each of the {len(ids)} layers once; "
            f"{len(windows)} windows have {len(lines)} rows"
        )
    counts = np.empty((len(windows), len(ids), values.shape[1]))
    counts[window, [place[layer_id] for layer_id in layers]] = values
    start = [window.index(w) for w in range(len(windows))]

    def labels_of(name: str, default: str) -> list[str] | str:
        return [column[name][row] for row in start] if name in column else default

    return LoadProfile.from_counts(
        counts,
        layer_ids=ids,
        scenario=labels_of("scenario", "default"),
        phase=labels_of("phase", "mixed"),
        source=source.name,
    )


def _is_header(cells: list[str]) -> bool:
    """Return whether a first line names columns: a label comes first, or nothing is a number.

    A number that is damaged or missing does not make a header of the loads beside it. Behind an
    unnamed column, experts may be numbered from 0 on.
    """
    if cells[0].strip().lower() in LABELS or not any(map(_is_number, cells)):
        return True
    return not cells[0].strip() and cells[1:] == [str(i) for i in range(len(cells) - 1)]


def _header_labels(header: list[str], source: Source) -> list[str]:
    labels = []
    for cell in header:
        name = cell.strip().lower() or "layer"
        if name not in LABELS:
            break
        if name in labels:
            raise InvalidInput(f"{source.name}: the header names {name!r} twice")
        labels.append(name)
    if len(labels) == len(header):
        raise InvalidInput(f"{source.name}: the header names no expert columns")
    return labels


def _numbers(lines: list[tuple[int, list[str]]], first: int, source: Source) -> FloatArray:
    try:
        return np.array([cells[first:] for _, cells in lines], dtype=np.str_).astype(np.float64)
    except ValueError:
        for number, cells in lines:
            for cell in cells[first:]:
                if not _is_number(cell):
                    raise InvalidInput(
                        f"{source.name}, line {number}: {cell[:40]!r} is not a number; loads are "
                        f"counts of tokens (label columns are {', '.join(LABELS)})"
                    ) from None
        raise


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _layer_id(text: str, source: Source) -> int:
    digits = text.lower().removeprefix("layer_")
    if not digits.isdecimal() or len(digits) > 9:
        raise InvalidInput(f"{source.name}: {text[:40]!r} is not a layer id such as 3 or layer_3")
    return int(digits)


def to_csv(profile: LoadProfile) -> bytes:
    """Return a profile as a table with all label columns."""
    stream = io.StringIO(newline="")
    table = csv.writer(stream, lineterminator="\n")
    table.writerow([*LABELS, *range(profile.num_experts)])
    for w in range(profile.num_windows):
        for layer, layer_id in enumerate(profile.layer_ids):
            counts = profile.counts_WLE[w, layer].tolist()
            cells = [int(c) if c.is_integer() else repr(c) for c in counts]
            table.writerow([profile.scenario_W[w], profile.phase_W[w], w, layer_id, *cells])
    return stream.getvalue().encode()
