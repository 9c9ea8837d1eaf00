"""The numbers of `megafork eval`: pass@k, maj@k and intervals against brute force, and which answers are equal."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megafork.data.prompts import Prompt
from megafork.data.reward import Verifiers
from megafork.evaluate.judge import Answered, judge
from megafork.evaluate.metrics import estimate, majority_at, pass_at
from megafork.recipe import Reward

SAMPLES = st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 3)), st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=7)


def _subsets(samples: list[Any], k: int) -> list[tuple[Any, ...]]:
    return list(itertools.combinations(samples, k))


@given(SAMPLES, st.data())
def test_pass_at_k_is_the_mean_best_of_all_subsets(samples: list[Any], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(samples)))
    accuracies = [accuracy for _, accuracy in samples]
    best = [max(subset) for subset in _subsets(accuracies, k)]
    assert pass_at(accuracies, k) == pytest.approx(sum(best) / len(best))


@pytest.mark.parametrize(("n", "right", "k"), [(16, 0, 8), (16, 3, 8), (16, 9, 8), (16, 16, 1), (200, 7, 100)])
def test_pass_at_k_is_the_unbiased_estimator(n: int, right: int, k: int) -> None:
    want = 1 - math.comb(n - right, k) / math.comb(n, k)
    assert pass_at([1.0] * right + [0.0] * (n - right), k) == pytest.approx(want, abs=1e-12)


def _majority(subset: tuple[tuple[int | None, float], ...], accuracy: dict[int, float]) -> float:
    votes = [vote for vote, _ in subset if vote is not None]
    if not votes:
        return 0.0
    most = max(votes.count(vote) for vote in votes)
    winners = [vote for vote in set(votes) if votes.count(vote) == most]
    return sum(accuracy[vote] for vote in winners) / len(winners)


@given(SAMPLES, st.data())
def test_maj_at_k_is_the_mean_over_all_subsets(samples: list[Any], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(samples)))
    voters = {vote: [a for other, a in samples if other == vote] for vote, _ in samples if vote is not None}
    accuracy = {vote: sum(each) / len(each) for vote, each in voters.items()}
    want = [_majority(subset, accuracy) for subset in _subsets(samples, k)]
    got = majority_at([a for _, a in samples], [vote for vote, _ in samples], k)
    assert got == pytest.approx(sum(want) / len(want))


def test_maj_at_k_of_many_samples_is_quick() -> None:
    started = time.process_time()
    value = majority_at([1.0] * 20 + [0.0] * 44, [0] * 20 + list(range(1, 45)), 32)
    assert value > 0.99 and time.process_time() - started < 5


def test_the_interval_is_that_of_resampled_problems() -> None:
    """Of problems that are right or wrong, the resampled mean is binomial."""
    n, right = 40, 10
    values = [1.0] * right + [0.0] * (n - right)
    result = estimate(values)
    share = [math.comb(n, c) * (right / n) ** c * (1 - right / n) ** (n - c) for c in range(n + 1)]
    low = next(c for c in range(n + 1) if sum(share[: c + 1]) >= 0.025)
    high = next(c for c in range(n + 1) if sum(share[: c + 1]) >= 0.975)
    assert result.mean == right / n
    assert result.low == pytest.approx(low / n, abs=1e-12) and result.high == pytest.approx(high / n, abs=1e-12)
    assert estimate(values) == result, "the same each time"
    assert estimate([0.3]).low == estimate([0.3]).high == pytest.approx(0.3)


def _problem(answer: str) -> Prompt:
    return Prompt(0, "?", (1,), {"prompt": "?", "answer": answer})


def _answered(*texts: str) -> list[Answered]:
    return [Answered(text, len(text), False) for text in texts]


def test_equal_answers_vote_together() -> None:
    first = _answered(r"\boxed{0.5}", r"\boxed{3}", r"so \boxed{\frac{1}{2}}", r"\boxed{\frac{6}{2}}", "3", r"\boxed{ }", r"\boxed{1/2}")
    second = _answered(r"\boxed{2}</think>\boxed{1}", r"\boxed{1.0}")
    with Verifiers(Reward(verifier="math", overlong="none")) as verifiers:
        one, other = judge([_problem("1/2"), _problem("7")], [first, second], verifiers, "math")
    assert one.accuracies == [1, 0, 1, 0, 0, 0, 1]
    assert one.votes[0] == one.votes[2] == one.votes[6] and one.votes[1] == one.votes[3] != one.votes[0]
    assert one.votes[4:6] == [None, None], "without a box, or with an empty one, it does not vote"
    assert other.accuracies == [0, 0] and other.votes[0] == other.votes[1]
    assert (one.lengths[1], one.errors) == (len(first[1].text), [])


def test_an_answer_in_a_thought_that_the_template_opened_neither_counts_nor_votes() -> None:
    opened = dataclasses.replace(_problem("7"), text="?<think>\n")
    with Verifiers(Reward(verifier="math", overlong="none")) as verifiers:
        (judged,) = judge([opened], [_answered(r"\boxed{7}", r"\boxed{8}</think>\boxed{7}")], verifiers, "math")
    assert judged.accuracies == [0, 1] and judged.votes == [None, 0]


def test_other_verifiers_compare_texts() -> None:
    with Verifiers(Reward(verifier="exact", overlong="none")) as verifiers:
        (judged,) = judge([_problem("5")], [_answered("5", "5.0", " 5 ", "")], verifiers, "exact")
    assert judged.accuracies == [1, 0, 1, 0] and judged.votes == [0, 1, 0, None]
