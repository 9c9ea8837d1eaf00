"""Statistics of small samples: plain numbers, no runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Mean, None without values, and sample standard deviation, None for fewer than two values."""

    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class Paired:
    """The mean of n paired differences with its 95% interval, and the two-sided p of Student's paired t-test that it is 0.

    Interval and p are None for fewer than two differences, or if all are equal and their variance cannot be estimated.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p-values of a family of tests adjusted by Holm's step-down (Holm 1979): the chance of any false one below alpha is at most alpha.
    Missing ones stay so and do not count."""
    known = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = highest
    return adjusted


def spread(values: Sequence[float]) -> Spread:
    return Spread(float(np.mean(values)) if values else None, float(np.std(values, ddof=1)) if len(values) > 1 else None)


def paired(differences: Sequence[float]) -> Paired:
    """Student's t with n - 1 degrees of freedom: exact for normal differences, approximate for many differences of any distribution."""
    from scipy import stats  # half a second to import

    mean, n = float(np.mean(differences)), len(differences)
    if n < 2 or np.ptp(differences) == 0:
        return Paired(mean, None, None, None, n)
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    return Paired(mean, float(low), float(high), float(test.pvalue), n)
