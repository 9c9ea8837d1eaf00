"""Selection rules: which response tokens learn. `forks.select` names one.

Each is one function of `Candidates`, the tokens that share one threshold, and the recipe's section `forks`. It returns a score per token,
fp32 [N], of which the share `top_entropy_quantile` with the highest scores is selected by one exact threshold over all ranks (`forks.py`);
or the selection itself, bool [N]. A rule that reads other tokens only through the methods of `Candidates` selects the same tokens under
every parallel layout. All of them run on what scoring leaves behind; none needs another forward or the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.parallel.quantile import percentiles
from megafork.parallel.reduce import all_sum
from megafork.recipe import Forks, RecipeError
from megafork.rl.named import function_named, tried

STAPO = (0.002, 0.75)
"""tau_p and q of the authors of STAPO."""
LEAST_ENTROPY = 1e-6
"""Nats. Below it fp32 holds neither the entropy nor the surprisal of a token."""
_STEPS = 1 << 24
"""Per unit, in exact sums."""


@dataclass(frozen=True)
class Candidates:
    """The tokens of this rank that share one threshold with those of the other ranks of `group`; N counts them, and may be 0."""

    entropy: Tensor
    """fp32 [N], nats (`forks.entropy_from`)."""
    log_prob: Tensor
    """fp32 [N], of the sampled token under the policy that starts the step."""
    advantage: Tensor
    """fp32 [N]."""
    draw: Tensor
    """fp32 [N] in [0, 1), a random number that belongs to the token: the same under every layout, another in every step."""
    group: dist.ProcessGroup | None = None

    def at(self, members: Tensor) -> Candidates:
        """The tokens with these indices, int64."""
        return Candidates(self.entropy[members], self.log_prob[members], self.advantage[members], self.draw[members], self.group)

    @classmethod
    def joined(cls, parts: list[Candidates]) -> Candidates:
        """The tokens of micro-batches, one after the other."""
        columns = zip(*((part.entropy, part.log_prob, part.advantage, part.draw) for part in parts), strict=True)
        entropy, log_prob, advantage, draw = map(torch.cat, columns)
        return cls(entropy, log_prob, advantage, draw)

    def mean(self, values: Tensor) -> float:
        """The mean of `values` [N] over all ranks, NaN without any: summed in steps of 2^-24, so that the result is the same to the bit for
        every split of the same values. Every rank of `group` must call."""
        total = (values.double() * _STEPS).round().long().sum()
        sums = all_sum(torch.stack([total, torch.full_like(total, len(values))]), self.group).tolist()
        return sums[0] / _STEPS / sums[1] if sums[1] else math.nan

    def quantile(self, values: Tensor, share: float) -> float:
        """The smallest value that at least `share` of all ranks' `values` do not exceed; NaN without any. Every rank of `group` must
        call, with as many values as it likes."""
        return percentiles(values, (share,), group=self.group)[0]


Rule = Callable[[Candidates, Forks], Tensor]


def top(tokens: Candidates, forks: Forks) -> Tensor:
    """H: the forks of arXiv 2506.01939."""
    return tokens.entropy


def bottom(tokens: Candidates, forks: Forks) -> Tensor:
    """-H: the tokens that the paper shows to be useless."""
    return -tokens.entropy


def random(tokens: Candidates, forks: Forks) -> Tensor:
    """A random number. With `horvitz_thompson` the uniform sampling of NAT (arXiv 2603.06619)."""
    return tokens.draw


def every(tokens: Candidates, forks: Forks) -> Tensor:
    """All tokens. For `select: prefix` these are the tokens before the cut (`prefix.py`)."""
    return torch.ones_like(tokens.entropy, dtype=torch.bool)


def gmts(tokens: Candidates, forks: Forks) -> Tensor:
    """|A| H: the score |omega H| of GMTS (arXiv 2608.30632), whose omega is A at the policy that starts the step, where the ratio is 1.
    A token of a response without advantage has score 0."""
    return tokens.advantage.abs() * tokens.entropy


def gradient(tokens: Candidates, forks: Forks) -> Tensor:
    """2 |A| (1 - p): the L1 norm of -A d log p / d logits = -A ([j = token] - p_j). Exact, from p of the sampled token alone. As we define
    it; GMTS approximates the L2 norm by the entropy."""
    return -2.0 * tokens.advantage.abs() * torch.expm1(tokens.log_prob.clamp(max=0.0))


def covariance(tokens: Candidates, forks: Forks) -> Tensor:
    """(log p - mean log p) (A - mean A), the token's share of the covariance that lowers the policy's entropy (arXiv 2505.22617, eq. 10);
    means over the tokens that share the threshold. Two more all-reduces of 16 bytes."""
    return covariance_of(tokens)


def covariance_of(tokens: Candidates) -> Tensor:
    log_prob, advantage = tokens.mean(tokens.log_prob), tokens.mean(tokens.advantage)
    return ((tokens.log_prob.double() - log_prob) * (tokens.advantage.double() - advantage)).float()


def rsi(tokens: Candidates, forks: Forks) -> Tensor:
    """RSI = -log p / H within `rsi_interval`: RSI-S (arXiv 2606.31575). Its mean over the distribution is 1. H counts as at least 1e-6."""
    assert forks.rsi_interval is not None
    low, high = forks.rsi_interval
    index = -tokens.log_prob.clamp(max=0.0) / tokens.entropy.clamp(min=LEAST_ENTROPY)
    return (index >= low) & (index <= high)


def stapo(tokens: Candidates, forks: Forks) -> Tensor:
    """All but the spurious tokens (STAPO, arXiv 2602.15620v4): A > 0, p < tau_p, and H below the quantile q of the entropies of such
    tokens. One exact quantile more."""
    rare_below, share = forks.stapo or STAPO
    rare = (tokens.advantage > 0) & (tokens.log_prob < math.log(rare_below))
    return ~(rare & (tokens.entropy < tokens.quantile(tokens.entropy[rare], share)))


RULES: dict[str, Rule] = {
    "top": top,
    "bottom": bottom,
    "random": random,
    "all": every,
    "prefix": every,
    "gmts": gmts,
    "gradient": gradient,
    "covariance": covariance,
    "rsi": rsi,
    "stapo": stapo,
}


def rule_named(name: str) -> Rule:
    """One of `RULES`, or the user's own as FILE.py:FUNCTION, imported anew. Raises RecipeError."""
    return function_named("forks.select", name, RULES)


def check_rule(forks: Forks) -> None:
    """Refuse a rule that is unknown, or a user's own that does not return what it must. Raises RecipeError."""
    rule, wrong = rule_named(forks.select), f"forks.select is {forks.select!r}: its function"
    entropy, log_prob = torch.tensor([0.0, 0.5, 1.5]), torch.tensor([0.0, -0.5, -2.0])
    tokens = Candidates(entropy, log_prob, torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0.1, 0.2, 0.9]))
    answer = tried("forks.select", forks.select, lambda: rule(tokens, forks))
    if not (isinstance(answer, Tensor) and answer.shape == (3,) and answer.dtype in (torch.float32, torch.bool)):
        raise RecipeError(f"{wrong} must return one tensor with a float32 score, or a boolean, for each token")
    if answer.isnan().any():
        raise RecipeError(f"{wrong} returned NaN for a token: a score must be a number")
