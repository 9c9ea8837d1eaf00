"""Benchmarks by name, on the hub or in a file of the same form."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafork.data import reward as verifiers
from megafork.data.prompts import Prompt, load_prompts
from megafork.data.templates import template_text
from megafork.data.tokenizer import Tokenizer
from megafork.recipe import Data, RecipeError, Reward

KNOWN = {
    "aime24": "hub:HuggingFaceH4/aime_2024:train",
    "aime25": "hub:math-ai/aime25:test",
    "amc23": "hub:math-ai/amc23:test",
    "math500": "hub:HuggingFaceH4/MATH-500:test",
    "minerva": "hub:math-ai/minervamath:test",
    "olympiad": "hub:math-ai/olympiadbench:test",
}
"""Where each benchmark of the paper lies. Their problems are called `problem` or `question`, their answers `answer` or `final_answer`."""


@dataclass(frozen=True)
class Benchmark:
    """Problems under a name. Every row has its `answer`, unless the verifier needs none."""

    name: str
    source: str
    problems: list[Prompt]


def load_benchmarks(
    words: tuple[str, ...], *, template: str, limit: int | None, reward: Reward, longest: int, tokenizer: Tokenizer
) -> list[Benchmark]:
    """Read each of `words` (`evaluation.settings.Settings.benchmarks`); `longest`: tokens of a prompt; `reward`: the verifier.

    Problems that a benchmark repeats stay, so that it has its published size. Raises RecipeError, naming the benchmark and the problem.
    """
    text = template_text(template, tokenizer)
    named = [_named(word) for word in words]
    names = [name for name, _ in named]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"--benchmarks names {twice!r} twice: give one of them another name, as in NAME=SOURCE")
    return [_load(name, source, text, limit, reward, longest, tokenizer) for name, source in named]


def _named(word: str) -> tuple[str, str]:
    name, equals, source = word.partition("=")
    if equals:
        return name, source
    if word in KNOWN:
        return word, KNOWN[word]
    if ":" in word or Path(word).suffix:
        return word if ":" in word else Path(word).stem, word
    close = difflib.get_close_matches(word, KNOWN, n=1, cutoff=0.4)
    mend = f"did you mean {close[0]!r}? Known are" if close else "known are"
    raise RecipeError(f"--benchmarks names {word!r}: {mend} {', '.join(KNOWN)}, and files that end in .jsonl or .parquet")


def _load(name: str, source: str, template: str, limit: int | None, reward: Reward, longest: int, tokenizer: Tokenizer) -> Benchmark:
    data = Data(train=source, template=template, max_prompt_length=longest, deduplicate=False)
    needs = verifiers.needs(reward)
    others = tuple(field for field in needs if field != "answer")  # an answer may have another name
    field = f"--benchmarks {name}"
    problems = []
    for prompt in load_prompts(source, data, tokenizer, needs=others, check_row=verifiers.check_row(reward), field=field)[:limit]:
        answer = _answer(prompt.row)
        if answer is None and needs == ("answer",):  # a task of reasoning-gym may have many right answers and name none
            raise RecipeError(
                f"--benchmarks {name}: problem {prompt.index + 1} of {source!r} has no answer (its fields: {', '.join(prompt.row)}): "
                'give it an "answer", or delete the row'
            )
        problems.append(dataclasses.replace(prompt, row={**prompt.row, "answer": answer}))
    return Benchmark(name, source, problems)


def _answer(row: dict[str, Any]) -> Any:
    """The row's answer, None for none; OlympiadBench lists several, each between dollar signs."""
    answer = row["final_answer"] if row.get("answer") is None and "final_answer" in row else row.get("answer")
    if isinstance(answer, list):
        answer = ", ".join(str(part).strip().strip("$") for part in answer)
    return None if isinstance(answer, str) and not answer.strip() else answer
