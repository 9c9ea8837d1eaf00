"""The threshold against a float64 sort: bit-equal for every split of the same values over ranks and micro-batches."""

from __future__ import annotations

import math
from decimal import Decimal
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from measure import Sent
from ranks import on_ranks
from torch import Tensor

from megafork.parallel.quantile import Threshold, percentiles, top_threshold, top_thresholds

SMALLEST = 2.0**-149  # fp32's smallest subnormal
FLOATS = st.floats(width=32, allow_nan=False)
TIED = st.sampled_from(
    [0.0, -0.0, 1.0, SMALLEST, -SMALLEST, 2 * SMALLEST, 2.0**-126, math.inf, -math.inf, 1.0 + 2.0**-23, 3.4028234663852886e38]
)


def by_sorting(values: np.ndarray, fraction: float) -> Threshold:
    descending = np.sort(values.astype(np.float64))[::-1]
    if not len(descending):
        return Threshold(math.inf, 0, 0, 0)
    tau = descending[math.ceil(Decimal(repr(fraction)) * len(descending)) - 1]
    return Threshold(float(tau), int((descending >= tau).sum()), len(descending), int((descending == tau).sum()))


def split(values: list[float], cuts: list[int]) -> list[Tensor]:
    edges = [0, *sorted(cut % (len(values) + 1) for cut in cuts), len(values)]
    return [torch.tensor(values[a:b], dtype=torch.float32) for a, b in pairwise(edges)]


@settings(max_examples=300, deadline=None)
@given(st.lists(FLOATS | TIED, max_size=60), st.floats(1e-9, 1.0), st.lists(st.integers(0, 60), max_size=4))
@example([], 0.2, [])
@example([7.0], 1e-9, [0, 0])
@example([0.3] * 9, 0.5, [4])
@example([0.0, -0.0, -0.0], 0.1, [1])
@example([SMALLEST * i for i in range(9)], 0.3, [2])
def test_equals_a_sort_for_every_split_into_micro_batches(values: list[float], fraction: float, cuts: list[int]) -> None:
    parts = split(values, cuts)
    found = top_threshold(parts, fraction, group=None)
    assert found == by_sorting(np.array(values, dtype=np.float32), fraction)
    assert sum(int((part >= found.tau).sum()) for part in parts) == found.selected


@pytest.mark.parametrize(
    ("fraction", "total", "k"),
    [(0.2, 5, 1), (0.1, 10, 1), (0.07, 100, 7), (0.29, 100, 29), (0.2, 6, 2), (1.0, 7, 7), (1e-12, 7, 1), (0.3, 10, 3), (0.55, 20, 11)],
)
def test_k_is_the_exact_product_not_the_rounded_one(fraction: float, total: int, k: int) -> None:
    assert top_threshold(torch.arange(float(total)), fraction, group=None).selected == k


def test_several_fractions_and_percentiles_in_one_call() -> None:
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0)).exp()
    fractions = [0.2, 0.05, 0.5, 1.0, 0.0001]
    assert top_thresholds(values, fractions, group=None) == [top_threshold(values, f, group=None) for f in fractions]
    ascending = values.double().sort().values
    shares = [0.5, 0.8, 0.95, 1.0, 0.001]
    assert percentiles(values, shares, group=None) == [float(ascending[math.ceil(Decimal(repr(s)) * 1001) - 1]) for s in shares]
    assert all(math.isnan(value) for value in percentiles([], shares, group=None))


def test_a_million_values_pass_in_parts() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.where(torch.rand(1_000_003, generator=generator) < 0.5, 0.01, torch.rand(1_000_003, generator=generator))
    assert top_threshold(values, 0.2, group=None) == by_sorting(values.numpy(), 0.2)
    assert top_threshold(values, 0.7, group=None) == by_sorting(values.numpy(), 0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="float32"):
        top_threshold(torch.ones(3, dtype=dtype), 0.5, group=None)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, math.nan])
def test_fractions_out_of_range_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction is"):
        top_threshold(torch.ones(3), fraction, group=None)


def cases() -> list[tuple[np.ndarray, float, np.ndarray]]:
    """Values, fraction, and the rank (of 4) and micro-batch (of 3) that each value belongs to, the same on every rank."""
    generator = np.random.default_rng(7)
    made = []
    for case in range(60):
        n = int(generator.choice([0, 1, 2, 5, 50, 1000]))
        values = (generator.normal(size=n) * 10.0 ** generator.integers(-44, 38)).astype(np.float32)
        if case % 3 == 0:
            values = generator.choice(np.array([0, -0.0, SMALLEST, 1, np.inf, -np.inf], dtype=np.float32), n)
        ranks = generator.choice(generator.permutation(4)[: generator.integers(1, 5)], n)  # some ranks hold nothing
        made.append((values, float(generator.choice([0.1, 0.2, 0.5, 1.0])), ranks * 3 + generator.integers(0, 3, n)))
    return made


def thresholds_of_my_share() -> list[Threshold]:
    found = []
    for values, fraction, where in cases():
        mine = [torch.tensor(values[where == dist.get_rank() * 3 + micro]) for micro in range(3)]
        found.append(top_threshold([part for part in mine if len(part)], fraction, group=dist.group.WORLD))
    return found


def test_equals_a_sort_for_every_split_over_ranks() -> None:
    with np.errstate(over="ignore"):
        expected = [by_sorting(values, fraction) for values, fraction, _ in cases()]
        for found in on_ranks(4, thresholds_of_my_share):
            assert found == expected


def collectives_of_a_call() -> list[tuple[str, int]]:
    with Sent() as sent:
        top_threshold(torch.rand(100_000), 0.2, group=dist.group.WORLD)
    return sent.calls


def test_three_small_all_reduces_and_nothing_else() -> None:
    for calls in on_ranks(2, collectives_of_a_call):
        assert [name for name, _ in calls] == ["allreduce_"] * 3
        assert sum(size for _, size in calls) < 3 * 2048 * 8 + 100


def message_about_a_nan() -> str:
    group = dist.new_group([1, 2, 3])
    parts = [torch.zeros(5), torch.zeros(4)]
    if dist.get_rank() == 2:
        parts[1][3] = -math.nan
        parts[1][2] = math.nan
    if dist.get_rank() == 3:
        parts = []
    if dist.get_rank() == 0:
        return ""
    with pytest.raises(ValueError) as caught:
        top_threshold(parts, 0.2, group=group)
    return str(caught.value)


def test_a_nan_is_named_on_every_rank() -> None:
    for message in on_ranks(4, message_about_a_nan)[1:]:
        assert "NaN at position 7 of the values of rank 2" in message
