"""Rewards and group advantages against numbers worked out by hand and against statistics in exact arithmetic."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from responses import make_responses
from tiny import recipe

from megafork.recipe import Recipe
from megafork.rl.advantage import group_advantages, is_mixed, overlong_penalty, set_advantages
from megafork.rl.batch import Response

REWARDS = st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.25]) | st.floats(-2, 2, width=32), min_size=1, max_size=16)


def spec(**sections: dict[str, Any]) -> Recipe:
    return recipe(Path("unused"), **sections)


def responses(accuracies: list[float], *, length: int = 4, group: int = 0) -> list[Response]:
    made = make_responses([(3, length)] * len(accuracies), samples=len(accuracies))
    return [replace(response, group=group, accuracy=accuracy) for response, accuracy in zip(made, accuracies, strict=True)]


@settings(deadline=None)
@given(REWARDS)
@example([1.0, 0.0])
@example([0.1] * 7)  # the fp32 mean of equal values need not equal them
def test_group_advantages_equal_the_formula(rewards: list[float]) -> None:
    values = torch.tensor(rewards, dtype=torch.float32)
    held = values.double().tolist()
    normalized, centred = (group_advantages(values, normalize).tolist() for normalize in (True, False))
    if len(set(held)) == 1:
        assert normalized == centred == [0.0] * len(held)
        return
    mean, std = statistics.fmean(held), statistics.stdev(held)  # stdev divides by G - 1
    assert centred == pytest.approx([r - mean for r in held], rel=1e-5, abs=1e-7)
    assert normalized == pytest.approx([(r - mean) / (std + 1e-6) for r in held], rel=1e-5, abs=1e-7)


def test_one_right_of_four() -> None:
    assert group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), True).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), False).tolist() == [0.75, -0.25, -0.25, -0.25]


def test_each_group_has_its_own_mean_whatever_the_order() -> None:
    right, mixed, wrong = responses([1.0, 1.0], group=7), responses([1.0, 0.0], group=2), responses([0.0, 0.0], group=4)
    shuffled = [mixed[1], right[0], wrong[1], mixed[0], wrong[0], right[1]]
    set_advantages(shuffled, spec(loss={"normalize_advantage": False}))
    assert [r.advantage for r in mixed] == [0.5, -0.5]
    assert [r.advantage for r in right + wrong] == [0.0] * 4
    assert [r.reward for r in right + mixed + wrong] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_normalize_advantage_reaches_the_responses() -> None:
    group = responses([1.0, 0.0, 0.0, 0.0])
    set_advantages(group, spec())
    assert [r.advantage for r in group] == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)


@pytest.mark.parametrize(("length", "penalty"), [(1, 0.0), (24, 0.0), (25, -0.125), (28, -0.5), (31, -0.875), (32, -1.0)])
def test_overlong_penalty_grows_over_the_buffer(length: int, penalty: float) -> None:
    """DAPO eq. 13 with L_max 32 and a buffer of 8."""
    assert overlong_penalty(length, 32, 8) == penalty


@pytest.mark.parametrize(("scale", "right", "wrong"), [("0/1", 1.0, 0.0), ("+-1", 1.0, -1.0)])
@pytest.mark.parametrize("overlong", ["shaping", "filter", "none"])
def test_reward_scale_and_penalty(scale: str, right: float, wrong: float, overlong: str) -> None:
    rewards = {"scale": scale, "overlong": overlong, "overlong_buffer": 8}
    long, short = responses([1.0, 0.0], length=30, group=0), responses([1.0, 0.0], length=24, group=1)
    set_advantages(long + short, spec(reward=rewards, rollout={"max_response_length": 32}))
    penalty = -0.75 if overlong == "shaping" else 0.0
    assert [r.reward for r in long] == [right + penalty, wrong + penalty]
    assert [r.reward for r in short] == [right, wrong]


def test_partial_credit_lies_on_the_scale() -> None:
    group = responses([0.25, 0.75])
    set_advantages(group, spec(reward={"scale": "+-1", "overlong": "none"}))
    assert [r.reward for r in group] == [-0.5, 0.5]


def test_the_penalty_alone_gives_advantages_to_a_group_that_is_all_right() -> None:
    group = [*responses([1.0], length=32), *responses([1.0], length=8)]
    group[1].sample = 1
    rewards = {"overlong": "shaping", "overlong_buffer": 8}
    set_advantages(group, spec(reward=rewards, rollout={"max_response_length": 32}, loss={"normalize_advantage": False}))
    assert [r.advantage for r in group] == [-0.5, 0.5]


@pytest.mark.parametrize(
    ("accuracies", "mixed"),
    [([], False), ([1.0], False), ([0.0, 0.0], False), ([1.0, 1.0, 1.0], False), ([1.0, 1.0, 0.0], True), ([0.5, 0.0], True)],
)
def test_dynamic_sampling_keeps_groups_whose_accuracies_differ(accuracies: list[float], mixed: bool) -> None:
    assert is_mixed(accuracies) is mixed
    assert is_mixed(iter(accuracies)) is mixed
