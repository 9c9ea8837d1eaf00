"""Which tokens learn: a rule (`rules.py`) and one exact threshold, the same for every parallel layout (arXiv 2506.01939)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.parallel.quantile import top_threshold
from megafork.parallel.reduce import all_sum
from megafork.recipe import Forks
from megafork.rl import draws, prefix
from megafork.rl.batch import MicroBatch
from megafork.rl.rules import Candidates, rule_named

Group = dist.ProcessGroup | None
NEAR = 0.01
"""Share of tau within which an entropy counts as near it: rounding in bf16 may put such a token on either side."""
_SIGNS = {"top": 1.0, "bottom": -1.0}
"""Of the entropy in the score; other scores are no entropies."""
_rule = cache(rule_named)  # a user's file is imported once, not at each step


@dataclass(frozen=True)
class ForkGroups:
    """Groups that tokens are spread over: `tokens` (DP x CP) for a batch, `context` (CP) for a micro-batch or response. None: this rank."""

    tokens: Group = None
    context: Group = None


@dataclass(frozen=True)
class Selection:
    """What a rule selected, counted over all ranks."""

    tau: float
    """Nats. The mean if there are many thresholds; NaN if entropies are not compared."""
    selected: int
    total: int
    """All response tokens, also those that `select: prefix` cuts off."""
    ties: int
    """Tokens whose score equals the threshold."""
    near: int
    """Tokens whose entropy is within `NEAR` of tau."""


def select_forks(micros: list[MicroBatch], forks: Forks, groups: ForkGroups, *, seed: int, step: int) -> Selection:
    """Set `fork`, `mask` and `emphasis` of every micro-batch of a batch or mini-batch (`forks.scope`).

    Every rank of `groups.tokens` on the last pipeline stage must call with its micro-batches, all with equally many. No gradient.
    """
    known = [_candidates(micro, seed, step) for micro in micros]
    if forks.scope in ("microbatch", "sequence"):
        found = [_many_thresholds(micro, tokens, forks, groups.context) for micro, tokens in zip(micros, known, strict=True)]
        taus = [tau for _, some in found for tau in some]
        sums = all_sum(torch.tensor([math.fsum(taus), len(taus)], dtype=torch.float64), groups.tokens)
        tau, ties = float(sums[0] / sums[1]) if sums[1] else math.nan, 0
        odds = [part for part, _ in found]
    else:
        chosen = _choose(Candidates.joined(known), forks, groups.tokens)
        tau, ties = chosen.tau, chosen.ties
        odds = list(chosen.odds.split([len(micro.positions) for micro in micros]))
    for micro, part in zip(micros, odds, strict=True):
        _apply(micro, part, forks)
    return _selection(micros, tau, groups, ties=ties)


@dataclass(frozen=True)
class _Chosen:
    odds: Tensor
    """fp32 [N]: 0 for a token that is not selected, else the inverse of the share that is."""
    tau: float
    """Nats; NaN if entropies are not compared."""
    ties: int = 0
    empty: bool = False
    """No rank holds a token."""


def _many_thresholds(micro: MicroBatch, tokens: Candidates, forks: Forks, context: Group) -> tuple[Tensor, list[float]]:
    """Odds and taus of a micro-batch with a threshold of its own (as the official code does), or one for each response."""
    if forks.scope == "microbatch":
        chosen = _choose(tokens, forks, context)
        return chosen.odds, [] if chosen.empty else [chosen.tau]
    odds, taus = torch.zeros_like(tokens.entropy), []
    for number in range(len(micro.responses)):
        members = (micro.sequence == number).nonzero()[:, 0]
        chosen = _choose(tokens.at(members), forks, context)
        odds[members] = chosen.odds
        taus += [] if chosen.empty else [chosen.tau]
    return odds, taus


def _choose(tokens: Candidates, forks: Forks, group: Group) -> _Chosen:
    """Select among the tokens that share a threshold, on all ranks of `group`."""
    score = _rule(forks.select)(replace(tokens, group=group), forks)
    if score.dtype == torch.bool:
        return _Chosen(score.float(), math.nan)
    sign = _SIGNS.get(forks.select, math.nan)
    if forks.scope == "fixed":
        assert forks.threshold is not None
        return _Chosen((score >= sign * forks.threshold).float(), forks.threshold)
    threshold = top_threshold(score, forks.top_entropy_quantile, group=group)
    share = threshold.selected / threshold.total if threshold.total else 1.0
    return _Chosen((score >= threshold.tau) / share, sign * threshold.tau, threshold.ties, not threshold.total)


def _apply(micro: MicroBatch, odds: Tensor, forks: Forks) -> None:
    micro.fork = micro.mask = odds > 0
    micro.emphasis = None
    if forks.rest_weight:
        micro.mask = torch.ones_like(micro.fork)
        micro.emphasis = torch.where(micro.fork, 1.0, forks.rest_weight)
    elif forks.horvitz_thompson:
        micro.emphasis = 1.0 / prefix.inclusion(micro, forks.top_entropy_quantile) if forks.select == "prefix" else odds


def _candidates(micro: MicroBatch, seed: int, step: int) -> Candidates:
    old = micro.old_log_prob if len(micro.old_log_prob) else torch.full_like(micro.entropy, math.nan)
    return Candidates(micro.entropy, old, micro.advantage, draws.of_tokens(micro, seed, step))


def _selection(micros: list[MicroBatch], tau: float, groups: ForkGroups, *, ties: int) -> Selection:
    """Counts on the device, read once."""
    selected = torch.stack([micro.fork.sum() for micro in micros]).sum()
    total = torch.full_like(selected, sum(micro.fork.numel() for micro in micros))
    cut = torch.full_like(selected, sum(response.cut for micro in micros for response in micro.responses))
    near = torch.stack([((micro.entropy - tau).abs() <= NEAR * tau).sum() for micro in micros]).sum()  # none where tau is NaN
    counts = all_sum(torch.stack([selected, total, near, cut]), groups.tokens).tolist()
    held = groups.context.size() if groups.context is not None else 1  # the CP ranks of a micro-batch hold the same responses
    return Selection(tau, counts[0], counts[1] + counts[3] // held, ties, counts[2])
