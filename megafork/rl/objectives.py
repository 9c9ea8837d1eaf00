"""Objectives: the loss of each selected token, from its log-probs and its advantage. `loss.objective` names one.

Each is one function of `Tokens` and the recipe's section `loss`. It returns the loss of each token, fp32 [P'], and which tokens its bounds
hold back, bool [P'] without gradient. The selection, the weights and the denominator are handled elsewhere (`loss.py`), so an objective is
the same for every parallel layout as long as it reads other tokens only through `Tokens.mean_per_response`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.recipe import Loss, RecipeError
from megafork.rl.batch import sum_and_mean_by_response
from megafork.rl.named import function_named, tried


@dataclass(frozen=True)
class Tokens:
    """The selected tokens of a micro-batch on this CP rank; P' counts them."""

    log_prob: Tensor
    """fp32 [P'], under the policy being trained, with gradient."""
    old_log_prob: Tensor
    """fp32 [P'], under the policy that starts the step."""
    advantage: Tensor
    """fp32 [P']."""
    response: Tensor
    """int64 [P'], index of each token's response in the micro-batch."""
    responses: int
    """Number of responses in the micro-batch; the ranks of `context` hold parts of the same ones."""
    context: dist.ProcessGroup | None = None
    fork: Tensor | None = None
    """bool [P'], which of them the rule selects; under `forks.rest_weight` the others have a loss too. None: all."""

    @property
    def ratio(self) -> Tensor:
        """exp(log_prob - old_log_prob), fp32 [P'], between exp(-20) and exp(20)."""
        return (self.log_prob - self.old_log_prob).clamp(-20.0, 20.0).exp()

    def mean_per_response(self, values: Tensor) -> Tensor:
        """For each token, the mean of `values` [P'] over the selected tokens of its response, without gradient: fp64 [P'].

        Every rank of `context` must call.
        """
        return sum_and_mean_by_response(values, self.response, self.responses, self.context)[1][self.response]


Objective = Callable[[Tokens, Loss], tuple[Tensor, Tensor]]


def clip(tokens: Tokens, loss: Loss) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A) with r = p / p_old, at most c |A| for A < 0 under dual clip (PPO; clip-higher of DAPO, arXiv 2503.14476).

    With `clip_rest` tokens that are not forks have clip bounds of their own (Archer, arXiv 2507.15778, eq. 3)."""
    value, clipped = _clipped(tokens.ratio, tokens.advantage, loss)
    if loss.clip_rest is not None and tokens.fork is not None:
        low, high = loss.clip_rest
        rest = _clipped(tokens.ratio, tokens.advantage, loss.model_copy(update={"clip_low": low, "clip_high": high}))
        value, clipped = torch.where(tokens.fork, value, rest[0]), torch.where(tokens.fork, clipped, rest[1])
    if loss.dual_clip is not None:
        value = torch.where(tokens.advantage < 0, torch.minimum(value, -tokens.advantage * loss.dual_clip), value)
    return value, clipped


def gspo(tokens: Tokens, loss: Loss) -> tuple[Tensor, Tensor]:
    """-min(s A, clip(s) A), where s is the geometric mean of the ratios of the response's selected tokens (GSPO, arXiv 2507.18071).

    Each token has the value of s and the gradient of its own log-prob; summed over equally weighted tokens, that is the gradient of the
    sequence objective. With a mask, the mean is over the forks alone, as is the gradient.
    """
    mean = tokens.mean_per_response(tokens.log_prob - tokens.old_log_prob).clamp(-20.0, 20.0).exp()
    ratio = mean.to(tokens.log_prob.dtype) * (tokens.log_prob - tokens.log_prob.detach()).exp()
    return _clipped(ratio, tokens.advantage, loss)


def cispo(tokens: Tokens, loss: Loss) -> tuple[Tensor, Tensor]:
    """-clip(r) A log p, with no gradient through clip(r): no token is dropped (CISPO, arXiv 2506.13585)."""
    ratio = tokens.ratio.detach()
    weight = ratio.clamp(1.0 - loss.clip_low, 1.0 + loss.clip_high)
    return -weight * tokens.advantage * tokens.log_prob, weight != ratio


def sapo(tokens: Tokens, loss: Loss) -> tuple[Tensor, Tensor]:
    """-A sigmoid(t (r - 1)) 4 / t: a soft gate instead of the clip, with a separate t for A > 0 (SAPO, arXiv 2511.20347)."""
    positive, negative = loss.sapo_temperatures
    temperature = torch.where(tokens.advantage > 0, positive, negative)
    gate = torch.sigmoid(temperature * (tokens.ratio - 1.0)) * 4.0 / temperature
    return -gate * tokens.advantage, torch.zeros_like(tokens.advantage, dtype=torch.bool)


def reinforce(tokens: Tokens, loss: Loss) -> tuple[Tensor, Tensor]:
    """-A log p: the policy gradient with the group's mean as baseline, uncorrected for updates since the roll-out (Williams 1992)."""
    return -tokens.advantage * tokens.log_prob, torch.zeros_like(tokens.advantage, dtype=torch.bool)


OBJECTIVES: dict[str, Objective] = {function.__name__: function for function in (clip, gspo, cispo, sapo, reinforce)}


def objective_named(name: str) -> Objective:
    """One of `OBJECTIVES`, or the user's own as FILE.py:FUNCTION, imported anew. Raises RecipeError."""
    return function_named("loss.objective", name, OBJECTIVES)


def check_objective(loss: Loss) -> None:
    """Refuse an objective that is unknown, or a user's own that does not return what it must. Raises RecipeError."""
    objective, wrong = objective_named(loss.objective), f"loss.objective is {loss.objective!r}: its function"
    log_prob = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
    tokens = Tokens(log_prob, torch.tensor([-0.6, -1.0, -1.0]), torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0, 0, 1]), 2)
    answer = tried("loss.objective", loss.objective, lambda: objective(tokens, loss))
    if not (isinstance(answer, tuple) and len(answer) == 2 and all(isinstance(part, Tensor) and part.shape == (3,) for part in answer)):
        raise RecipeError(f"{wrong} must return two tensors of as many elements as there are tokens: the losses, and which are held back")
    value, held_back = answer
    if not value.requires_grad or not value.isfinite().all() or held_back.dtype != torch.bool:
        raise RecipeError(f"{wrong} must return finite losses that depend on tokens.log_prob, and booleans")


def _clipped(ratio: Tensor, advantage: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    free = -advantage * ratio
    bounded = -advantage * ratio.clamp(1.0 - loss.clip_low, 1.0 + loss.clip_high)
    return torch.maximum(free, bounded), (bounded > free).detach()
