"""Follows a recording: figures of each window as it is appended.

Shape letters: L layers, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eplb.arrays import FloatArray
from eplb.errors import InvalidInput
from eplb.profiles.journal import read_records
from eplb.profiles.read import read_profile
from eplb.profiles.summary import drift
from eplb.source import JOURNAL_SUFFIX, journal_path

__all__ = ["Follower", "WindowFigures"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowFigures:
    """One window of one phase.

    Parameters
    ----------
    phase, scenario : str
    tokens : float, optional
    time_s : float, optional
        When it began.
    max_over_mean : float
        Load of the hottest expert over the mean, mean over layers.
    worst_layer : int
        Id of the layer where it is largest.
    hottest : tuple of (expert, part of the load)
        Of that layer.
    drift : float, optional
        From the window before of this phase; None for the first.
    """

    phase: str
    scenario: str
    tokens: float | None
    time_s: float | None
    max_over_mean: float
    worst_layer: int
    hottest: tuple[tuple[int, float], ...]
    drift: float | None


class Follower:
    """Reads what was appended to a recording since the last look.

    Parameters
    ----------
    path : path
        The profile: of a recording that goes on, or a finished one.

    Raises
    ------
    InvalidInput
        There is neither.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._journal = path if path.suffix == JOURNAL_SUFFIX else journal_path(path)
        self._offset = 0
        self._layer_ids: tuple[int, ...] = ()
        self._last: dict[str, FloatArray] = {}
        self._finished = not self._journal.exists()
        if self._finished and not path.exists():
            raise InvalidInput(f"{path} does not exist, nor is it being recorded; check the path")

    def is_finished(self) -> bool:
        """Return whether the recording was closed."""
        return self._finished

    def poll(self) -> list[WindowFigures]:
        """Return the windows that are new.

        Raises
        ------
        InvalidInput
            The file is no recording.
        """
        if self._finished:
            return self._read_whole() if self._offset == 0 else []
        found = []
        try:
            for end, record in read_records(self._journal, self._offset):
                if self._offset == 0:
                    self._layer_ids = tuple(record["layer_ids"].tolist())
                else:
                    labels = zip(record["phase"], record["scenario"], strict=True)
                    for i, (phase, scenario) in enumerate(labels):
                        tokens = record["tokens"][i] if "tokens" in record else None
                        counts_LE = record["counts"][i].astype(np.float64)
                        found.append(
                            self._figures(
                                counts_LE, str(phase), str(scenario), tokens, record["time_s"][i]
                            )
                        )
                self._offset = end
        except FileNotFoundError:
            # Closed since the last look: all windows are in the profile now.
            self._finished = True
            return self._read_whole() if self._offset == 0 else []
        return found

    def _read_whole(self) -> list[WindowFigures]:
        profile = read_profile(self._path)
        self._layer_ids, self._offset = profile.layer_ids, 1
        return [
            self._figures(
                profile.counts_WLE[w],
                profile.phase_W[w],
                profile.scenario_W[w],
                None if profile.tokens_W is None else profile.tokens_W[w],
                None if profile.time_s_W is None else profile.time_s_W[w],
            )
            for w in range(profile.num_windows)
        ]

    def _figures(
        self,
        counts_LE: FloatArray,
        phase: str,
        scenario: str,
        tokens: float | None,
        time_s: float | None,
    ) -> WindowFigures:
        mean_L = counts_LE.mean(axis=1)
        skew_L = np.divide(
            counts_LE.max(axis=1), mean_L, out=np.ones(len(mean_L)), where=mean_L > 0
        )
        worst = int(skew_L.argmax())
        total = max(counts_LE[worst].sum(), 1.0)
        hottest = np.argsort(-counts_LE[worst], kind="stable")[:3]
        before = self._last.get(phase)
        self._last[phase] = counts_LE
        return WindowFigures(
            phase=phase,
            scenario=scenario,
            tokens=None if tokens is None else float(tokens),
            time_s=None if time_s is None else float(time_s),
            max_over_mean=float(skew_L[mean_L > 0].mean()),
            worst_layer=self._layer_ids[worst],
            hottest=tuple((int(e), float(counts_LE[worst, e] / total)) for e in hottest),
            drift=None if before is None else drift(before, counts_LE),
        )
