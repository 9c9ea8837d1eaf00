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
from megafork.rl.batch import MicroBatch, sum_and_mean_by_response

MOST = 20.0
"""Largest |log ratio| that is told apart."""


def correction(log_ratio: Tensor, of_response: Tensor | None, at: Tensor, loss: Loss) -> Tensor | None:
    """The factor of the loss of the tokens at the indices `at` [P'], from their log r_t [P'] and the `response_correction` [P]: fp32 [P'],
    0 or more; None if it is 1. No communication."""
    ratio, mask = log_ratio.clamp(max=MOST).exp(), loss.mismatch.token_mask
    factor = None if of_response is None else of_response[at]
    if loss.importance_cap is not None and loss.importance_level == "token":
        factor = _times(factor, ratio.clamp(max=loss.importance_cap))
    if mask is not None:
        factor = _times(factor, _within(ratio, mask).float())
    return factor


def set_response_corrections(micros: list[MicroBatch], loss: Loss, context: dist.ProcessGroup | None) -> None:
    """Set `response_correction` of every micro-batch from its old and its roll-out log-probs.

    Every rank of `context` (CP) on the last pipeline stage must call. Two all-reduces per micro-batch at most, none if no key asks.
    """
    for micro in micros:
        micro.response_correction = _response_correction(micro, loss, context) if loss.ratios_of_responses else None


def _response_correction(micro: MicroBatch, loss: Loss, context: dist.ProcessGroup | None) -> Tensor:
    spec, log_ratio = loss.mismatch, micro.old_log_prob - micro.rollout_log_prob
    found = sum_and_mean_by_response(log_ratio, micro.sequence, len(micro.responses), context)
    total, mean = (part.clamp(-MOST, MOST).exp() for part in found)
    factor = torch.ones_like(total)
    if loss.importance_cap is not None and loss.importance_level != "token":
        factor = (total if loss.importance_level == "sequence" else mean).clamp(max=loss.importance_cap)
    for ratio, band in ((total, spec.sequence_mask), (mean, spec.geometric_mask)):
        if band is not None:
            factor = factor * _within(ratio, band)
    if spec.veto is not None:
        factor = factor * (_worst(micro, log_ratio, context) >= math.log(spec.veto))
    return factor.float()[micro.sequence]


def _times(factor: Tensor | None, other: Tensor) -> Tensor:
    return other if factor is None else factor * other


def _within(ratio: Tensor, band: tuple[float, float]) -> Tensor:
    return (ratio >= band[0]) & (ratio <= band[1])


def _worst(micro: MicroBatch, values: Tensor, context: dist.ProcessGroup | None) -> Tensor:
    """The smallest of `values` [P] in each response: fp32 [R], R at least 1."""
    worst = torch.full((max(len(micro.responses), 1),), torch.inf, device=values.device)
    worst.scatter_reduce_(0, micro.sequence, values, "amin")
    if context is not None:
        dist.all_reduce(worst, dist.ReduceOp.MIN, group=context)
    return worst
