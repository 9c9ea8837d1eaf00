"""Corrections for roll-outs that another policy drew than the one that starts the step: older weights, or another precision.

With r_t = p_old / p_rollout of a token, the ratio of a response is prod r_t (`sequence`) or its geometric mean (`geometric`), over all its
tokens, selected or not. Each token's loss is multiplied by one factor: a truncated ratio, or 1, and 0 where a mask says that the token or
its response does not count. What does not count stays in the loss's denominator, as in the objectives of the sources.

Truncated importance sampling: Ionides 2008. Token mask: IcePop (arXiv 2510.18855), whose factor is r_t inside the band: `token_mask` with
`importance_cap` at its upper end. Sequence and geometric ratios, masks and the veto: as we define them here.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.recipe import Loss
from megafork.rl.batch import MicroBatch

MOST = 20.0
"""Largest |log ratio| that is told apart."""


def set_corrections(micros: list[MicroBatch], loss: Loss, context: dist.ProcessGroup | None) -> None:
    """Set `correction` of every micro-batch from its old and its roll-out log-probs.

    Every rank of `context` (CP) on the last pipeline stage must call; only ratios of responses communicate, in at most two all-reduces per
    micro-batch."""
    for micro in micros:
        micro.correction = correction(micro, loss, context) if loss.importance_cap is not None or loss.mismatch.masks else None


def correction(micro: MicroBatch, loss: Loss, context: dist.ProcessGroup | None) -> Tensor:
    """The factor of each token's loss, fp32 [P], 0 or more. Collective behaviour as for `set_corrections`."""
    spec, log_ratio = loss.mismatch, micro.old_log_prob - micro.rollout_log_prob
    ratios = {"token": log_ratio.clamp(max=MOST).exp()}
    if loss.importance_level != "token" or spec.sequence_mask or spec.geometric_mask:
        total, mean = (part[micro.sequence].clamp(-MOST, MOST).exp().float() for part in _of_responses(micro, log_ratio, context))
        ratios |= {"sequence": total, "geometric": mean}
    factor = torch.ones_like(log_ratio) if loss.importance_cap is None else ratios[loss.importance_level].clamp(max=loss.importance_cap)
    bands = {"token": spec.token_mask, "sequence": spec.sequence_mask, "geometric": spec.geometric_mask}
    for level, band in bands.items():
        if band is not None:
            factor = factor * ((ratios[level] >= band[0]) & (ratios[level] <= band[1]))
    if spec.veto is not None:
        factor = factor * (_worst(micro, log_ratio, context) >= math.log(spec.veto))[micro.sequence]
    return factor


def _of_responses(micro: MicroBatch, values: Tensor, context: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Sum and mean of `values` [P] over the tokens of each response: fp64 [R] each, R at least 1."""
    sums = torch.zeros(2, max(len(micro.responses), 1), dtype=torch.float64, device=values.device)
    sums[0].index_add_(0, micro.sequence, values.double())
    sums[1].index_add_(0, micro.sequence, torch.ones_like(values, dtype=torch.float64))
    if context is not None:
        dist.all_reduce(sums, group=context)
    return sums[0], sums[0] / sums[1].clamp(min=1.0)


def _worst(micro: MicroBatch, values: Tensor, context: dist.ProcessGroup | None) -> Tensor:
    """The smallest of `values` [P] in each response: fp32 [R], R at least 1."""
    worst = torch.full((max(len(micro.responses), 1),), torch.inf, device=values.device)
    worst.scatter_reduce_(0, micro.sequence, values, "amin")
    if context is not None:
        dist.all_reduce(worst, dist.ReduceOp.MIN, group=context)
    return worst
