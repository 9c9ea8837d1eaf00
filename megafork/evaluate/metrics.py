"""avg@k, pass@k and maj@k of sampled answers, with confidence intervals over the choice of problems. Plain numbers, no model."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95% interval."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of one value per problem, with the percentile bootstrap's 95% interval from 10,000 resamplings of the problems.

    The seed is fixed, so the same values give the same interval, and two metrics of the same problems are resampled alike. If all problems
    have the same value the interval has zero width, which means little if they are few.
    """
    array = np.asarray(values, dtype=np.float64)
    times_drawn = np.random.default_rng(_SEED).multinomial(len(array), np.full(len(array), 1 / len(array)), size=_RESAMPLES)
    low, high = np.percentile(times_drawn @ array / len(array), [2.5, 97.5])
    return Estimate(float(array.mean()), float(low), float(high))


def pass_at(accuracies: Sequence[float], k: int) -> float:
    """Expected best of k of a problem's n samples, drawn without replacement. For accuracies of 0 and 1 this is the unbiased pass@k,
    1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, eq. 1). Needs 1 <= k <= n."""
    n = len(accuracies)
    best = sum(accuracy * math.comb(place, k - 1) for place, accuracy in enumerate(sorted(accuracies)) if place >= k - 1)
    return best / math.comb(n, k)


def majority_at(accuracies: Sequence[float], votes: Sequence[int | None], k: int) -> float:
    """Expected accuracy of the most frequent answer among k of a problem's n samples, drawn without replacement. Exact.

    `votes`: the number of the answer that each sample gave; samples without one (None) do not vote. Ties are broken at random; an answer's
    accuracy is the mean over the samples that gave it; without any vote it is 0. Needs 1 <= k <= n.
    """
    sizes = Counter(vote for vote in votes if vote is not None)
    right = {vote: sum(a for a, other in zip(accuracies, votes, strict=True) if other == vote) / size for vote, size in sizes.items()}
    classes = [(size, right[vote]) for vote, size in sizes.items()]
    silent = len(votes) - sum(sizes.values())
    total = sum(_won_with(top, classes, silent, k) for top in range(1, min(k, max(sizes.values(), default=0)) + 1))
    return total / math.comb(len(votes), k)


def _won_with(top: int, classes: Sequence[tuple[int, float]], silent: int, k: int) -> float:
    """Sum, over the subsets of k samples whose most frequent answers have `top` votes, of the winner's expected accuracy.

    Built up answer by answer: `ways[drawn, tied]` counts the choices that took `drawn` samples and left `tied` answers with `top` votes;
    `gain` is the sum of the tied answers' accuracies over these choices.
    """
    ways: dict[tuple[int, int], int] = {(drawn, 0): math.comb(silent, drawn) for drawn in range(min(silent, k) + 1)}
    gain: dict[tuple[int, int], float] = dict.fromkeys(ways, 0.0)
    for size, accuracy in classes:
        more_ways: defaultdict[tuple[int, int], int] = defaultdict(int)
        more_gain: defaultdict[tuple[int, int], float] = defaultdict(float)
        for (drawn, tied), count in ways.items():
            for taken in range(min(size, top, k - drawn) + 1):
                key, choices = (drawn + taken, tied + (taken == top)), math.comb(size, taken)
                more_ways[key] += count * choices
                more_gain[key] += (gain[drawn, tied] + (accuracy * count if taken == top else 0.0)) * choices
        ways, gain = more_ways, more_gain
    return sum(value / tied for (drawn, tied), value in gain.items() if drawn == k and tied)
