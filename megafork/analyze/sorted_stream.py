"""Exact order statistics of more values than fit in memory: the stream is read twice, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import numpy as np

Read = Callable[[], Iterable[np.ndarray]]
"""Returns the stream's parts (fp32, any shape), the same ones on every call."""
_HALF = 16
_BINS = 1 << _HALF


class SortedStream:
    """Order statistics of non-negative fp32 values, whose bits, read as integers, have the same ordering.

    The first pass counts and sums the values by the upper half of their bits, 1 MiB in total. A second pass, for all ranks of a request
    together, counts by the lower half within the bins of these ranks, 256 KiB per bin.
    """

    def __init__(self, read: Read) -> None:
        """Raises ValueError for a value below 0, an infinite one, or NaN."""
        self._read = read
        self._counts = np.zeros(_BINS, dtype=np.int64)
        self._sums = np.zeros(_BINS, dtype=np.float64)
        for values in read():
            bits = _bits(values)
            upper = bits >> _HALF
            self._counts += np.bincount(upper, minlength=_BINS)
            self._sums += np.bincount(upper, weights=bits.view(np.float32), minlength=_BINS)
        self.total = int(self._counts.sum())
        self.sum = float(self._sums.sum())
        self._ends = self._counts.cumsum()

    def at(self, ranks: Sequence[int]) -> np.ndarray:
        """The values at these ranks, 0 being the smallest: fp32, exact. Reads the stream once."""
        bins = np.searchsorted(self._ends, ranks, side="right")
        within = self._within(bins)
        found = [self._find(within[upper], int(upper), rank)[0] for upper, rank in zip(bins, ranks, strict=True)]
        return np.array(found, dtype=np.uint32).view(np.float32)

    def sums_of_largest(self, counts: Sequence[int]) -> list[float]:
        """For each count, the float64 sum of that many largest values. Reads the stream once."""
        ranks = [self.total - count for count in counts]
        inside = [rank for rank in ranks if rank < self.total]
        within = self._within(np.searchsorted(self._ends, inside, side="right"))
        return [self._sum_from(rank, within) if rank < self.total else 0.0 for rank in ranks]

    def percentiles(self, shares: Sequence[float]) -> list[float]:
        """Percentiles with linear interpolation, as by `numpy.percentile`. `shares` in [0, 100]; NaN without values."""
        if not self.total:
            return [math.nan] * len(shares)
        places = [share / 100 * (self.total - 1) for share in shares]
        below, above = [math.floor(place) for place in places], [math.ceil(place) for place in places]
        low, high = np.split(self.at([*below, *above]).astype(np.float64), 2)
        return [float(a + (b - a) * (place - rank)) for a, b, place, rank in zip(low, high, places, below, strict=True)]

    def threshold(self, rho: float) -> float:
        """The value t such that `>= t` selects the largest ceil(rho * total) values (more with ties)."""
        return float(self.at([self.total - kept(rho, self.total)])[0])

    def _within(self, bins: np.ndarray) -> dict[int, np.ndarray]:
        """Counts by the lower half of the bits within each of the bins."""
        wanted = np.unique(bins)
        row_of = np.full(_BINS, -1)
        row_of[wanted] = np.arange(len(wanted))
        counts = np.zeros((len(wanted), _BINS), dtype=np.int32)
        for values in self._read():
            bits = _bits(values)
            rows = row_of[bits >> _HALF]
            bits, rows = bits[rows >= 0], rows[rows >= 0]
            keys, times = np.unique(rows * _BINS + (bits & (_BINS - 1)), return_counts=True)
            counts.reshape(-1)[keys] += times.astype(np.int32)
        return {int(upper): counts[row] for upper, row in zip(wanted, range(len(wanted)), strict=True)}

    def _find(self, within: np.ndarray, upper: int, rank: int) -> tuple[int, int, int]:
        """(bits of the value at a rank, their lower half, number of values in its bin up to and including those equal to it)."""
        ends = within.cumsum()
        lower = int(np.searchsorted(ends, rank - (self._ends[upper] - self._counts[upper]), side="right"))
        return (upper << _HALF) | lower, lower, int(ends[lower])

    def _sum_from(self, rank: int, within: dict[int, np.ndarray]) -> float:
        """Sum of the values at `rank` and above."""
        upper = int(np.searchsorted(self._ends, rank, side="right"))
        counts = within[upper]
        _, lower, up_to = self._find(counts, upper, rank)
        values = ((upper << _HALF) | np.arange(_BINS, dtype=np.uint32)).astype(np.uint32).view(np.float32).astype(np.float64)
        equal = self._ends[upper] - self._counts[upper] + up_to - rank
        larger = float(np.dot(counts[lower + 1 :], values[lower + 1 :])) if lower + 1 < _BINS else 0.0
        return float(self._sums[upper + 1 :].sum()) + larger + float(equal * values[lower])


def kept(rho: float, total: int) -> int:
    """ceil(rho * total) with rho as the decimal number as written: the trainer's count (`parallel.quantile`)."""
    return math.ceil(Fraction(repr(float(rho))) * total)


def _bits(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float32).ravel() + np.float32(0)  # -0.0 becomes 0.0
    if values.size and not (values.min() >= 0 and values.max() < np.inf):
        raise ValueError("values must be finite and not below 0")
    return values.view(np.uint32)
