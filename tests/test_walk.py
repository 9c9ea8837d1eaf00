"""The walks: most tokens of every chain are forced by the grammar, the verifier knows right from wrong, the files are reproducible."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megafork.recipe_file import load_recipe
from megafork.user_code import import_file

RECIPES = Path(__file__).parents[1] / "recipes"
walk = import_file(RECIPES / "walk" / "walk.py", "walk")


@st.composite
def problems(draw: st.DrawFn) -> walk.Problem:  # type: ignore[name-defined]
    places = st.integers(walk.LOWEST, walk.HIGHEST)
    sizes = draw(st.lists(st.sampled_from(walk.SIZES), min_size=3, max_size=3, unique=True))
    return walk.Problem(draw(places), draw(places), tuple(sorted(sizes)), draw(st.sampled_from(walk.MOVES)))


def chain(problem: walk.Problem, seed: int) -> list[walk.Move]:  # type: ignore[name-defined]
    """A walk anywhere: every possible one may come out."""
    choose, place, moves = random.Random(seed), problem.start, []
    for _ in range(problem.moves):
        moves.append(choose.choice(walk.choices(place, problem.sizes)))
        place = walk.after(place, moves[-1])
    return moves


def options(problem: walk.Problem, moves: list[walk.Move]) -> Iterator[int]:  # type: ignore[name-defined]
    """For each token of the chain, and its end, the number of tokens that the grammar allows after what came before.

    Every move that is possible from a place is written out; what is allowed next is what any of those with the same beginning goes on with.
    """
    place = problem.start
    for left, move in zip(reversed(range(problem.moves)), moves, strict=True):
        texts = [walk.move_text(place, other, problem.target, left).split() for other in walk.choices(place, problem.sizes)]
        ours = walk.move_text(place, move, problem.target, left).split()
        for token in range(len(ours)):
            yield len({text[token] for text in texts if text[:token] == ours[:token]})
        place = walk.after(place, move)
    yield 1  # <eos>: the moves are counted


@given(problems(), st.integers(0, 2**32))
def test_chains_are_long_and_at_least_three_quarters_of_their_tokens_are_forced(problem: walk.Problem, seed: int) -> None:  # type: ignore[name-defined]
    moves = chain(problem, seed)
    allowed = list(options(problem, moves))
    assert len(allowed) == len(walk.response_text(problem, moves).split()) + 1
    assert 60 <= len(allowed) <= 150
    assert 0.8 < sum(count == 1 for count in allowed) / len(allowed) < 0.95
    assert max(allowed) > 1, "and some are chosen"


def test_the_share_of_forced_tokens_in_the_warm_starts_chains() -> None:
    """83.1% of all tokens, and of no chain less than 82%."""
    rows = walk.make_rows(1, sft=400, train=1, heldout=1)["sft"]
    counts = []
    for row in rows:
        words = row["prompt"].split()
        sizes = tuple(sorted(map(int, words[5:8])))
        problem = walk.Problem(int(words[1]), int(words[3]), sizes, int(words[9]))
        text = row["response"].split()
        counts.append(list(options(problem, [walk.Move(text[at + 2], int(text[at + 3])) for at in range(0, len(text), 11)])))
    shares = [sum(count == 1 for count in allowed) / len(allowed) for allowed in counts]
    total = sum(count == 1 for allowed in counts for count in allowed) / sum(map(len, counts))
    assert total == pytest.approx(0.831, abs=0.003) and min(shares) > 0.82
    assert min(map(len, counts)) >= 60 and max(map(len, counts)) <= 150


ROW = {"start": 3, "answer": "17", "sizes": [2, 9, 5], "moves": 2}
RIGHT = "at 3 + 5 = 8 to 17 moves 1 ; at 8 + 9 = 17 to 17 moves 0 ;"


def test_the_right_chain_and_wrong_ones() -> None:
    for right in (RIGHT, RIGHT.replace(" ", "\n "), "at 3 + 9 = 12 to 17 moves 1 ; at 12 + 5 = 17 to 17 moves 0 ;"):
        assert walk.score(right, ROW) == 1.0
    assert walk.score(RIGHT.replace("to 17", "to 19"), {**ROW, "answer": "19"}) == 1.0
    wrong = {
        "misses": "at 3 + 5 = 8 to 17 moves 1 ; at 8 + 5 = 13 to 17 moves 0 ;",
        "misses by three": "at 3 + 9 = 12 to 17 moves 1 ; at 12 + 2 = 14 to 17 moves 0 ;",
        "a size that the problem lacks": "at 3 + 7 = 10 to 17 moves 1 ; at 10 + 7 = 17 to 17 moves 0 ;",
        "wrong arithmetic": "at 3 + 5 = 8 to 17 moves 1 ; at 8 + 5 = 17 to 17 moves 0 ;",
        "another target": RIGHT.replace("to 17 moves 1", "to 16 moves 1"),
        "below zero": "at 3 - 5 = -2 to 17 moves 1 ; at -2 + 9 = 17 to 17 moves 0 ;",
        "too few moves": RIGHT.split(" ;")[0] + " ;",
        "too many moves": RIGHT + " at 17 + 2 = 19 to 17 moves 0 ;",
        "cut off": RIGHT[:-2],
        "nothing": "",
    }
    assert {why: walk.score(text, ROW) for why, text in wrong.items()} == dict.fromkeys(wrong, 0.0)


@given(problems(), st.integers(0, 2**32))
def test_the_verifier_rewards_what_ends_near_the_target(problem: walk.Problem, seed: int) -> None:  # type: ignore[name-defined]
    moves, row = (
        chain(problem, seed),
        {"start": problem.start, "answer": str(problem.target), "sizes": problem.sizes, "moves": problem.moves},
    )
    end = problem.start
    for move in moves:
        end += {"+": 1, "-": -1}[move.sign] * move.size
    assert walk.score(walk.response_text(problem, moves), row) == float(end - 2 <= problem.target <= end + 2)


@given(problems(), st.integers(0, 2**32), st.booleans())
def test_drawn_walks_are_right_or_wrong_as_wanted(problem: walk.Problem, seed: int, right: bool) -> None:  # type: ignore[name-defined]
    hits = walk.ways(problem.start, problem.target, problem.sizes, problem.moves)
    every = walk.ways(problem.start, None, problem.sizes, problem.moves)
    if 0 < hits < every:
        row = {"start": problem.start, "answer": str(problem.target), "sizes": problem.sizes, "moves": problem.moves}
        moves = walk.walk(problem, right, random.Random(seed))
        assert walk.score(walk.response_text(problem, moves), row) == float(right)


def test_the_files_are_reproducible_and_fit_the_recipes() -> None:
    few = {"sft": 50, "train": 50, "heldout": 20}
    rows = walk.make_rows(1, **few)
    assert rows == walk.make_rows(1, **few) != walk.make_rows(2, **few)
    assert {name: len(part) for name, part in rows.items()} == few

    def problem(prompt: str) -> tuple[str, ...]:
        words = prompt.split()
        return (*words[:5], *sorted(words[5:8]), *words[8:])

    held_out = {problem(row["prompt"]) for row in rows["heldout"]}
    assert len(held_out) == 20 and not held_out & {problem(row["prompt"]) for name in ("sft", "train") for row in rows[name]}
    words = {word for name in rows for row in rows[name] for word in f"{row['prompt']} {row.get('response', '')}".split()}
    assert words <= set(walk.vocabulary())
    for name in ("sft", "train"):
        recipe = load_recipe(RECIPES / "walk" / f"{name}.yaml")
        assert max(len(row["prompt"].split()) for part in rows.values() for row in part) <= recipe.data.max_prompt_length
        assert recipe.rollout.max_response_length >= 11 * max(walk.MOVES) + 1
        assert recipe.longest_sequence <= 128  # positions of the model
