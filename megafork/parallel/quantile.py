"""Exact order statistics of float32 values spread over ranks and micro-batches: no gather, no sort, no limit on their number.

Each float32 maps to an integer key with the same ordering. Three passes find the key of the k-th largest value, 11 + 11 + 10 bits at a
time: each pass histograms the next bits of the values that share the bits found so far, and one all-reduce of the counts (16 KiB per
statistic) combines the ranks. Counts are integers, so the result is bit-identical on every rank and for every split of the values.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

_SHIFTS = (21, 10, 0)
_BINS = 2048
_AT_ONCE_CPU, _AT_ONCE_GPU = 1 << 18, 1 << 22  # values per pass: keeps temporaries in the CPU's cache, or small on a GPU


@dataclass(frozen=True)
class Threshold:
    """The k-th largest of `total` values. `tau` compares exactly with the float32 values: `values >= tau` are `selected`."""

    tau: float
    selected: int
    """Values >= tau; more than k where values tie at tau."""
    total: int
    ties: int
    """Values equal to tau."""


def top_threshold(values: Tensor | Sequence[Tensor], fraction: float, *, group: dist.ProcessGroup | None) -> Threshold:
    """The threshold that keeps the largest `fraction` of all values: their k-th largest, k = ceil(fraction * total).

    values: float32, any shape, a tensor or a list of them (micro-batches); a rank may hold none. fraction: in (0, 1], interpreted
    as the decimal number written, so 0.07 of 100 values is 7. With no values on any rank, tau is +inf and nothing is selected.
    Infinities are values; -0.0 equals 0.0. group: the ranks that hold the values; None means this rank alone.

    Collective: every rank of the group must call, with the same fraction; three all-reduces of 16 KiB.
    Raises on every rank: ValueError for a NaN, naming its rank and position (in the rank's values, flattened in order).
    Raises locally, before any communication: TypeError for another dtype, ValueError for a fraction out of range.
    """
    return top_thresholds(values, [fraction], group=group)[0]


def top_thresholds(values: Tensor | Sequence[Tensor], fractions: Sequence[float], *, group: dist.ProcessGroup | None) -> list[Threshold]:
    """`top_threshold` for several fractions in the same three passes and all-reduces (16 KiB per fraction)."""
    exact = [_exact(fraction) for fraction in fractions]
    return _kth_largest(values, lambda total: [math.ceil(fraction * total) for fraction in exact], group)


def percentiles(values: Tensor | Sequence[Tensor], shares: Sequence[float], *, group: dist.ProcessGroup | None) -> list[float]:
    """For each share, the smallest value that at least this share of all values does not exceed (0.5: the lower median).

    Always an observed value, never interpolated; NaN without values. Collective behaviour and errors as for `top_threshold`.
    """
    exact = [_exact(share) for share in shares]
    found = _kth_largest(values, lambda total: [total - math.ceil(share * total) + 1 for share in exact], group)
    return [threshold.tau if threshold.total else math.nan for threshold in found]


def _exact(fraction: float) -> Fraction:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}: give a number above 0 and at most 1")
    return Fraction(repr(float(fraction)))


def _kth_largest(
    values: Tensor | Sequence[Tensor], ranks_of: Callable[[int], list[int]], group: dist.ProcessGroup | None
) -> list[Threshold]:
    """The order statistics of the ranks `ranks_of(total)`, 1 being the largest value."""
    tensors = _checked(values)
    device = tensors[0].device if tensors else torch.device("cpu")
    top = torch.zeros(1, _BINS, dtype=torch.int64, device=device)
    for keys in _keys(tensors):
        _count(top[0], (keys >> _SHIFTS[0]) + _BINS // 2)
    histograms = _sum_and_refuse_nan(top, tensors, group)

    total = sum(histograms[0])
    ranks = ranks_of(total)
    if total == 0:
        return [Threshold(math.inf, 0, 0, 0) for _ in ranks]
    found = [_descend(histograms[0], rank) for rank in ranks]
    prefixes, left = [digit - _BINS // 2 for digit, _ in found], [rank for _, rank in found]
    for above, shift in pairwise(_SHIFTS):
        counts = torch.zeros(len(ranks), _BINS, dtype=torch.int64, device=device)
        for keys in _keys(tensors):
            digits = (keys >> shift) & ((1 << (above - shift)) - 1)
            for count, prefix in zip(counts, prefixes, strict=True):
                _count(count, digits, (keys >> above) == prefix)
        histograms = _sum(counts, group)
        found = [_descend(histogram, rank) for histogram, rank in zip(histograms, left, strict=True)]
        prefixes = [(prefix << (above - shift)) + digit for prefix, (digit, _) in zip(prefixes, found, strict=True)]
        left = [rank for _, rank in found]
    ties = [histogram[digit] for histogram, (digit, _) in zip(histograms, found, strict=True)]
    return [
        Threshold(_value(key), rank - remaining + tied, total, tied)
        for key, rank, remaining, tied in zip(prefixes, ranks, left, ties, strict=True)
    ]


def _checked(values: Tensor | Sequence[Tensor]) -> list[Tensor]:
    tensors = [values] if isinstance(values, Tensor) else list(values)
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            raise TypeError(f"values are {tensor.dtype}: give float32, whose bits the search counts")
    return [tensor.detach().reshape(-1) for tensor in tensors]


def _parts(tensors: list[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        yield from tensor.split(_AT_ONCE_GPU if tensor.is_cuda else _AT_ONCE_CPU)


def _keys(tensors: list[Tensor]) -> Iterator[Tensor]:
    """int32 keys with the floats' ordering, one part at a time. Adding 0.0 makes -0.0 equal to 0.0."""
    for part in _parts(tensors):
        bits = (part + 0.0).view(torch.int32)
        yield bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _count(counts: Tensor, digits: Tensor, among: Tensor | None = None) -> None:
    """Add to `counts` [_BINS] how many of the digits, restricted to `among`, have each value. On CUDA without waiting for the device,
    unlike indexing by a mask and `bincount`."""
    if digits.is_cuda:
        counts.scatter_add_(0, digits.long(), torch.ones_like(digits, dtype=torch.int64) if among is None else among.long())
    else:
        counts += torch.bincount(digits if among is None else digits[among], minlength=_BINS)


def _value(key: int) -> float:
    """The float with this key: the inverse of `_keys`."""
    bits = key if key >= 0 else key ^ 0x7FFFFFFF
    return struct.unpack("<f", struct.pack("<i", bits))[0]


def _descend(histogram: list[int], rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest value, and that value's rank within the bin."""
    for digit in range(_BINS - 1, -1, -1):
        if rank <= histogram[digit]:
            return digit, rank
        rank -= histogram[digit]
    raise AssertionError("a rank beyond the number of values")


def _sum_and_refuse_nan(counts: Tensor, tensors: list[Tensor], group: dist.ProcessGroup | None) -> list[list[int]]:
    """`_sum`, with each rank's first NaN in the same message, so that all ranks raise together."""
    size, own = (1, 0) if group is None else (group.size(), group.rank())
    first = torch.zeros(1, size, dtype=torch.int64, device=counts.device)
    first[0, own] = _first_nan(tensors, counts.device)
    summed = _sum(torch.cat([counts, first], 1), group)[0]
    for rank, position in enumerate(summed[_BINS:]):
        if position:
            name = rank if group is None else dist.get_global_rank(group, rank)
            raise ValueError(f"NaN at position {position - 1} of the values of rank {name}: a threshold needs numbers")
    return [summed[:_BINS]]


def _first_nan(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Position of the first NaN in the concatenated tensors, counted from 1; 0 if there is none. int64, found without waiting for CUDA."""
    first, offset = torch.zeros((), dtype=torch.int64, device=device), 0
    for part in _parts(tensors):
        nan = part.isnan()
        if len(part) and (part.is_cuda or nan.any()):
            here = torch.where(nan.any(), nan.to(torch.uint8).argmax() + offset + 1, 0)
            first = torch.where(first > 0, first, here)
        offset += len(part)
    return first


def _sum(counts: Tensor, group: dist.ProcessGroup | None) -> list[list[int]]:
    if group is None:
        return counts.tolist()
    on_gpu = "nccl" in dist.get_backend(group)  # the backend's device, which need not be that of the values
    counts = counts.to(torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu")
    dist.all_reduce(counts, group=group)
    return counts.tolist()
