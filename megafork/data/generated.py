"""Rows of reasoning-gym's tasks, made by `tasks.py` in a process of its own so that they are the same everywhere."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys

from megafork.data.row_files import FORMS, Rows
from megafork.recipe import RecipeError
from megafork.recipe.kinds import shown

MOST_ROWS = 2**20
"""Rows of one source, and how far apart two seeds are."""


def generated_rows(source: str, field: str) -> Rows:
    """Rows {"prompt", "answer", "metadata"} of `reasoning_gym:TASK[:SIZE[:SEED]]`. Raises RecipeError."""
    task, size, seed = _parts(source, field)
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "megafork.data.tasks", task, str(size), str(seed)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},  # six of its tasks iterate over sets
    ) as process:
        assert process.stdout is not None
        for number, line in enumerate(process.stdout, start=1):
            row = json.loads(line)
            _refuse(row, task, source, field)
            yield f"{source} row {number}", row
    if process.returncode:
        raise RecipeError(f"{field} is {source!r}: its generator ended with exit code {process.returncode}; choose another task")


def _parts(source: str, field: str) -> tuple[str, int, int]:
    _, task, *numbers = source.split(":")
    size, seed = [*numbers, *("500", "0")[len(numbers) :]][:2]
    if len(numbers) > 2 or not all(re.fullmatch("[0-9]+", number) for number in (size, seed)) or not size.strip("0"):
        raise RecipeError(f"{field} is {shown(source)}: SIZE must be a whole number above 0 and SEED one of at least 0; {FORMS}")
    for name, number, most in (("SIZE", size, MOST_ROWS), ("SEED", seed, 2**32 - 1)):
        if len(number) > 20 or int(number) > most:
            raise RecipeError(f"{field} is {shown(source)}: {name} is at most {most:,}; choose a smaller one")
    return task, int(size), int(seed)


def _refuse(made: dict[str, object], task: str, source: str, field: str) -> None:
    """Raise RecipeError for what is not a row but the reason why there are none."""
    if "unknown" in made:
        close = difflib.get_close_matches(task, made["unknown"], n=1, cutoff=0.5)  # type: ignore[call-overload]
        fix = f"did you mean {close[0]!r}?" if close else "see reasoning_gym.factory.DATASETS for the names"
        raise RecipeError(f"{field} is {source!r}: reasoning_gym has no task {task!r}: {fix}")
    if "failed" in made:
        raise RecipeError(f"{field} is {source!r}: the task cannot be made with its default settings and this seed ({made['failed']})")
