"""Statistics of token entropies: the printed summary, and the counts behind the histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def entropy_summary(entropies: Sequence[float] | np.ndarray) -> dict[str, float | int | None]:
    """Summary of token entropies in nats, any shape; statistics are None when there are no tokens.

    Keys: `tokens`, `mean`, `p50`, `p80`, `p95` (linear interpolation), and `under_0.01`, `under_0.05`, the shares of tokens strictly
    below 0.01 and 0.05 nats (the paper reports 50.64% below 0.01 and an 80th percentile of 0.672). Raises ValueError for NaN.
    """
    values = np.asarray(entropies, dtype=np.float64).ravel()
    if np.isnan(values).any():
        raise ValueError(f"entropy {int(np.flatnonzero(np.isnan(values))[0])} of {values.size} is NaN")
    names = ("mean", "p50", "p80", "p95", "under_0.01", "under_0.05")
    if not values.size:
        return {"tokens": 0, **dict.fromkeys(names)}
    p50, p80, p95 = (float(p) for p in np.percentile(values, (50, 80, 95)))
    shares = (float((values < 0.01).mean()), float((values < 0.05).mean()))
    return {"tokens": values.size, **dict(zip(names, (float(values.mean()), p50, p80, p95, *shares), strict=True))}


@dataclass(frozen=True)
class Histogram:
    """Token counts by entropy: bin i covers [edges[i], edges[i + 1]), and the last bin also its upper edge."""

    edges: list[float]
    counts: list[int]
    selected: list[int]


def histogram_edges(top: float, *, tau: float | None = None, bins: int = 40) -> np.ndarray:
    """Edges of about `bins` equal bins from 0 to `top`, the largest entropy, or just above it; one edge is `tau` if given."""
    top = top if top > 0 else 1.0
    width, below = top / bins, 0
    if tau is not None and width < tau <= top:
        below = round(tau / width)
        width = tau / below
    edges = width * np.arange(math.ceil(top / width - 1e-6) + 1)
    edges[-1] = max(edges[-1], top)
    if tau is not None and below and below < len(edges) - 1:
        edges[below] = tau  # exactly: tau is a token's entropy, and the token belongs above the edge
    return edges


def entropy_histogram(entropies: np.ndarray, mask: np.ndarray, *, tau: float | None = None, bins: int = 40) -> Histogram:
    """Counts of all tokens and of the selected ones in about `bins` equal bins from 0 to the largest entropy or just above it.

    `mask` is bool, same shape. `tau`, if given, is an edge, so that no bin has tokens from both sides of it.
    """
    edges = histogram_edges(float(entropies.max()) if entropies.size else 0.0, tau=tau, bins=bins)
    counts, _ = np.histogram(entropies, edges)
    selected, _ = np.histogram(entropies[mask], edges)
    return Histogram(edges.tolist(), counts.tolist(), selected.tolist())
