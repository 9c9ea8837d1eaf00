"""Which tokens are forks: one exact entropy threshold, the same for every parallel layout (arXiv 2506.01939)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.parallel.quantile import top_threshold
from megafork.recipe import Forks
from megafork.rl.batch import MicroBatch

Group = dist.ProcessGroup | None
NEAR = 0.01
"""Share of tau within which an entropy counts as near it: rounding in bf16 may put such a token on either side."""


@dataclass(frozen=True)
class ForkGroups:
    """Groups that tokens are spread over: `tokens` (DP x CP) for a batch, `context` (CP) for a micro-batch or response. None: this rank."""

    tokens: Group = None
    context: Group = None


@dataclass(frozen=True)
class Selection:
    """What a threshold selected, counted over all ranks."""

    tau: float
    """Nats. The mean if there are many thresholds; NaN if entropies are not compared."""
    selected: int
    total: int
    ties: int
    """Tokens whose entropy equals tau."""
    near: int
    """Tokens whose entropy is within `NEAR` of tau."""


def select_forks(micros: list[MicroBatch], forks: Forks, groups: ForkGroups, *, seed: int, step: int) -> Selection:
    """Set `mask` of every micro-batch of a batch or mini-batch (`forks.scope`).

    Every rank of `groups.tokens` on the last pipeline stage must call with its micro-batches, all with equally many. No gradient.
    """
    if forks.select == "all":
        for micro in micros:
            micro.mask = torch.ones_like(micro.positions, dtype=torch.bool)
        return _selection(micros, math.nan, groups.tokens)
    keys = [_key(micro, forks.select, seed, step) for micro in micros]
    match forks.scope:
        case "batch" | "minibatch":
            threshold = top_threshold(keys, forks.top_entropy_quantile, group=groups.tokens)
            for micro, key in zip(micros, keys, strict=True):
                micro.mask = key >= threshold.tau
            return _selection(micros, _entropy(threshold.tau, forks.select), groups.tokens, ties=threshold.ties)
        case "fixed":
            assert forks.threshold is not None
            for micro in micros:
                micro.mask = micro.entropy >= forks.threshold if forks.select == "top" else micro.entropy <= forks.threshold
            return _selection(micros, forks.threshold, groups.tokens)
        case "microbatch" | "sequence":
            return _many_thresholds(micros, keys, forks, groups)


def _many_thresholds(micros: list[MicroBatch], keys: list[Tensor], forks: Forks, groups: ForkGroups) -> Selection:
    """Select with a separate threshold for each micro-batch (as the official code does) or each response."""
    taus = []
    for micro, key in zip(micros, keys, strict=True):
        micro.mask = torch.zeros_like(key, dtype=torch.bool)
        parts = range(len(micro.responses)) if forks.scope == "sequence" else [None]
        for part in parts:
            members = torch.ones_like(micro.mask) if part is None else micro.sequence == part
            threshold = top_threshold(key[members], forks.top_entropy_quantile, group=groups.context)
            micro.mask |= members & (key >= threshold.tau)
            if threshold.total:
                taus.append(_entropy(threshold.tau, forks.select))
    sums = _all_sum(torch.tensor([math.fsum(taus), len(taus)], dtype=torch.float64), groups.tokens)
    return _selection(micros, float(sums[0] / sums[1]) if sums[1] else math.nan, groups.tokens)


def _key(micro: MicroBatch, select: str, seed: int, step: int) -> Tensor:
    """fp32 [P]; the selected share has the highest keys."""
    if select == "bottom":
        return -micro.entropy
    if select == "random":
        return _uniform(micro, seed, step)
    return micro.entropy


def _entropy(tau: float, select: str) -> float:
    return {"top": tau, "bottom": -tau, "random": math.nan}[select]


def _uniform(micro: MicroBatch, seed: int, step: int) -> Tensor:
    """A number in [0, 1) per token that depends only on (seed, step, group, sample, offset): the same choice for every layout.

    Mixed with splitmix64's finaliser.
    """
    names = torch.tensor([[r.group, r.sample] for r in micro.responses] or [[0, 0]], dtype=torch.int64, device=micro.offset.device)
    mixed = _mix(torch.full_like(micro.offset, seed) ^ (step << 32))
    for part in (names[micro.sequence, 0], names[micro.sequence, 1], micro.offset):
        mixed = _mix(mixed + part)
    return (mixed >> 40 & 0xFFFFFF).float() / (1 << 24)


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _selection(micros: list[MicroBatch], tau: float, group: Group, *, ties: int = 0) -> Selection:
    selected = sum(int(micro.mask.sum()) for micro in micros)
    total = sum(micro.mask.numel() for micro in micros)
    near = sum(int(((micro.entropy - tau).abs() <= NEAR * tau).sum()) for micro in micros)  # none if tau is NaN
    sums = _all_sum(torch.tensor([selected, total, near], dtype=torch.int64), group)
    return Selection(tau, int(sums[0]), int(sums[1]), ties, int(sums[2]))


def _all_sum(values: Tensor, group: Group) -> Tensor:
    if group is not None:
        dist.all_reduce(values, group=group)
    return values
