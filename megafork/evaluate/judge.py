"""Judges responses for the metrics: the accuracy of each, and which of them give the same answer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megafork.data.prompts import Prompt
from megafork.data.reward import Item, Verifiers, as_judged
from megafork.data.verifiers import after_thinking, final_answer, last_boxed


class Answered(NamedTuple):
    """A completion as a verifier sees it."""

    text: str
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class Judged:
    """A problem's judged samples, in order."""

    accuracies: list[float]
    votes: list[int | None]
    """Number of the answer that each sample gave; None if it gave none."""
    lengths: list[int]
    truncated: list[bool]
    errors: list[str]
    """The verifier's errors, one line each. Their samples count as wrong."""


def judge(problems: Sequence[Prompt], responses: Sequence[Sequence[Answered]], verifiers: Verifiers, verifier: str) -> list[Judged]:
    """Judge each problem's responses. `verifier`: its name, which determines what an answer is and when two are equal."""
    texts = [
        [as_judged(response.text, problem.text, verifier) for response in given] for problem, given in zip(problems, responses, strict=True)
    ]
    items = [(text, problem.row) for problem, given in zip(problems, texts, strict=True) for text in given]
    verdicts = iter(verifiers.score(items))
    taken = [list(itertools.islice(verdicts, len(given))) for given in responses]
    accuracies = [[verdict.accuracy for verdict in part] for part in taken]
    answers = [[answer_of(text, verifier) for text in given] for given in texts]
    votes = _votes_of_equals(answers, accuracies, verifiers) if verifier == "math" else [_votes(given) for given in answers]
    return [
        Judged(
            accuracies=right,
            votes=voted,
            lengths=[response.tokens for response in given],
            truncated=[response.truncated for response in given],
            errors=[verdict.error for verdict in part if verdict.error],
        )
        for given, part, right, voted in zip(responses, taken, accuracies, votes, strict=True)
    ]


def answer_of(text: str, verifier: str) -> str | None:
    r"""A response's answer: for `math` its last box, as read by that verifier, else `final_answer`. None if there is none."""
    answer = last_boxed(after_thinking(text)) if verifier == "math" else final_answer(text)
    return (answer or "").strip() or None


def _votes(answers: Sequence[str | None]) -> list[int | None]:
    """Number the answers by their text."""
    numbers: dict[str, int] = {}
    return [None if answer is None else numbers.setdefault(answer, len(numbers)) for answer in answers]


def _votes_of_equals(
    answers: Sequence[Sequence[str | None]], accuracies: Sequence[Sequence[float]], verifiers: Verifiers
) -> list[list[int | None]]:
    """Number the answers so that mathematically equal ones share a number: 1/2 and 0.5 vote together.

    All correct answers are equal to each other; each pair of a problem's other answers is compared by the verifier.
    """
    votes = [_votes(given) for given in answers]
    same: list[dict[int | None, int | None]] = []
    pairs: list[tuple[int, int | None, int | None]] = []
    items: list[Item] = []
    for problem, (voted, given, accuracy) in enumerate(zip(votes, answers, accuracies, strict=True)):
        right = [vote for vote, good in zip(voted, accuracy, strict=True) if good]
        wrong = {vote: text for vote, text in zip(voted, given, strict=True) if text is not None and vote not in right}
        same.append(dict.fromkeys(right, right[0] if right else None))
        for one, other in itertools.combinations(wrong, 2):
            pairs.append((problem, one, other))
            items.append((f"\\boxed{{{wrong[other]}}}", {"answer": wrong[one]}))
    for (problem, one, other), verdict in zip(pairs, verifiers.score(items), strict=True):
        if verdict.accuracy and other not in same[problem]:
            same[problem][other] = same[problem].get(one, one)
    return [[same[problem].get(vote, vote) for vote in voted] for problem, voted in enumerate(votes)]
