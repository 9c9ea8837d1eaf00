"""Fork-aware decoding: one temperature if the next token's entropy is high, another if it is low (arXiv 2506.01939).

The rule and its arithmetic; `logits_processor.py` plugs them into vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megafork.recipe import RecipeError, Rollout

if TYPE_CHECKING:  # the command line imports this file, and must not wait for torch
    from torch import Tensor

PAPER_GRID = (0.0, 0.05, 0.3, 0.6, 1.0, 2.0, 3.0, 5.0)
PAPER_THRESHOLD = 0.672
"""Nats: the 80th percentile of the paper's chains of thought."""
ARGUMENT = "fork_temperature"
"""Request argument read by the logits processor."""
_LOWEST, _HIGHEST = 0.01, 100.0


@dataclass(frozen=True)
class ForkTemperature:
    """Temperature `high` where the next token's entropy is above `threshold` nats, `low` elsewhere; 0 is greedy decoding.

    The entropy is that of the model's full distribution at temperature 1, whatever `low` and `high` are.
    """

    low: float
    high: float
    threshold: float = PAPER_THRESHOLD

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if not (value == 0 or _LOWEST <= value <= _HIGHEST):
                raise RecipeError(
                    f"fork temperature: {name} is {value}: must be 0 (greedy at these tokens), or between {_LOWEST:g} and {_HIGHEST:g}"
                )
        if not self.threshold >= 0:
            raise RecipeError(f"fork temperature: threshold is {self.threshold}: an entropy in nats is at least 0")

    @property
    def arguments(self) -> dict[str, list[float]]:
        """`extra_args` of a request to vLLM; its `temperature` must be 1."""
        return {ARGUMENT: [self.low, self.high, self.threshold]}

    def of(self, entropy: Tensor) -> Tensor:
        """The temperature of each token from its entropy at temperature 1, of the same shape."""
        import torch

        return torch.where(entropy > self.threshold, self.high, self.low)


def fork_temperature(rollout: Rollout) -> ForkTemperature | None:
    """The recipe's fork temperature, or None."""
    return None if rollout.fork_temperature is None else ForkTemperature(*rollout.fork_temperature)


def sweep(threshold: float = PAPER_THRESHOLD) -> list[ForkTemperature]:
    """The paper's experiment: each of the two temperatures over the grid while the other is 1. The pair (1, 1) appears once."""
    low = [ForkTemperature(low=t, high=1.0, threshold=threshold) for t in PAPER_GRID]
    return low + [ForkTemperature(low=1.0, high=t, threshold=threshold) for t in PAPER_GRID if t != 1.0]


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each row's distribution: [N, V] -> [N]. A logit of -inf has probability 0 and adds 0."""
    import torch

    return torch.special.entr(logits.softmax(-1)).sum(-1)


def scale_logits(logits: Tensor, settings: Tensor, *, at_once: int = 1 << 24) -> Tensor:
    """Divide each row by the temperature for its entropy, in place; returns `logits`.

    `logits` [N, V], not yet scaled; `settings` [N, 3]: low, high, threshold. At temperature 0 the first of the largest logits keeps its
    value and all others become -inf, which is the limit. A row whose temperatures are both 1 stays bit-identical.
    About `at_once` logits are processed at a time, so that the soft-max of a large batch needs 64 MiB and not gigabytes.
    """
    import torch

    vocabulary = torch.arange(logits.shape[1], device=logits.device)
    rows = max(1, at_once // logits.shape[1])
    for part, setting in zip(logits.split(rows), settings.to(logits.dtype).split(rows), strict=True):
        low, high, threshold = setting.unbind(1)
        temperature = torch.where(token_entropy(part) > threshold, high, low)[:, None]
        greedy = temperature == 0
        others = greedy & (vocabulary != part.argmax(-1, keepdim=True))
        part.div_(temperature.masked_fill(greedy, 1.0)).masked_fill_(others, -torch.inf)
    return logits
