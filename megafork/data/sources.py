"""Where rows come from: jsonl and parquet files, the Hugging Face hub, reasoning-gym. `prompts.py` makes prompts of them."""

from __future__ import annotations

import difflib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megafork.recipe import RecipeError

Rows = Iterator[tuple[str, dict[str, Any]]]
_FORMS = "give a .jsonl or .parquet file, hub:NAME[@SUBSET][:SPLIT], or reasoning_gym:TASK[:SIZE[:SEED]]"


def read_rows(source: str, field: str) -> Rows:
    """Yield (place, row), where place names the row for a message, as in `train.jsonl line 7`. Rows count from 1.

    `field` is the recipe key that holds `source`. Raises RecipeError, at the first row for a source that cannot be read at all.
    """
    kind, _, rest = source.partition(":")
    if kind == "hub" and rest:
        return _hub(source, field)
    if kind == "reasoning_gym" and rest:
        return _reasoning_gym(source, field)
    path = Path(source)
    readers = {".jsonl": _json_lines, ".json": _json_lines, ".parquet": _parquet}
    if path.suffix not in readers:
        raise RecipeError(f"{field} is {source!r}: unknown form of data; {_FORMS}")
    if not path.is_file():
        raise RecipeError(f"{field} is {source!r}: no such file; {_FORMS}")
    return readers[path.suffix](path, field)


def _json_lines(path: Path, field: str) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path.name} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RecipeError(f"{field}: {place} is not valid JSON: mend or delete it ({error})") from None
            if not isinstance(row, dict):
                raise RecipeError(
                    f'{field}: {place} is a {type(row).__name__}: each line must be one JSON object such as {{"prompt": ...}}'
                )
            yield place, row


def _parquet(path: Path, field: str) -> Rows:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):  # DAPO-Math's public file has 1.8 million rows, most of them repeats
                for number, row in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020 - the count goes on over batches
                    yield f"{path.name} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"{field} is {str(path)!r}: not a readable parquet file after row {number}; write it again ({reason})") from None


def _hub(source: str, field: str) -> Rows:
    _, name, *split = source.split(":", 2)  # a split such as train[:100] has a colon of its own
    name, _, subset = name.partition("@")
    try:
        import datasets  # an optional extra
    except ModuleNotFoundError:
        raise RecipeError(f"{field} is {source!r}: the package `datasets` is missing; pip install 'megafork[hub]'") from None
    try:
        dataset = datasets.load_dataset(name, subset or None, split=split[0] if split else "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"{field} is {source!r}: the dataset could not be loaded; check its name, subset, split and the network ({reason})"
        ) from None
    for number, row in enumerate(dataset, start=1):
        yield f"{source} row {number}", row


def _reasoning_gym(source: str, field: str) -> Rows:
    """Rows {"prompt", "answer", "metadata"}, made by `tasks.py` in a process of its own so that they are the same everywhere."""
    _, task, *numbers = source.split(":")
    size, seed = [*numbers, *("500", "0")[len(numbers) :]][:2]
    if len(numbers) > 2 or not (size.isdecimal() and seed.isdecimal() and int(size) > 0):
        raise RecipeError(f"{field} is {source!r}: SIZE must be a whole number above 0 and SEED one of at least 0; {_FORMS}")
    result = subprocess.run(
        [sys.executable, "-m", "megafork.data.tasks", task, size, seed],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONHASHSEED": "0"},  # six of its tasks iterate over sets
        check=False,
    )
    if result.returncode:
        raise RecipeError(f"{field} is {source!r}: its generator ended with exit code {result.returncode}; choose another task")
    made = pickle.loads(result.stdout)
    if "unknown" in made:
        close = difflib.get_close_matches(task, made["unknown"], n=1, cutoff=0.5)
        mend = f"did you mean {close[0]!r}?" if close else "see reasoning_gym.factory.DATASETS for the names"
        raise RecipeError(f"{field} is {source!r}: reasoning_gym has no task {task!r}: {mend}")
    if "failed" in made:
        raise RecipeError(f"{field} is {source!r}: the task cannot be made with its default settings ({made['failed']})")
    for number, row in enumerate(made["rows"], start=1):
        yield f"{source} row {number}", row
