"""Keep the replicas of an expert on distinct ranks, at hardly any cost in balance.

Two replicas of one expert on one rank waste a slot: the rank receives both shares. DeepSeek's
packing lets that happen (deepseek-ai/EPLB#22). Here each doubled replica is swapped away, and where
that raised the largest rank load, further swaps with the largest rank bring it back down. On all
recorded loads they do; how often not on loads far more skewed, docs/measured.md says.

Shape letters: X rows, Y the rows at work, S slots, R ranks, K slots of a rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb.arrays import FloatArray, IntArray, take_rows

__all__ = ["spread_replicas"]

# Loads within this fraction are equal: a rank's load is summed in another order after a swap, and
# swaps that win nothing but rounding would go on for ever.
_ROUNDING = 1e-12


def spread_replicas(
    label_XS: IntArray, expert_XS: IntArray, load_XS: FloatArray, num_ranks: int
) -> None:
    """Swap slots, in place, until no rank holds two replicas of one expert.

    Swaps then go on, row by row, until no rank is loaded above what the row's largest was before,
    or no swap with the largest rank helps any more.

    Parameters
    ----------
    label_XS, expert_XS, load_XS : array
        A label, the expert and the load of each slot; all three are swapped alike. No expert has
        more than ``num_ranks`` replicas.
    num_ranks : int
        R.
    """
    doubled_XS = _doubled(expert_XS, num_ranks)
    rows = np.flatnonzero(doubled_XS.any(axis=1))
    if not len(rows):
        return
    slots = _Slots(label_XS[rows], expert_XS[rows], load_XS[rows], num_ranks)
    allowed_Y = slots.rank_load(np.arange(len(rows))).max(axis=1) * (1 + _ROUNDING)
    _separate(slots, doubled_XS[rows])
    # Candidates of a swap with a whole rank, in arrays no larger than a few times the result.
    batch = max(1, 8 * len(expert_XS) // slots.slots_per_rank)
    for start in range(0, len(rows), batch):
        _lower_peaks(slots, np.arange(len(rows))[start : start + batch], allowed_Y, batch)
    label_XS[rows], expert_XS[rows], load_XS[rows] = slots.label, slots.expert, slots.load


class _Slots:
    """The slots of the rows at work."""

    def __init__(
        self, label_YS: IntArray, expert_YS: IntArray, load_YS: FloatArray, num_ranks: int
    ) -> None:
        self.label, self.expert, self.load = label_YS, expert_YS, load_YS
        self.num_ranks = num_ranks
        self.slots_per_rank = expert_YS.shape[1] // num_ranks

    def by_rank(self, values_YS: NDArray[Any]) -> NDArray[Any]:
        return values_YS.reshape(len(values_YS), self.num_ranks, self.slots_per_rank)

    def rank_load(self, rows: IntArray) -> FloatArray:
        load: FloatArray = self.by_rank(self.load[rows]).sum(axis=2)
        return load

    def swap(self, rows: IntArray, slot: IntArray, partner: IntArray) -> None:
        for values in (self.label, self.expert, self.load):
            values[rows, slot], values[rows, partner] = values[rows, partner], values[rows, slot]

    def take(self, rows: IntArray) -> _Slots:
        return _Slots(self.label[rows], self.expert[rows], self.load[rows], self.num_ranks)

    def put(self, row: np.int64, other: _Slots, other_row: int) -> None:
        self.label[row] = other.label[other_row]
        self.expert[row] = other.expert[other_row]
        self.load[row] = other.load[other_row]


def _separate(slots: _Slots, doubled_YS: NDArray[np.bool_]) -> None:
    """Swap doubled replicas away, one a row at a time.

    For a doubled replica on rank r some rank q lacks its expert, which has at most R replicas, two
    of them on r. The swap takes a slot of q whose expert r lacks, or one that is doubled itself, so
    that there are fewer doubled replicas after it. There always is one: else q would hold K
    different experts, all of them on r, which has at most K - 1 and the doubled one among them.
    """
    rows = np.arange(len(doubled_YS))
    while len(rows):
        slot_Y1 = doubled_YS.argmax(axis=1)[:, np.newaxis]
        slot, partner, peak = _best_swap(slots, rows, slot_Y1, doubled_YS)
        assert np.isfinite(peak).all(), "an expert has more replicas than there are ranks"
        slots.swap(rows, slot, partner)
        doubled_YS = _doubled(slots.expert[rows], slots.num_ranks)
        crowded = doubled_YS.any(axis=1)
        rows, doubled_YS = rows[crowded], doubled_YS[crowded]


def _lower_peaks(slots: _Slots, rows: IntArray, allowed_Y: FloatArray, num_tried: int) -> None:
    """Swap with the largest rank while it is above what is allowed and a swap lowers it."""
    while True:
        peak_Y = slots.rank_load(rows).max(axis=1)
        above = peak_Y > allowed_Y[rows]
        if not above.any():
            return
        rows, peak_Y = rows[above], peak_Y[above]
        slot, partner, new_peak = _best_swap(slots, rows, _slots_of_peak(slots, rows))
        better = new_peak < peak_Y * (1 - _ROUNDING)
        slots.swap(rows[better], slot[better], partner[better])
        for at in np.flatnonzero(~better):
            better[at] = _swap_twice(slots, rows[at], peak_Y[at], num_tried)
        rows = rows[better]


def _slots_of_peak(slots: _Slots, rows: IntArray) -> IntArray:
    """Return the slots of the largest rank of each row, shape [Y, K]."""
    rank_Y = slots.rank_load(rows).argmax(axis=1)
    slots_YK: IntArray = rank_Y[:, np.newaxis] * slots.slots_per_rank + np.arange(
        slots.slots_per_rank
    )
    return slots_YK


def _swap_twice(slots: _Slots, row: np.int64, peak: np.float64, num_tried: int) -> bool:
    """Swap the largest rank of a row down, and then the rank that this made the largest.

    Tries the most promising first swaps, applies the best pair if it ends below ``peak``, and
    returns whether it did.
    """
    rows = np.array([row])
    slot_1A = _slots_of_peak(slots, rows)
    peak_AS = _swap_peaks(slots, rows, slot_1A)[0]
    first = np.argsort(peak_AS, axis=None, kind="stable")[:num_tried]
    first = first[np.isfinite(peak_AS.reshape(-1)[first])]
    choice, partner = np.divmod(first, slots.expert.shape[1])
    copies = slots.take(np.full(len(first), row))
    every = np.arange(len(first))
    copies.swap(every, slot_1A[0, choice], partner)
    slot, partner, second_peak = _best_swap(copies, every, _slots_of_peak(copies, every))
    allowed = np.isfinite(second_peak)
    copies.swap(every[allowed], slot[allowed], partner[allowed])
    peak_Y = copies.rank_load(every).max(axis=1)
    if peak_Y.min(initial=np.inf) >= peak * (1 - _ROUNDING):
        return False
    slots.put(row, copies, int(peak_Y.argmin()))
    return True


def _best_swap(
    slots: _Slots,
    rows: IntArray,
    slot_YA: IntArray,
    doubled_YS: NDArray[np.bool_] | None = None,
) -> tuple[IntArray, IntArray, FloatArray]:
    """Return for each row the allowed swap of a slot A that makes the larger of two ranks smallest.

    Returns
    -------
    slot_Y, partner_Y : array of int
        The two slots.
    peak_Y : array of float
        The larger load of both ranks after the swap; infinite where no swap is allowed.
    """
    peak_YAS = _swap_peaks(slots, rows, slot_YA, doubled_YS)
    flat = peak_YAS.reshape(len(rows), peak_YAS.shape[1] * peak_YAS.shape[2])
    best_Y = flat.argmin(axis=1)
    choice_Y, partner_Y = np.divmod(best_Y, peak_YAS.shape[2])
    row_Y = np.arange(len(rows))
    return slot_YA[row_Y, choice_Y], partner_Y, flat[row_Y, best_Y]


def _swap_peaks(
    slots: _Slots,
    rows: IntArray,
    slot_YA: IntArray,
    doubled_YS: NDArray[np.bool_] | None = None,
) -> FloatArray:
    """Return the larger load of both ranks after each swap of a slot A with a slot S.

    The slots A of a row lie on one rank r. A swap with a slot of rank q is allowed if q lacks the
    one expert, and r the other or the slot is doubled; others are infinite. Shape [Y, A, S].
    """
    expert_YS, load_YS = slots.expert[rows], slots.load[rows]
    row_Y = np.arange(len(rows))
    rank_Y = slot_YA[:, 0] // slots.slots_per_rank
    held_YRK = slots.by_rank(expert_YS)
    load_YA = take_rows(load_YS, slot_YA)
    expert_YA = take_rows(expert_YS, slot_YA)

    known_YE = np.zeros((len(rows), int(expert_YS.max(initial=0)) + 1), bool)
    known_YE[row_Y[:, np.newaxis], held_YRK[row_Y, rank_Y]] = True
    known_YS = take_rows(known_YE, expert_YS)
    if doubled_YS is not None:
        known_YS &= ~doubled_YS
    has_YAR = (held_YRK[:, np.newaxis] == expert_YA[:, :, np.newaxis, np.newaxis]).any(axis=3)
    refused_YAS = np.repeat(has_YAR, slots.slots_per_rank, axis=2) | known_YS[:, np.newaxis]
    rank_load_YR = slots.by_rank(load_YS).sum(axis=2)
    change_YAS = load_YS[:, np.newaxis] - load_YA[:, :, np.newaxis]
    peak_YAS: FloatArray = np.maximum(
        rank_load_YR[row_Y, rank_Y][:, np.newaxis, np.newaxis] + change_YAS,
        np.repeat(rank_load_YR, slots.slots_per_rank, axis=1)[:, np.newaxis] - change_YAS,
    )
    peak_YAS[refused_YAS] = np.inf
    return peak_YAS


def _doubled(expert_XS: IntArray, num_ranks: int) -> NDArray[np.bool_]:
    """Return the slots whose expert an earlier slot of the same rank holds, shape [X, S]."""
    slot_S = np.arange(expert_XS.shape[1])
    rank_S = slot_S // (len(slot_S) // num_ranks)
    # Sorted by expert, rank and slot, 21 bits each: all but the first of a rank are doubled.
    key_XS = (expert_XS << 42) | (rank_S << 21 | slot_S)
    key_XS.sort(axis=1)
    row, at = np.nonzero((key_XS[:, 1:] ^ key_XS[:, :-1]) < 1 << 21)
    doubled_XS = np.zeros(expert_XS.shape, bool)
    doubled_XS[row, key_XS[row, at + 1] & ((1 << 21) - 1)] = True
    return doubled_XS
