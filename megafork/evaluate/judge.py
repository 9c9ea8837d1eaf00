"""From responses to what the metrics need: how right each is, and which of them say the same."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megafork.data.prompts import Prompt
from megafork.data.reward import Item, Verifiers
from megafork.data.verifiers import final_answer, last_boxed


class Answered(NamedTuple):
    """A completion as a verifier sees it."""

    text: str
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class Judged:
    """A problem's samples, in order."""

    accuracies: list[float]
    votes: list[int | None]
    """Which of the problem's answers each sample gave; None: none."""
    lengths: list[int]
    truncated: list[bool]
    errors: list[str]
    """Of the verifier, one line each. These samples count as wrong."""


def judge(problems: Sequence[Prompt], responses: Sequence[Sequence[Answered]], verifiers: Verifiers, verifier: str) -> list[Judged]:
    """Judge each problem's responses. `verifier`: its name, which decides what an answer is and when two are the same."""
    items = [(response.text, problem.row) for problem, given in zip(problems, responses, strict=True) for response in given]
    verdicts = iter(verifiers.score(items))
    taken = [list(itertools.islice(verdicts, len(given))) for given in responses]
    accuracies = [[verdict.accuracy for verdict in part] for part in taken]
    answers = [[answer_of(response.text, verifier) for response in given] for given in responses]
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
    r"""What a response answers: for `math` its last box, as that verifier sees it, else `final_answer`. None for nothing."""
    answer = last_boxed(text.rpartition("</think>")[2]) if verifier == "math" else final_answer(text)
    return (answer or "").strip() or None


def _votes(answers: Sequence[str | None]) -> list[int | None]:
    """Answers numbered by their text."""
    numbers: dict[str, int] = {}
    return [None if answer is None else numbers.setdefault(answer, len(numbers)) for answer in answers]


def _votes_of_equals(
    answers: Sequence[Sequence[str | None]], accuracies: Sequence[Sequence[float]], verifiers: Verifiers
) -> list[list[int | None]]:
    """Answers numbered so that mathematically equal ones share a number: 1/2 and 0.5 vote together.

    All that equal the true answer equal each other; each pair of a problem's other answers is put to the verifier.
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
