"""Tuning alike: every recipe with every setting of a grid, on seeds that the comparison does not use; the best of each is compared."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from megafork.ablate.options import AblationOptions, Trial
from megafork.ablate.results import Measured, OutcomeOf, measure, read_outcome
from megafork.ablate.statistics import spread
from megafork.recipe import RecipeError
from megafork.repeated import repeated

Setting = tuple[str, ...]
"""`section.key=value`, one for each key of the grid."""


def settings(grid: Sequence[str]) -> list[Setting]:
    """All combinations of the values in `section.key=v1,v2,...`; values are YAML, and commas inside brackets belong to a value. Raises
    RecipeError."""
    axes: list[list[str]] = []
    for axis in grid:
        key, equals, text = axis.partition("=")
        values = _split(text)
        if not equals or "." not in key or len(values) < 2 or not all(values) or len(set(values)) < len(values):
            raise RecipeError(f"--grid is {axis!r}: give a key and distinct values, such as optimizer.lr=3e-4,7e-4,1.5e-3")
        axes.append([f"{key}={value}" for value in values])
    keys = [axis.partition("=")[0] for axis in grid]
    if twice := repeated(keys):
        raise RecipeError(f"--grid has {twice} twice: give all its values in one --grid")
    return list(itertools.product(*axes))


def slug(setting: Setting) -> str:
    """The setting in the name of a folder."""
    words = (f"{key.rpartition('.')[2]}_{value}" for key, _, value in (part.partition("=") for part in setting))
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", word).strip("_") for word in words)


def tuning_trials(options: AblationOptions) -> list[Trial]:
    """Each recipe with each setting and each tuning seed, one seed after another. Raises RecipeError."""
    every = settings(options.grid)
    names = [slug(setting) for setting in every]
    if twice := repeated(names):
        raise RecipeError(f"--grid has two settings that both make the folder name {twice!r}: write their values apart")
    return [
        options.trial(file, seed, setting, folder=f"{options.out}/tuning", suffix=f"-{slug(setting)}")
        for seed in options.tuning_seeds
        for file in options.recipes
        for setting in every
    ]


def choose(
    options: AblationOptions, trials: Sequence[Trial], failed: Mapping[Trial, str], outcome_of: OutcomeOf = read_outcome
) -> list[dict[str, Any]]:
    """Each recipe's settings with their accuracy after the last step over the tuning seeds.

    [{"recipe", "setting", "runs": [{"seed", "folder", "end"}], "end": {"mean", "sd"}, "complete", "chosen"}]. `chosen` is the setting with
    the highest mean, the first of equals; one with a failed run is not `complete` and cannot be chosen.
    """
    rows: dict[tuple[str, Setting], list[Measured]] = {}
    for trial in trials:
        rows.setdefault((trial.of, trial.setting), [])
        if trial not in failed:
            rows[trial.of, trial.setting].append(measure(trial, outcome_of(trial)))
    table: list[dict[str, Any]] = []
    for (recipe, setting), runs in rows.items():
        ends = [run.values["end"] for run in runs]
        of_runs = [{"seed": run.trial.seed, "folder": str(run.trial.recipe.run_folder), "end": run.values["end"]} for run in runs]
        complete = len(runs) == len(options.tuning_seeds)
        table.append(
            {"recipe": recipe, "setting": list(setting), "runs": of_runs, "end": vars(spread(ends)), "complete": complete, "chosen": False}
        )
    for recipe in dict.fromkeys(row["recipe"] for row in table):
        candidates = [row for row in table if row["recipe"] == recipe and row["complete"]]
        if candidates:
            max(candidates, key=lambda row: row["end"]["mean"])["chosen"] = True
    return table


def _split(text: str) -> list[str]:
    """At commas outside of brackets and quotes: `[0.1,0.2],[0.3,0.4]` is two values."""
    parts, start = [], 0
    for place in [*(n for n, letter in enumerate(text) if letter == ","), len(text)]:
        part = text[start:place]
        try:
            yaml.safe_load(part)
        except yaml.YAMLError:
            continue  # an open bracket: the comma belongs to the value
        parts.append(part.strip())
        start = place + 1
    return parts
