"""Benchmarks, named on the hub or in a file of the same form."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megafork.data import reward as verifiers
from megafork.data.prompts import Prompt, Remark, load_prompts
from megafork.data.tokenizer import Tokenizer
from megafork.did_you_mean import did_you_mean
from megafork.recipe import Data, RecipeError, Reward
from megafork.repeated import repeated

KNOWN = {
    "aime24": "hub:HuggingFaceH4/aime_2024:train",
    "aime25": "hub:math-ai/aime25:test",
    "amc23": "hub:math-ai/amc23:test",
    "math500": "hub:HuggingFaceH4/MATH-500:test",
    "minerva": "hub:math-ai/minervamath:test",
    "olympiad": "hub:math-ai/olympiadbench:test",
}
"""Sources of the paper's benchmarks."""


@dataclass(frozen=True)
class Benchmark:
    """The distinct problems of a named benchmark. Every row has an `answer` unless the verifier needs none."""

    name: str
    source: str
    problems: list[Prompt]


def load_benchmarks(
    words: tuple[str, ...],
    data: Data,
    *,
    limit: int | None,
    reward: Reward,
    tokenizer: Tokenizer,
    remark: Remark = lambda line: None,
) -> list[Benchmark]:
    """Read each of `words` (`EvaluationOptions.benchmarks`) by the settings in `data`; `reward`: the verifier.

    Repeats of a problem, as in some files of AIME, count as one: they carry no information about other problems, which is what a
    confidence interval is about. Raises RecipeError, naming the benchmark and the problem.
    """
    named = [_named(word) for word in words]
    if (twice := repeated([name for name, _ in named])) is not None:
        raise RecipeError(f"--benchmarks names {twice!r} twice: rename one of them by NAME=SOURCE")
    needs, check_row = verifiers.needs(reward), verifiers.check_row(reward)

    def load(name: str, source: str) -> Benchmark:
        field = f"--benchmarks {name}"
        problems = load_prompts(source, data, tokenizer, needs=needs, check_row=check_row, field=field, remark=remark)
        return Benchmark(name, source, problems[:limit])

    return [load(name, source) for name, source in named]


def _named(word: str) -> tuple[str, str]:
    name, equals, source = word.partition("=")
    if equals:
        return name, source
    if word in KNOWN:
        return word, KNOWN[word]
    if ":" in word:
        return word, word
    if Path(word).suffix or "/" in word or "*" in word or os.path.isdir(os.path.expanduser(word)):
        return Path(word).stem, word
    known = f"known are {', '.join(KNOWN)}, and .jsonl, .json or .parquet files, or folders of them"
    raise RecipeError(f"--benchmarks names {word!r}: {did_you_mean(word, KNOWN, known)}")
