"""Takes a long recording apart: into scenarios, and into few windows that stand for all.

Pure functions over arrays and profiles. A window is described by the parts of its load that each
expert of each layer gets; windows whose parts are alike are one kind of traffic, however many
tokens they have. Distances are total variation, as drift is (:func:`eplb.profiles.summary.drift`).
Shape letters: W windows, L layers, E logical experts, C clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray
from eplb.errors import InvalidInput
from eplb.load_profile import LoadProfile, replace_windows

__all__ = [
    "Representatives",
    "cluster_windows",
    "keep_representatives",
    "representatives",
    "split_by_cluster",
    "split_by_phase",
    "split_by_time",
]

DAY_S, HOUR_S = 86400.0, 3600.0
MAX_ROUNDS = 50
# Random projections keep distances to about 10% (Johnson and Lindenstrauss) at a cost that does
# not depend on the number of experts.
PROJECTED = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Representatives:
    """Windows that stand for a recording.

    Parameters
    ----------
    windows : tuple of int
        Indices of the windows chosen, rising.
    share : tuple of float
        The part of all windows that each of them stands for; adds up to 1.
    drift_mean, drift_worst : float
        Drift from a window to the one that stands for it: mean, and largest.
    """

    windows: tuple[int, ...]
    share: tuple[float, ...]
    drift_mean: float
    drift_worst: float


def split_by_phase(profile: LoadProfile) -> LoadProfile:
    """Name each window's scenario after its phase: ``day/decode``, or ``decode`` alone."""
    return _renamed(profile, list(profile.phase_W))


def split_by_time(profile: LoadProfile, hours: int, utc_offset_hours: float = 0.0) -> LoadProfile:
    """Name scenarios after parts of the day, ``00h-06h`` for six hours.

    Parameters
    ----------
    profile : LoadProfile
        With ``time_s``, seconds since 1970 as the recorder writes them.
    hours : int
        Length of a part; divides 24.
    utc_offset_hours : float
        Of the clock that the day is told by.

    Raises
    ------
    InvalidInput
        The profile has no times, or the parts do not make a day.
    """
    if profile.time_s_W is None:
        raise InvalidInput(f"{profile.source} has no time_s; split it by phase or by cluster")
    if hours < 1 or 24 % hours:
        raise InvalidInput(f"hours ({hours}) must divide 24; use 1, 2, 3, 4, 6, 8, 12 or 24")
    of_day = (profile.time_s_W + utc_offset_hours * HOUR_S) % DAY_S
    part = (of_day // (hours * HOUR_S)).astype(int) * hours
    return _renamed(profile, [f"{start:02d}h-{start + hours:02d}h" for start in part])


def split_by_cluster(profile: LoadProfile, num_clusters: int, seed: int = 0) -> LoadProfile:
    """Name scenarios after clusters of windows with similar loads, the largest one first.

    Raises
    ------
    InvalidInput
        More clusters than windows.
    """
    cluster_W = cluster_windows(profile.counts_WLE, num_clusters, seed)
    return _renamed(profile, [f"cluster-{c + 1}" for c in cluster_W])


def cluster_windows(counts_WLE: FloatArray, num_clusters: int, seed: int = 0) -> IntArray:
    """Return the cluster of each window, 0 being the largest.

    k-means on the square roots of load parts (their Euclidean distance is Hellinger's, which
    bounds total variation from both sides), from k-means++ starts (Arthur and Vassilvitskii,
    2007).

    Parameters
    ----------
    counts_WLE : array, shape [W, L, E]
    num_clusters : int
        At least 1 and at most W.
    seed : int
        Same seed, same clusters.
    """
    num_windows = len(counts_WLE)
    if not 1 <= num_clusters <= num_windows:
        raise InvalidInput(
            f"the number of clusters ({num_clusters}) must be within 1 and the {num_windows} "
            "windows there are"
        )
    random = np.random.default_rng(seed)
    points_WD = _projected(np.sqrt(_parts(counts_WLE)).reshape(num_windows, -1), random)
    centres_CD = points_WD[_spread_out(points_WD, num_clusters, random)]
    cluster_W = np.zeros(num_windows, np.int64)
    for _ in range(MAX_ROUNDS):
        nearest_W = _squared(points_WD, centres_CD).argmin(axis=1)
        # A cluster that lost all of its windows takes the one farthest from its centre.
        for empty in sorted(set(range(num_clusters)) - set(nearest_W.tolist())):
            away_W = ((points_WD - centres_CD[nearest_W]) ** 2).sum(axis=1)
            away_W[np.bincount(nearest_W, minlength=num_clusters)[nearest_W] == 1] = -1
            nearest_W[away_W.argmax()] = empty
        if np.array_equal(nearest_W, cluster_W):
            break
        cluster_W = nearest_W
        centres_CD = np.stack([points_WD[cluster_W == c].mean(axis=0) for c in range(num_clusters)])
    by_size = np.argsort(-np.bincount(cluster_W, minlength=num_clusters), kind="stable")
    place = np.empty(num_clusters, np.int64)
    place[by_size] = np.arange(num_clusters)
    found: IntArray = place[cluster_W]
    return found


def representatives(counts_WLE: FloatArray, number: int, seed: int = 0) -> Representatives:
    """Choose windows that stand for all, one a cluster: that with the least drift to the others.

    Raises
    ------
    InvalidInput
        More of them than windows.
    """
    cluster_W = cluster_windows(counts_WLE, number, seed)
    parts_WLE = _parts(counts_WLE)
    chosen: list[tuple[int, float]] = []
    drift_W = np.zeros(len(counts_WLE))
    for cluster in range(number):
        members = np.flatnonzero(cluster_W == cluster)
        centre_LE = parts_WLE[members].mean(axis=0)
        away = _drift(parts_WLE[members], centre_LE)
        medoid = int(members[away.argmin()])
        drift_W[members] = _drift(parts_WLE[members], parts_WLE[medoid])
        chosen.append((medoid, len(members) / len(counts_WLE)))
    chosen.sort()
    return Representatives(
        windows=tuple(window for window, _ in chosen),
        share=tuple(share for _, share in chosen),
        drift_mean=float(drift_W.mean()),
        drift_worst=float(drift_W.max()),
    )


def keep_representatives(
    profile: LoadProfile, number: int, seed: int = 0
) -> tuple[LoadProfile, dict[str, Representatives]]:
    """Return a profile of at most ``number`` windows a scenario, and what they stand for.

    Of the whole recording, window indices and all; the profile's metadata has the shares too.
    """
    scenario_W = np.array(profile.scenario_W)
    chosen: dict[str, Representatives] = {}
    for name in profile.scenarios:
        members = np.flatnonzero(scenario_W == name)
        some = representatives(profile.counts_WLE[members], min(number, len(members)), seed)
        chosen[name] = replace(some, windows=tuple(int(members[w]) for w in some.windows))
    mask = np.isin(np.arange(profile.num_windows), [w for c in chosen.values() for w in c.windows])
    shares = {name: list(some.share) for name, some in chosen.items()}
    kept = replace_windows(profile, mask)
    return replace(kept, metadata={**kept.metadata, "stand_for": shares}), chosen


def _renamed(profile: LoadProfile, names: list[str]) -> LoadProfile:
    if set(profile.scenario_W) == {"default"}:
        scenarios = tuple(names)
    else:
        pairs = zip(profile.scenario_W, names, strict=True)
        scenarios = tuple(f"{scenario}/{name}" for scenario, name in pairs)
    return replace(profile, scenario_W=scenarios)


def _parts(counts_WLE: FloatArray) -> FloatArray:
    """Return the part of a layer's load on each expert; zeros for a layer without load."""
    total_WL1 = counts_WLE.sum(axis=2, keepdims=True)
    parts: FloatArray = np.divide(
        counts_WLE, total_WL1, out=np.zeros(counts_WLE.shape), where=total_WL1 > 0
    )
    return parts


def _drift(parts_WLE: FloatArray, other_LE: FloatArray) -> FloatArray:
    away: FloatArray = np.abs(parts_WLE - other_LE).sum(axis=2).mean(axis=1) / 2
    return away


def _projected(points_WD: FloatArray, random: np.random.Generator) -> FloatArray:
    if points_WD.shape[1] <= PROJECTED:
        return points_WD
    directions = random.standard_normal((points_WD.shape[1], PROJECTED))
    projected: FloatArray = points_WD @ directions / math.sqrt(PROJECTED)
    return projected


def _spread_out(
    points_WD: FloatArray, number: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Choose starts far from each other, at random: k-means++."""
    chosen = [int(random.integers(len(points_WD)))]
    nearest_W = ((points_WD - points_WD[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < number:
        nearest_W[chosen] = 0
        total = nearest_W.sum()
        free = np.setdiff1d(np.arange(len(points_WD)), chosen)
        following = (
            int(random.choice(len(points_WD), p=nearest_W / total)) if total > 0 else int(free[0])
        )
        chosen.append(following)
        nearest_W = np.minimum(nearest_W, ((points_WD - points_WD[following]) ** 2).sum(axis=1))
    return np.array(chosen)


def _squared(points_WD: FloatArray, centres_CD: FloatArray) -> FloatArray:
    squared: FloatArray = (
        (points_WD**2).sum(axis=1)[:, np.newaxis]
        - 2 * points_WD @ centres_CD.T
        + (centres_CD**2).sum(axis=1)
    )
    return squared
