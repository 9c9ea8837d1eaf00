"""Compares the entropies of several models at the same positions: shared forks, and where entropy changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megafork.analyze.sorted_stream import kept


class Overlap:
    """Shared positions among the top rho of M models, over all responses (by the models' thresholds) and within each response.

    The overlap of two sets of positions is 2 |A and B| / (|A| + |B|). Without ties at the thresholds both sets have ceil(rho N) positions,
    and the overlap is the share of one model's forks that are also the other's, as defined in the paper.
    """

    def __init__(self, thresholds: Sequence[float], rho: float) -> None:
        self.rho = rho
        self._thresholds = np.asarray(thresholds, dtype=np.float32)
        size = len(thresholds)
        self._shared = np.zeros((size, size))
        self._response_sum = np.zeros((size, size))
        self.responses = 0

    def add(self, entropies: np.ndarray) -> None:
        """Add a response's entropies, fp32 [M, n], n >= 1."""
        count = entropies.shape[1]
        self._shared += _shared(entropies >= self._thresholds[:, None])
        cut = count - kept(self.rho, count)
        own = np.partition(entropies, cut, axis=1)[:, cut]
        self._response_sum += _share(_shared(entropies >= own[:, None]))
        self.responses += 1

    @property
    def pooled(self) -> np.ndarray:
        """Overlaps [M, M] with one threshold per model."""
        return _share(self._shared)

    @property
    def per_response(self) -> np.ndarray:
        """Overlaps [M, M] averaged over the responses, with separate thresholds for each."""
        return self._response_sum / max(self.responses, 1)


def _shared(masks: np.ndarray) -> np.ndarray:
    """bool [M, n] -> [M, M], the number of positions that each pair has in common; on the diagonal, the number that each has."""
    numbers = masks.astype(np.float64)
    return numbers @ numbers.T


def _share(shared: np.ndarray) -> np.ndarray:
    sizes = np.diag(shared)
    return 2 * shared / np.maximum(sizes[:, None] + sizes[None, :], 1)


class ChangeByBin:
    """Mean change of M models' entropies from the base's, in bins of the base's entropy."""

    def __init__(self, edges: Sequence[float], models: int) -> None:
        """`edges`: inner edges of the bins, ascending; a bin includes its lower edge. Bins between equal edges stay empty."""
        self.edges = np.asarray(edges, dtype=np.float32)
        self.counts = np.zeros(len(edges) + 1, dtype=np.int64)
        self._sums = np.zeros((models, len(edges) + 1))

    def add(self, base: np.ndarray, entropies: np.ndarray) -> None:
        """Add a response's entropies: `base` fp32 [n], `entropies` fp32 [M, n]."""
        bins = np.searchsorted(self.edges, base, side="right")
        self.counts += np.bincount(bins, minlength=len(self.counts))
        change = entropies.astype(np.float64) - base
        for row, values in zip(self._sums, change, strict=True):
            row += np.bincount(bins, weights=values, minlength=len(self.counts))

    def means(self) -> list[list[float | None]]:
        """Mean changes [M][bins] in nats; None for an empty bin."""
        return [[float(s / n) if n else None for s, n in zip(row, self.counts, strict=True)] for row in self._sums]
