"""Prefix cutting (`forks.select: prefix`): a random beginning of each response is trained on; the rest is neither scored nor fed.

Random prefix cutting is NAT's (arXiv 2603.06619); the law of the cut is as we define it. Of a response of n tokens, ceil(n U^a) are kept,
with U uniform in (0, 1] and a = (1 - rho) / rho: on average the share rho, rounded up to whole tokens; rho = 0.5 cuts uniformly. Token t
(from 0) is kept with probability

    P(ceil(n U^a) > t) = 1 - (t / n)^(1 / a)

which `horvitz_thompson` divides by.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from megafork.recipe import Recipe
from megafork.rl import draws
from megafork.rl.batch import MicroBatch, Response


def kept(length: int, group: int, sample: int, recipe: Recipe, *, step: int) -> int:
    """How many of a response's `length` tokens are trained on: at least 1, and all unless the recipe cuts. Every rank can tell."""
    if recipe.forks.select != "prefix":
        return length
    uniform = 1.0 - draws.of_response(group, sample, recipe.run.seed, step)  # in (0, 1]
    share = recipe.forks.top_entropy_quantile
    return max(1, min(length, math.ceil(length * uniform ** ((1.0 - share) / share))))


def cut(response: Response, recipe: Recipe, *, step: int) -> Response:
    """The response without the tokens after its cut; `response.cut` counts them."""
    length = len(response.tokens)
    end = kept(length, response.group, response.sample, recipe, step=step)
    if end == length:
        return response
    return replace(
        response,
        tokens=response.tokens[:end],
        log_probs=response.log_probs[:end],
        versions=response.versions[:end],
        entropies=response.entropies[:end],
        routing=response.routing[: len(response.prompt_tokens) + end - 1],
        cut=length - end,
    )


def inclusion(micro: MicroBatch, share: float) -> Tensor:
    """The probability with which each position's token was kept: fp32 [P], above 0."""
    if share == 1.0:
        return torch.ones_like(micro.advantage)
    lengths = torch.tensor([r.whole_length for r in micro.responses] or [1], dtype=torch.float64, device=micro.offset.device)
    return (1.0 - (micro.offset / lengths[micro.sequence]) ** (share / (1.0 - share))).float()
