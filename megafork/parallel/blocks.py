"""One block of logits [n, columns] of the vocabulary-parallel head: its contribution to the rows' statistics, and its gradient.

Plain PyTorch: used on the CPU, and the reference for the same two functions in `kernels.py`. The formulas are in `vocab.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOWEST = -1e30
"""Maximum over zero columns: finite, so that no difference is ever inf - inf."""
LOG_ZERO = -200.0
"""exp(LOG_ZERO) is 0 in fp32. Log-probs of probability 0 are clamped to it, so that p log p is 0 and never 0 * -inf."""


class GradientTerms(NamedTuple):
    """Vectors [n] that determine a block's gradient: p_j (-by_entropy log p_j - constant) + [j = target] scale."""

    temperatures: Tensor
    top: Tensor
    log_total: Tensor
    scale: Tensor
    constant: Tensor
    by_entropy: Tensor | None

    @staticmethod
    def of(
        temperatures: Tensor,
        top: Tensor,
        log_total: Tensor,
        entropy: Tensor,
        grad_log_prob: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> GradientTerms:
        scale = torch.zeros_like(top) if grad_log_prob is None else grad_log_prob / temperatures
        by_entropy = None if grad_entropy is None else grad_entropy / temperatures
        constant = scale if by_entropy is None else scale + by_entropy * entropy
        return GradientTerms(temperatures, top, log_total, scale, constant, by_entropy)

    def of_rows(self, row: slice) -> GradientTerms:
        return self._replace(**{name: vector[row] for name, vector in self._asdict().items() if vector is not None})


def accumulate_stats(stats: Tensor, logits: Tensor, targets: Tensor, temperatures: Tensor) -> None:
    """Add a block of logits [n, columns] (overwritten) to the running stats [4, n] of its rows.

    The stats are: maximum m of x; sum exp(z); sum z exp(z); x of the target. `targets` are relative to the block's first column.
    """
    inside = (targets >= 0) & (targets < logits.shape[1])
    stats[3] += torch.where(inside, logits.gather(1, (targets * inside)[:, None])[:, 0], 0.0)
    top = torch.maximum(stats[0], logits.amax(1))
    z = logits.sub_(top[:, None]).div_(temperatures[:, None]).clamp_(min=LOG_ZERO)
    exp = z.exp()
    shift_stats(stats, top, temperatures)
    stats[1] += exp.sum(1)
    stats[2] += exp.mul_(z).sum(1)


def logits_gradient(logits: Tensor, targets: Tensor, terms: GradientTerms, dtype: torch.dtype) -> Tensor:
    """Gradient of a block of logits [n, columns] (overwritten), in `dtype`. `targets` are relative to the block's first column."""
    z = logits.sub_(terms.top[:, None]).div_(terms.temperatures[:, None])
    log_p = z.sub_(terms.log_total[:, None]).clamp_(min=LOG_ZERO)
    if terms.by_entropy is None:
        gradient = log_p.exp_().mul_(-terms.constant[:, None])
    else:
        p = log_p.exp()
        gradient = log_p.mul_(-terms.by_entropy[:, None]).sub_(terms.constant[:, None]).mul_(p)
    inside = (targets >= 0) & (targets < logits.shape[1])
    gradient.scatter_add_(1, (targets * inside)[:, None], torch.where(inside, terms.scale, 0.0)[:, None])
    return gradient.to(dtype)


def shift_stats(stats: Tensor, top: Tensor, temperatures: Tensor) -> None:
    """Rescale the sums to a maximum `top` that is not below the current one."""
    difference = ((stats[0] - top) / temperatures).clamp_(min=LOG_ZERO)
    stats[2] += difference * stats[1]
    stats[1:3] *= difference.exp()
    stats[0] = top
