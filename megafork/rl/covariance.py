"""Clip-Cov and KL-Cov: the few tokens whose covariance of log-prob and advantage lowers the entropy most learn less (arXiv 2505.22617).

Cov(t) = (log p_t - mean log p) (A_t - mean A), means over all response tokens of the mini-batch, under p_old. `clip_cov` draws a share of
the N tokens among those with Cov in a band and takes their loss away (eq. 11, 12). `kl_cov` adds beta KL(p_old, p) to the loss of the share
of the tokens with the highest Cov (eq. 13, 14), estimated per token by k3 = r - 1 - log r. Both count k = ceil(share N), found by one
exact threshold over all ranks; a token keeps its place in the loss's denominator.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megafork.parallel.quantile import top_threshold
from megafork.recipe import Loss
from megafork.rl import draws
from megafork.rl.batch import MicroBatch
from megafork.rl.forks import ForkGroups
from megafork.rl.rules import Candidates, covariance_of


def restrain(micros: list[MicroBatch], loss: Loss, groups: ForkGroups, *, seed: int, step: int) -> None:
    """Take the weight of Clip-Cov's tokens away, and set `old_kl` for KL-Cov's. Needs `weight` and `old_log_prob`.

    Every rank of `groups.tokens` on the last pipeline stage must call with the micro-batches of a mini-batch. No gradient.
    """
    for micro in micros:
        micro.old_kl = None
    if loss.clip_cov is None and loss.kl_cov is None:
        return
    known = [
        Candidates(m.entropy, m.old_log_prob, m.advantage, draws.of_tokens(m, ~seed, step)) for m in micros
    ]  # not the draws of `random`
    tokens = replace(Candidates.joined(known), group=groups.tokens)
    score, sizes = covariance_of(tokens), [len(micro.positions) for micro in micros]
    if loss.clip_cov is not None:
        share, low, high = loss.clip_cov
        within = (score >= low) & (score <= high)
        taken = within & _highest(torch.where(within, tokens.draw, -1.0), share, groups)
        for micro, part in zip(micros, taken.split(sizes), strict=True):
            micro.weight = micro.weight.masked_fill(part, 0.0)
    if loss.kl_cov is not None:
        share, beta = loss.kl_cov
        for micro, part in zip(micros, _highest(score, share, groups).split(sizes), strict=True):
            micro.old_kl = beta * part


def _highest(scores: Tensor, share: float, groups: ForkGroups) -> Tensor:
    return scores >= top_threshold(scores, share, group=groups.tokens).tau
