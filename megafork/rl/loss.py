"""The loss of a mini-batch: an objective (`objectives.py`) at the forks, with exact global denominators (arXiv 2506.01939, eq. 6).

The loss of a mini-batch is sum(weight * per-token loss). The weights include the mask and the denominator, are known before the forward,
and are the only place where the reductions differ. So the loss and its gradient are sums over tokens and independent of how tokens are
spread over ranks and micro-batches.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.parallel.reduce import all_sum
from megafork.parallel.to_device import to_device
from megafork.recipe import Forks, Loss
from megafork.rl.batch import MicroBatch
from megafork.rl.forks import ForkGroups
from megafork.rl.mismatch import correction
from megafork.rl.objectives import Objective, Tokens, clip


def policy_loss(
    log_prob: Tensor, micro: MicroBatch, *, loss: Loss, objective: Objective = clip, context: dist.ProcessGroup | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective at the micro-batch's forks, with the sums that the log shows. Every rank of `context` (CP) must call."""
    at = micro.selected
    old = log_prob.detach() if loss.old_log_prob == "current" else micro.old_log_prob[at]
    advantage = micro.advantage[at]
    tokens = Tokens(
        log_prob, old, advantage, micro.sequence[at], len(micro.responses), context, micro.fork[at] if len(micro.fork) else None
    )
    value, clipped = objective(tokens, loss)
    with torch.no_grad():
        log_ratio = (log_prob - old).double()
        report = {"tokens": torch.full_like(at[:0].sum(), len(at)), "clipped": clipped.sum(), "kl": (log_ratio.exp() - 1 - log_ratio).sum()}
        if loss.kl.kept:
            report["reference_kl"] = divergence(micro.reference_log_prob[at] - log_prob, "k3").sum()
        factor = correction(old - micro.rollout_log_prob[at], micro.response_correction, at, loss)
        if factor is not None:
            report |= {"importance": factor.sum(), "masked": (factor == 0).sum()}
            if loss.importance_cap is not None:
                report["capped"] = (factor >= loss.importance_cap).sum()
    value, penalty = value if factor is None else value * factor, _penalty(log_prob, old, micro, loss)
    return value if penalty is None else value + penalty, report


def _penalty(log_prob: Tensor, old: Tensor, micro: MicroBatch, loss: Loss) -> Tensor | None:
    """What `loss.kl` and `loss.kl_cov` add to the loss of each token in the mask, fp32 [P']; None if they add nothing."""
    at, total = micro.selected, None
    if loss.kl.kept:
        beta = loss.kl.coef if loss.kl.rest_coef is None else torch.where(micro.fork[at], loss.kl.coef, loss.kl.rest_coef)
        total = beta * divergence(micro.reference_log_prob[at] - log_prob, loss.kl.estimator)
    if micro.old_kl is not None:
        held = micro.old_kl[at] * divergence(log_prob - old, "k3")
        total = held if total is None else total + held
    return total


def divergence(log_ratio: Tensor, estimator: str) -> Tensor:
    """An estimate per token of KL(p, q) from d = log q - log p of a token that p drew: k1 = -d, k2 = d^2 / 2 or k3 = exp(d) - 1 - d
    (Schulman 2020)."""
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio.square() / 2.0
    return k3(log_ratio.clamp(max=20.0))


def k3(log_ratio: Tensor) -> Tensor:
    """exp(d) - 1 - d of each log-ratio, 0 or more but for rounding, in the dtype given."""
    return torch.expm1(log_ratio) - log_ratio


def set_weights(micros: list[MicroBatch], forks: Forks, loss: Loss, groups: ForkGroups) -> None:
    """Set `weight` of every position of a mini-batch: its emphasis (0 outside the mask, else 1 unless `forks` says otherwise) divided by
    the sum of the emphases, or by all response tokens as sampled (`forks.normalize_by`).

    Every rank of `groups.tokens` on the last pipeline stage must call. A mini-batch or response without selected tokens has weight 0.
    """
    emphases = [micro.mask if micro.emphasis is None else micro.mask * micro.emphasis.double() for micro in micros]
    lengths = [_lengths(micro) for micro in micros] if forks.normalize_by == "response" else None
    match loss.reduction:
        case "token-mean":
            if lengths is None:
                total = all_sum(torch.stack([emphasis.sum() for emphasis in emphases]).sum(), groups.tokens)
            else:
                total = _once_per_response(torch.stack([length.sum() for length in lengths]).sum(), groups)
            for micro, emphasis in zip(micros, emphases, strict=True):
                micro.weight = (emphasis / _or_one(total)).float()
        case "official":
            sequences = _sequences(micros, groups)
            for n, (micro, emphasis) in enumerate(zip(micros, emphases, strict=True)):
                tokens = all_sum(emphasis.sum(), groups.context) if lengths is None else lengths[n].sum()
                share = len(micro.responses) / max(sequences, 1)
                micro.weight = (emphasis * (share / _or_one(tokens).double()).float()).float()
        case "seq-mean":
            sequences = _sequences(micros, groups)
            for n, (micro, emphasis) in enumerate(zip(micros, emphases, strict=True)):
                tokens_of = _per_response(micro, emphasis, groups) if lengths is None else lengths[n].float()
                micro.weight = (emphasis / (_or_one(tokens_of)[micro.sequence] * max(sequences, 1))).float()


def _per_response(micro: MicroBatch, emphasis: Tensor, groups: ForkGroups) -> Tensor:
    """Sum of the emphases of each response's tokens over the CP ranks: fp32 counts [R], fp64 of what is no count; R is at least 1."""
    values = emphasis.float() if emphasis.dtype == torch.bool else emphasis
    sums = torch.zeros(max(len(micro.responses), 1), dtype=values.dtype, device=values.device)
    return all_sum(sums.index_add_(0, micro.sequence, values), groups.context)


def _lengths(micro: MicroBatch) -> Tensor:
    """Tokens of each response as sampled: int64 [R], or [0] without any."""
    return to_device(torch.tensor([response.whole_length for response in micro.responses] or [0]), micro.mask.device)


def _or_one(count: Tensor) -> Tensor:
    """The count, or 1 in place of 0."""
    return count + (count == 0)


def _sequences(micros: list[MicroBatch], groups: ForkGroups) -> int:
    """Responses of the mini-batch."""
    return int(_once_per_response(torch.tensor(sum(len(micro.responses) for micro in micros)), groups))  # on the host


def _once_per_response(total: Tensor, groups: ForkGroups) -> Tensor:
    """Sum over all ranks of an int64 that counts something of whole responses; the CP ranks of a micro-batch hold the same ones."""
    return all_sum(total, groups.tokens) // (groups.context.size() if groups.context is not None else 1)
