"""What a few numbers say of the quantity behind them: plain numbers, no runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation: None of no values, and of fewer than two."""

    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class Paired:
    """A mean of n paired differences with its 95% interval, and the two-sided p of Student's paired t-test that it is 0.

    None: of fewer than two, or where all are the same and nothing can be said of how far they scatter.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int


def spread(values: Sequence[float]) -> Spread:
    return Spread(float(np.mean(values)) if values else None, float(np.std(values, ddof=1)) if len(values) > 1 else None)


def paired(differences: Sequence[float]) -> Paired:
    """Student's t on n - 1 degrees of freedom: exact for normal differences however few, and near it for many of any kind."""
    from scipy import stats  # half a second to import

    mean, n = float(np.mean(differences)), len(differences)
    if n < 2 or np.ptp(differences) == 0:
        return Paired(mean, None, None, None, n)
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    return Paired(mean, float(low), float(high), float(test.pvalue), n)
