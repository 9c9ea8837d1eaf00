"""The quickstart's task, and the pattern for bringing your own: combine numbers until they make a target.

    prompt    2 7 3 5 make 24 :
    response  7 - 3 = 4 left 2 5 4 ; 2 + 4 = 6 left 5 6 ; 5 * 6 = 30 answer 30

Which two numbers to combine, and how, is free: these are the chain of thought's forks. Every result, separator and remaining number
follows from what stands before. (The response above is valid arithmetic but misses the target: it scores 0.)

`python recipes/quickstart/countdown.py OUT` writes

    OUT/model/         a small Qwen3 with random weights, as a Hugging Face folder with its tokenizer
    OUT/sft.jsonl      {"prompt", "response"}: the warm start's chains; a share of them reaches the target, the others miss it
    OUT/train.jsonl    {"prompt", "answer", "numbers"}: problems for reinforcement learning
    OUT/heldout.jsonl  the same, of problems that occur in neither of the other files

and a recipe names the verifier as `reward.verifier: recipes/quickstart/countdown.py:score`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
LARGEST = 60  # results of the generated chains lie in 1 .. LARGEST, so every number is one token

Problem = tuple[tuple[int, ...], int]  # sorted numbers, target
Step = tuple[int, str, int, int]  # a, operation, b, result


# --- the verifier ---


def score(response: str, row: dict[str, Any]) -> float:
    """1.0 if `response` combines row["numbers"], each exactly once and by right arithmetic, into int(row["answer"]); else 0.0.

    Every step and every list of remaining numbers is checked, so neither wrong arithmetic nor the bare answer earns anything.
    """
    left = [int(number) for number in row["numbers"]]
    words = response.split()
    while len(left) > 1:
        step, words = words[:5], words[5:]
        if not _apply(step, left):
            return 0.0
        label, end = ("left", [";"]) if len(left) > 1 else ("answer", [])
        claim = [label, *map(str, left), *end]
        if words[: len(claim)] != claim:
            return 0.0
        words = words[len(claim) :]
    return float(not words and left == [int(row["answer"])])


def _apply(step: list[str], left: list[int]) -> bool:
    """Take "a op b = result" out of the numbers left and put the result at their end; False if it is not a valid step."""
    if len(step) != 5 or step[1] not in OPERATIONS or step[3] != "=":
        return False
    for word in (step[0], step[2]):
        number = next((number for number in left if str(number) == word), None)
        if number is None:
            return False
        left.remove(number)
    left.append(OPERATIONS[step[1]](int(step[0]), int(step[2])))
    return step[4] == str(left[-1])


# --- problems and chains ---


def moves(left: Sequence[int]) -> list[Step]:
    """Every step possible from the numbers left whose result lies in 1 .. LARGEST."""
    return [
        (a, name, b, result)
        for a, b in itertools.permutations(left, 2)
        for name, operation in OPERATIONS.items()
        if 1 <= (result := operation(a, b)) <= LARGEST
    ]


def after(left: Sequence[int], step: Step) -> list[int]:
    """The numbers left after a step: the others in their order, then the result."""
    rest = list(left)
    rest.remove(step[0])
    rest.remove(step[2])
    return [*rest, step[3]]


def chains(left: Sequence[int]) -> Iterator[list[Step]]:
    """Every chain of steps that uses up the numbers."""
    if len(left) == 1:
        yield []
        return
    for step in moves(left):
        for tail in chains(after(left, step)):
            yield [step, *tail]


def prompt_text(numbers: Sequence[int], target: int) -> str:
    return f"{' '.join(map(str, numbers))} make {target} :"


def response_text(numbers: Sequence[int], chain: Iterable[Step]) -> str:
    left, words = list(numbers), []
    for step in chain:
        left = after(left, step)
        a, name, b, result = step
        words.append(f"{a} {name} {b} = {result} " + (f"left {' '.join(map(str, left))} ;" if len(left) > 1 else f"answer {result}"))
    return " ".join(words)
