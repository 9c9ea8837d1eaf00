"""From verdicts to advantages: reward scale, overlong shaping, group normalisation (DAPO, arXiv 2503.14476; GRPO, arXiv 2402.03300)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch

from megafork.recipe import Recipe, Reward
from megafork.rl.batch import Response


def set_advantages(responses: Iterable[Response], recipe: Recipe) -> None:
    """Fill `reward` and `advantage` of complete groups (all samples of a prompt on this rank)."""
    by_group = sorted(responses, key=lambda response: (response.group, response.sample))
    for _, members in groupby(by_group, key=lambda response: response.group):
        group = list(members)
        for response in group:
            response.reward = reward_of(response, recipe.reward, recipe.rollout.max_response_length)
        advantages = group_advantages(torch.tensor([response.reward for response in group]), recipe.loss.normalize_advantage)
        for response, advantage in zip(group, advantages.tolist(), strict=True):
            response.advantage = advantage


def reward_of(response: Response, reward: Reward, max_length: int) -> float:
    """The outcome on the recipe's scale plus the overlong penalty."""
    outcome = response.accuracy if reward.scale == "0/1" else 2.0 * response.accuracy - 1.0
    return outcome + (overlong_penalty(len(response.tokens), max_length, reward.overlong_buffer) if reward.overlong == "shaping" else 0.0)


def overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """0 up to max_length - buffer tokens, then falling linearly to -1 at max_length (DAPO eq. 13)."""
    return min(0.0, (max_length - buffer - length) / buffer)


def group_advantages(rewards: torch.Tensor, normalize: bool) -> torch.Tensor:
    """(R - mean) / (std + 1e-6) over one group's rewards [G], std with G - 1 in the denominator; R - mean without `normalize`.

    A group of equal rewards, or of one, gives exact zeros.
    """
    centred = rewards.double() - rewards.double().mean()
    if rewards.numel() < 2 or bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    if normalize:
        centred = centred / (rewards.double().std() + 1e-6)
    return centred.to(rewards.dtype)


def is_mixed(accuracies: Iterable[float]) -> bool:
    """Whether accuracies differ. Dynamic sampling keeps only such groups: one that is all right or all wrong carries no signal."""
    values = list(accuracies)
    return any(value != values[0] for value in values)
