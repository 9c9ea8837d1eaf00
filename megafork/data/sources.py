"""Sources of rows: files, the Hugging Face hub, reasoning-gym, or several of these. `rows.py` reads the rows' contents."""

from __future__ import annotations

from pathlib import Path

from megafork.data.generated import generated_rows
from megafork.data.row_files import Rows, data_files, read_file
from megafork.recipe import RecipeError
from megafork.recipe.data import Source, listed


def read_rows(source: Source, field: str) -> Rows:
    """Yield (place, row), where place names the row in messages, as in `train.jsonl line 7`. Rows count from 1.

    `field` is the recipe key that holds `source` (forms: `recipe.Data.train`). Raises RecipeError, at the first row if a source cannot be
    read at all.
    """
    parts = dict.fromkeys(
        part for one in listed(source) for part in ([one] if _is_named(one) else data_files(one, field))
    )  # globs may overlap
    names = [part.name for part in parts if isinstance(part, Path)]
    for part in parts:
        if isinstance(part, Path):
            yield from read_file(part, part.name if names.count(part.name) == 1 else str(part), field)
        else:
            yield from _hub(part, field) if part.startswith("hub:") else generated_rows(part, field)


def _is_named(source: str) -> bool:
    """Whether it is `hub:NAME` or `reasoning_gym:TASK` rather than a path."""
    kind, _, rest = source.partition(":")
    return kind in ("hub", "reasoning_gym") and bool(rest)


def _hub(source: str, field: str) -> Rows:
    _, name, *split = source.split(":", 2)  # a split such as train[:100] contains a colon
    name, _, subset = name.partition("@")
    try:
        import datasets  # an optional extra
    except ModuleNotFoundError:
        raise RecipeError(f"{field} is {source!r}: the package `datasets` is missing; pip install 'megafork[hub]'") from None
    try:
        dataset = datasets.load_dataset(name, subset or None, split=split[0] if split else "train")
        for number, row in enumerate(dataset, start=1):
            yield f"{source} row {number}", row
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"{field} is {source!r}: the dataset could not be loaded; check its name, subset, split and the network ({reason})"
        ) from None
