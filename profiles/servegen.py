"""Traces sampled from ServeGen's published statistics of production clients.

ServeGen (arXiv 2505.09999) describes each client by its request rate in every ten minutes, the
variability of its inter-arrival times and the distributions of its input and output lengths. Real
requests were not published; what is made here is a sample with those statistics.
Shape letters: Q requests.
"""

from __future__ import annotations

import csv
import gzip
import io
from os import PathLike
from pathlib import Path

import numpy as np

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput
from eplb.profiles.request_trace import RequestTrace
from eplb.source import open_source, parsing

__all__ = ["sample_servegen"]

WINDOW_S = 600.0


def sample_servegen(
    folder: str | PathLike[str],
    *,
    start_s: float = 36_000.0,
    duration_s: float = 1200.0,
    seed: int = 0,
) -> RequestTrace:
    """Sample a stretch of a day from ``client_rates.csv.gz`` and ``length_pmfs.npz`` of a folder.

    Inter-arrival times are drawn from the Gamma or Weibull distribution fitted to the client and
    window, scaled to its rate; lengths from the client's distributions of the quarter of the day.

    Raises
    ------
    InvalidInput
        Files are missing or not as described, or nothing arrives in that stretch.
    """  # fmt: skip
    rates = open_source(Path(folder) / "client_rates.csv.gz")
    pmfs = open_source(Path(folder) / "length_pmfs.npz")
    rng = np.random.default_rng([seed, 6])
    with parsing(rates, "table of client rates"):
        text = gzip.decompress(rates.path.read_bytes()).decode()
        windows = [
            row
            for row in csv.DictReader(io.StringIO(text))
            if start_s <= float(row["window_start_s"]) < start_s + duration_s
            and float(row["rate_rps"]) > 0
        ]
        arrivals = [_arrivals(row, rng) for row in windows]
    with parsing(pmfs, "table of length distributions"), np.load(pmfs.path) as tables:
        table = {name: tables[name] for name in tables.files}
    prompts, outputs = [], []
    for row, times in zip(windows, arrivals, strict=True):
        client, at = int(row["client"]), float(row["window_start_s"])
        prompts.append(_lengths(table, "input_tokens", client, at, len(times), rng))
        outputs.append(_lengths(table, "output_tokens", client, at, len(times), rng))
    if not sum(map(len, arrivals)):
        raise InvalidInput(
            f"no request arrives from {start_s} to {start_s + duration_s} s; choose another "
            "stretch of the day"
        )
    arrival_Q = np.concatenate(arrivals)
    order = np.argsort(arrival_Q, kind="stable")
    return RequestTrace(
        arrival_s_Q=arrival_Q[order] - arrival_Q.min(),
        prompt_tokens_Q=np.concatenate(prompts)[order],
        output_tokens_Q=np.concatenate(outputs)[order],
        source=f"{Path(folder).name}, sampled with seed {seed}",
        notes=("a sample from published statistics, not recorded requests",),
    )


def _arrivals(row: dict[str, str], rng: np.random.Generator) -> FloatArray:
    """Return the arrivals of one client in one window."""
    rate, start_s = float(row["rate_rps"]), float(row["window_start_s"])
    count = int(rate * WINDOW_S * 1.5 + 50)
    if row["pattern"] == "Weibull" and float(row["p1"]) > 0:
        gaps = rng.weibull(float(row["p1"]), count)
    else:
        # A Gamma distribution of that coefficient of variation.
        cv = min(max(float(row["cv"]), 0.05), 20.0)
        gaps = rng.gamma(1 / cv**2, cv**2, count)
    mean = gaps.mean()
    times = np.cumsum(gaps) / (mean if mean > 0 else 1.0) / rate
    times += rng.uniform(0, 1 / rate)
    return start_s + times[times < WINDOW_S]


def _lengths(
    table: dict[str, np.ndarray], name: str, client: int, at_s: float, count: int,
    rng: np.random.Generator,
) -> IntArray:  # fmt: skip
    """Return lengths of one client at a time of day, at least 1 token each."""
    mine = table[f"{name}_client"] == client
    windows = np.unique(table[f"{name}_window"][mine])
    if not len(windows):
        raise InvalidInput(f"client {client} has no distribution of {name}")
    window = windows[max(0, int(np.searchsorted(windows, at_s, side="right")) - 1)]
    rows = mine & (table[f"{name}_window"] == window)
    weight = table[f"{name}_prob"][rows].astype(np.float64)
    lengths = table[f"{name}_len"][rows].astype(np.int64)
    return np.maximum(1, rng.choice(lengths, count, p=weight / weight.sum()))
