"""A task with long chains of thought, most of whose tokens are forced: walk near a target in an exact number of moves.

    prompt    from 3 to 17 by 2 5 9 moves 6 :
    response  at 3 + 5 = 8 to 17 moves 5 ; at 8 - 2 = 6 to 17 moves 4 ; ...

The model is free to choose each move's sign and size: two forks among its eleven tokens. Result, target, moves left, separators and the end
follow from the text before them. No move leaves LOWEST .. HIGHEST, and the last must end at most NEAR away from the target.

`python recipes/walk/walk.py OUT` writes the files that `recipes/quickstart/countdown.py` writes for its task, with rows
{"prompt", "answer" (the target), "start", "sizes", "moves"}. A recipe names the verifier as `reward.verifier: recipes/walk/walk.py:score`.
"""

from __future__ import annotations

import argparse
import functools
import random
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SIGNS = {"+": 1, "-": -1}
LOWEST, HIGHEST = 0, 24  # places
SIZES = range(1, 10)  # of moves; each problem has three
NEAR = 2  # to the target
MOVES = range(6, 9)  # per problem: responses of 67 to 89 tokens
RIGHT_SHARE = 0.5  # of the warm start's chains
SFT_ROWS, TRAIN_ROWS, HELDOUT_ROWS = 25_600, 4_096, 128


class Problem(NamedTuple):
    start: int
    target: int
    sizes: tuple[int, ...]  # in ascending order
    moves: int


class Move(NamedTuple):
    sign: str
    size: int


# --- the grammar: shared by the verifier and the generator ---


def choices(place: int, sizes: Sequence[int]) -> list[Move]:
    """Every possible move from a place."""
    return [Move(sign, size) for sign in SIGNS for size in sizes if LOWEST <= after(place, Move(sign, size)) <= HIGHEST]


def after(place: int, move: Move) -> int:
    return place + SIGNS[move.sign] * move.size


def is_near(place: int, target: int) -> bool:
    return abs(place - target) <= NEAR


def move_text(place: int, move: Move, target: int, left: int) -> str:
    """left: moves that remain after this one."""
    return f"at {place} {move.sign} {move.size} = {after(place, move)} to {target} moves {left} ;"


# --- the verifier ---


def score(response: str, row: dict[str, Any]) -> float:
    """1.0 if `response` is row["moves"] correctly written moves from row["start"], each by one of row["sizes"], that end near
    int(row["answer"]); else 0.0. The text is compared with every possible next move, so no text raises."""
    words, place, target = response.split(), int(row["start"]), int(row["answer"])
    for left in reversed(range(int(row["moves"]))):
        for move in choices(place, row["sizes"]):
            expected = move_text(place, move, target, left).split()
            if words[: len(expected)] == expected:
                break
        else:
            return 0.0
        words, place = words[len(expected) :], after(place, move)
    return float(not words and is_near(place, target))


# --- problems and chains of thought ---


@functools.cache
def ways(place: int, target: int | None, sizes: tuple[int, ...], moves: int) -> int:
    """The number of walks from `place` of so many moves that end near the target; None: anywhere."""
    if moves == 0:
        return int(target is None or is_near(place, target))
    return sum(ways(after(place, move), target, sizes, moves - 1) for move in choices(place, sizes))


def walk(problem: Problem, right: bool, choose: random.Random) -> list[Move]:
    """One of the walks that end near the target, or of those that don't, all with the same probability."""
    place, moves = problem.start, []
    for left in reversed(range(problem.moves)):
        every = choices(place, problem.sizes)
        places = [after(place, move) for move in every]
        hits = [ways(to, problem.target, problem.sizes, left) for to in places]
        counts = hits if right else [ways(to, None, problem.sizes, left) - hit for to, hit in zip(places, hits, strict=True)]
        moves += choose.choices(every, counts)
        place = after(place, moves[-1])
    return moves


def prompt_text(problem: Problem, sizes: Sequence[int]) -> str:
    return f"from {problem.start} to {problem.target} by {' '.join(map(str, sizes))} moves {problem.moves} :"


def response_text(problem: Problem, moves: Sequence[Move]) -> str:
    place, texts = problem.start, []
    for left, move in zip(reversed(range(problem.moves)), moves, strict=True):
        texts.append(move_text(place, move, problem.target, left))
        place = after(place, move)
    return " ".join(texts)


def make_rows(seed: int, *, sft: int = SFT_ROWS, train: int = TRAIN_ROWS, heldout: int = HELDOUT_ROWS) -> dict[str, list[dict[str, Any]]]:
    """Rows of the files `sft`, `train` and `heldout`; no held-out problem is in the others."""
    choose = random.Random(seed)

    def problem() -> Problem:
        """One that some walks solve and others don't."""
        while True:
            start, target = choose.choices(range(LOWEST, HIGHEST + 1), k=2)
            one = Problem(start, target, tuple(sorted(choose.sample(SIZES, 3))), choose.choice(MOVES))
            if 0 < ways(one.start, one.target, one.sizes, one.moves) < ways(one.start, None, one.sizes, one.moves):
                return one

    def problems(number: int, without: set[Problem]) -> list[Problem]:
        found: dict[Problem, None] = {}
        while len(found) < number:
            if (one := problem()) not in without:
                found[one] = None
        return list(found)

    unseen = problems(heldout, set())
    known = problems(sft + train, set(unseen))

    def row(one: Problem) -> dict[str, Any]:
        sizes = choose.sample(one.sizes, len(one.sizes))
        return {"prompt": prompt_text(one, sizes), "answer": str(one.target), "start": one.start, "sizes": sizes, "moves": one.moves}

    def warm_start_row(one: Problem) -> dict[str, Any]:
        return {"prompt": row(one)["prompt"], "response": response_text(one, walk(one, choose.random() < RIGHT_SHARE, choose))}

    return {
        "sft": [warm_start_row(one) for one in known[:sft]],
        "train": [row(one) for one in known[sft:]],
        "heldout": [row(one) for one in unseen],
    }


def vocabulary() -> list[str]:
    return [*map(str, range(LOWEST, HIGHEST + 1)), *SIGNS, "=", ";", ":", "from", "to", "by", "moves", "at"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the model and data of the walks.")
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--seed", type=int, default=1, help="seed of the problems, their split and the random weights")
    arguments = parser.parse_args()
    countdown = runpy.run_path(str(Path(__file__).parent.parent / "quickstart" / "countdown.py"))
    countdown["write_rows"](arguments.out, make_rows(arguments.seed))
    countdown["write_model"](arguments.out / "model", arguments.seed, words=vocabulary())


if __name__ == "__main__":
    main()
