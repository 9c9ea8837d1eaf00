"""Reads a run folder: metrics.jsonl, recipe.yaml and rollouts/step_*.parquet, in bounded memory whatever the run's size."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import yaml

from megafork.recipe import Recipe, RecipeError

Metrics = dict[str, Any]
"""One line of metrics.jsonl: "step" (int) and metric name -> number or None."""
ORIGIN = "megafork.json"
"""File in hf/ that names the run and the step of the weights."""


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a metrics.jsonl, in file order. A half-written last line (from a killed run) is dropped.

    Raises RecipeError, naming the line, when any other line is not a JSON object with an integer "step".
    """
    try:
        lines = path.read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise RecipeError(f"{str(path)!r} does not exist: give the folder of a run that has written metrics") from None
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise RecipeError(f"{str(path)!r} line {number} is not valid JSON: the file is damaged, remove that line") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise RecipeError(f"{str(path)!r} line {number} is not an object with an integer 'step': remove that line")
        metrics.append(row)
    return metrics


def read_steps(folder: Path) -> list[Metrics]:
    """The lines of a run's metrics.jsonl. Also raises RecipeError when there are none yet."""
    path = folder / "metrics.jsonl"
    metrics = read_metrics(path)
    if not metrics:
        raise RecipeError(f"{str(path)!r} has no complete line: there is no step to report")
    return metrics


def read_recipe(folder: Path) -> dict[str, Any]:
    """The run's resolved recipe as plain sections, or {} if there is none. Not validated: the keys may have changed since the run."""
    path = folder / "recipe.yaml"
    if not path.exists():
        return {}
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    return recipe if isinstance(recipe, dict) else {}


def origin(recipe: Recipe, step: int) -> dict[str, Any]:
    """Contents of the ORIGIN file written next to the weights."""
    return {"run": recipe.run.name, "step": step}


def is_exported(recipe: Recipe, step: int) -> bool:
    """Whether hf/ holds the run's weights after `step`, or no export is wanted."""
    if not recipe.checkpoint.export_hf:
        return True
    try:
        return bool(json.loads((recipe.run_folder / "hf" / ORIGIN).read_text()) == origin(recipe, step))
    except (OSError, ValueError):
        return False


def is_evaluated(recipe: Recipe, step: int) -> bool:
    """Whether the held-out prompts were evaluated after `step`, or there are none."""
    return recipe.data.eval is None or evaluation_file(recipe.run_folder, step).is_file()


def evaluation_file(folder: Path, step: int) -> Path:
    return folder / "evaluations" / f"step_{step:06d}.json"


def operators_file(folder: Path, step: int) -> Path:
    """The most expensive operators of a step profiled with torch (`log.profile`); the trace is in the same folder."""
    return folder / "profile" / f"step_{step:06d}.json"


def read_operators(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """By step, the name, calls, seconds and share of each operator. Raises RecipeError for a damaged file."""
    kinds: dict[str, Callable[[Any], Any]] = {"name": str, "calls": int, "seconds": float, "share": float}
    found = {}
    for path in sorted((folder / "profile").glob("step_*.json"), key=step_of):
        try:
            found[step_of(path)] = [{key: kind(row[key]) for key, kind in kinds.items()} for row in json.loads(path.read_text())]
        except (ValueError, TypeError, KeyError):
            raise RecipeError(f"{str(path)!r} is not a table of operators: remove it") from None
    return found


def rollout_files(folder: Path) -> list[Path]:
    """The run's roll-out files, sorted by the step in their names."""
    return sorted((folder / "rollouts").glob("step_*.parquet"), key=step_of)


def step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step_")
    if not digits.isdigit():
        raise RecipeError(f"{str(path)!r} is not named step_<number>{path.suffix}: rename or remove it")
    return int(digits)


def open_rollouts(path: Path) -> parquet.ParquetFile:
    """Open a roll-out file. Raises RecipeError for a truncated file and for one that is not parquet."""
    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise RecipeError(f"{str(path)!r} is not a complete parquet file ({' '.join(str(error).split())}): remove it") from None


def read_entropies(file: parquet.ParquetFile, *, at_most: int) -> tuple[np.ndarray, np.ndarray]:
    """Entropies (fp32, nats) and fork mask (bool) of the file's first `at_most` response tokens, read one row group at a time.

    Prompts are stored in the order in which they were drawn, so the first tokens are a fair sample of the step.
    """
    entropies, masks, tokens = [], [], 0
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["entropies", "mask"])
        entropies.append(_flat(table, "entropies").astype(np.float32))
        masks.append(_flat(table, "mask").astype(bool))
        tokens += entropies[-1].size
        if tokens >= at_most:
            break
    if not entropies:
        return np.empty(0, np.float32), np.empty(0, bool)
    return np.concatenate(entropies)[:at_most], np.concatenate(masks)[:at_most]


def read_rows(file: parquet.ParquetFile, wanted: Sequence[int]) -> list[dict[str, Any]]:
    """The rows with these indices, in the given order; only the row groups that hold them are read."""
    rows: dict[int, dict[str, Any]] = {}
    start = 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        here = [index for index in wanted if start <= index < start + size]
        if here:
            table = file.read_row_group(group).take([index - start for index in here])
            rows.update(zip(here, table.to_pylist(), strict=True))
        start += size
    return [rows[index] for index in wanted]


def _flat(table: pyarrow.Table, column: str) -> np.ndarray:
    return table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
