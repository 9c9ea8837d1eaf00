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
from megafork.recipe import Forks, Loss
from megafork.rl.batch import MicroBatch
from megafork.rl.forks import ForkGroups
from megafork.rl.objectives import Objective, Tokens, clip


def policy_loss(
    log_prob: Tensor, micro: MicroBatch, *, loss: Loss, objective: Objective = clip, context: dist.ProcessGroup | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective at the micro-batch's forks, with the sums that the log shows. Every rank of `context` (CP) must call."""
    at = micro.selected
    old = log_prob.detach() if loss.old_log_prob == "current" else micro.old_log_prob[at]
    advantage = micro.advantage[at]
    tokens = Tokens(log_prob, old, advantage, micro.sequence[at], len(micro.responses), context)
    value, clipped = objective(tokens, loss)
    with torch.no_grad():
        log_ratio = (log_prob - old).double()
        report = {"clipped": clipped.sum(), "kl": (log_ratio.exp() - 1 - log_ratio).sum()}
        if loss.importance_cap is None:
            return value, report
        ratio = importance(old, micro.rollout_log_prob[micro.selected], loss.importance_cap)
    return value * ratio, {**report, "importance": ratio.sum(), "capped": (ratio >= loss.importance_cap).sum()}


def importance(old_log_prob: Tensor, rollout_log_prob: Tensor, cap: float) -> Tensor:
    """Truncated importance ratio min(p_old / p_rollout, cap) of each token, fp32 [P]: the policy at the start of the step (under
    `old_log_prob: current`, the one being updated) over the policy that sampled the response (Ionides 2008)."""
    return (old_log_prob - rollout_log_prob).clamp(max=20.0).exp().clamp(max=cap)


def set_weights(micros: list[MicroBatch], forks: Forks, loss: Loss, groups: ForkGroups) -> None:
    """Set `weight` of every position of a mini-batch from its mask.

    Every rank of `groups.tokens` on the last pipeline stage must call. A mini-batch or response without selected tokens has weight 0.
    """
    counted = [micro.mask if forks.normalize_by == "selected" else torch.ones_like(micro.mask) for micro in micros]
    match loss.reduction:
        case "token-mean":
            total = all_sum(torch.stack([mask.sum() for mask in counted]).sum(), groups.tokens)
            for micro in micros:
                micro.weight = micro.mask / total.clamp(min=1)
        case "official":
            sequences = _sequences(micros, groups)
            for micro, mask in zip(micros, counted, strict=True):
                tokens = all_sum(mask.sum(), groups.context)
                share = len(micro.responses) / max(sequences, 1)
                micro.weight = micro.mask * (share / tokens.clamp(min=1).double()).float()
        case "seq-mean":
            sequences = _sequences(micros, groups)
            for micro, mask in zip(micros, counted, strict=True):
                tokens_of = torch.zeros(max(len(micro.responses), 1), dtype=torch.float32, device=mask.device)
                tokens_of.index_add_(0, micro.sequence, mask.float())
                all_sum(tokens_of, groups.context)
                micro.weight = micro.mask / (tokens_of.clamp(min=1.0)[micro.sequence] * max(sequences, 1))


def _sequences(micros: list[MicroBatch], groups: ForkGroups) -> int:
    """Responses of the mini-batch; the CP ranks of a micro-batch hold the same ones."""
    total = int(all_sum(torch.tensor(sum(len(micro.responses) for micro in micros)), groups.tokens))  # on the host
    return total // (groups.context.size() if groups.context is not None else 1)
