"""Options of an ablation. Each recipe with each seed, and each setting that is tried, is a trial: an ordinary run in its own folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from megafork.recipe import Recipe, RecipeError
from megafork.recipe_file import load_recipe
from megafork.run_folder import is_evaluated, is_exported, read_recipe

OF_THE_TRIAL = ("run.name", "run.folder", "run.seed")
OF_NO_EFFECT = ("run.ranks", "model.path", "log.", "checkpoint.", "rollout.max_empty_steps")
"""Keys that may change when a run is resumed. A checkpoint knows its model; a run that reached its last step was not ended for having
nothing to learn from."""


Common = Literal["updates", "tokens"]
"""What runs are compared at: the same number of updates, or of tokens whose loss went through the backward."""


@dataclass(frozen=True)
class Trial:
    """One run of the ablation, in OUT/<name>-seed_<seed>/, or in OUT/tuning/."""

    name: str
    """The recipe's file name without `.yaml`, and the setting if it is being tried."""
    seed: int
    recipe: Recipe = field(compare=False)
    of: str = ""
    """The recipe's file name without `.yaml`."""
    setting: tuple[str, ...] = ()
    """Of the grid, as overrides."""
    arguments: tuple[str, ...] = field(default=(), compare=False)
    """Of the `megafork train` that does the same: the recipe's file and its overrides."""

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def begun(self) -> bool:
        return self.recipe.run_folder.exists()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: trained, exported, evaluated and reported."""
        from megafork.weights import checkpoint  # imports megatron

        found = checkpoint.complete(self.recipe.run_folder / "checkpoints")
        step = found[-1][0] if found else 0
        done = step >= self.recipe.train.steps and is_exported(self.recipe, step) and is_evaluated(self.recipe, step)
        return done and (self.recipe.run_folder / "report.html").exists()


@dataclass(frozen=True)
class AblationOptions:
    """Options of `megafork ablate`."""

    recipes: tuple[str, ...]
    """Files; the first is the baseline of the others."""
    overrides: tuple[str, ...]
    """`section.key=value`, applied to every recipe."""
    seeds: tuple[int, ...]
    out: str
    grid: tuple[str, ...] = ()
    """`section.key=v1,v2,...`: values that each recipe is tuned over."""
    tuning_seeds: tuple[int, ...] = ()
    common: Common = "updates"
    parallel: int = 1
    """Runs at once."""
    record: str | None = None
    """File of finished runs (`record.py`)."""

    @classmethod
    def parse(
        cls,
        arguments: Sequence[str],
        seeds: str,
        out: str,
        grid: Sequence[str] = (),
        tuning_seeds: str | None = None,
        common: str = "updates",
        parallel: int = 1,
        record: str | None = None,
    ) -> AblationOptions:
        """Parse `arguments` (recipes and overrides in any order), and seeds such as "1,2,3". Raises RecipeError."""
        overrides = [argument for argument in arguments if "=" in argument]
        recipes = list(dict.fromkeys(argument for argument in arguments if "=" not in argument))  # `top_20.yaml *.yaml` names it twice
        if not recipes:
            raise RecipeError("RECIPE is missing: give recipes such as recipes/ablation/all.yaml, the baseline first")
        for override in overrides:
            if override.startswith(OF_THE_TRIAL):
                raise RecipeError(f"override {override!r} is set for each trial: give --seeds and --out instead")
        if common not in get_args(Common):
            raise RecipeError(f"--common is {common!r}: must be one of {', '.join(get_args(Common))}")
        if bool(grid) != (tuning_seeds is not None):
            have, miss = ("--grid", "--tuning-seeds") if grid else ("--tuning-seeds", "--grid")
            raise RecipeError(f"{have} is given without {miss}: a grid is tuned on seeds of its own, such as --tuning-seeds 11,12")
        numbers, tuning = _seeds("--seeds", seeds), _seeds("--tuning-seeds", tuning_seeds) if tuning_seeds is not None else ()
        if both := sorted(set(numbers) & set(tuning)):
            raise RecipeError(f"--tuning-seeds has {both[0]}, as --seeds has: a setting is not compared on the seeds that it was chosen on")
        if parallel < 1:
            raise RecipeError(f"--parallel is {parallel}: give the number of runs at once, 1 or more")
        return cls(tuple(recipes), tuple(overrides), numbers, out, tuple(grid), tuning, common, parallel, record)  # type: ignore[arg-type]

    def trials(self, settings: Mapping[str, tuple[str, ...]] | None = None) -> list[Trial]:
        """All compared trials, one seed after another, so that a comparison is available early.

        Raises RecipeError for incomparable recipes.
        settings: of each recipe, after tuning; recipes that are missing from it have no trial.
        """
        names = [Path(file).stem for file in self.recipes]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise RecipeError(f"RECIPE {twice!r} is given twice: trials are told apart by the names of the recipes' files")
        files = {name: file for name, file in zip(names, self.recipes, strict=True) if settings is None or name in settings}
        every = [self.trial(file, seed, (settings or {}).get(name, ())) for seed in self.seeds for name, file in files.items()]
        if not every:
            return []
        first = every[0].recipe
        for trial in every:
            if trial.recipe.data.eval is None:
                raise RecipeError(f"data.eval of {trial.name!r} is unset: an ablation compares the accuracy on held-out prompts, name some")
            if (trial.recipe.data.eval, trial.recipe.eval) != (first.data.eval, first.eval):
                raise RecipeError(f"data.eval or the section eval of {trial.name!r} differs from {names[0]!r}: evaluate all alike")
        return every

    def trial(self, file: str, seed: int, setting: tuple[str, ...], *, folder: str | None = None, suffix: str = "") -> Trial:
        """The recipe in `file` with one setting of the grid and one seed; `suffix` is added to its name. Raises RecipeError."""
        stem = Path(file).stem
        own = (f"run.folder={folder or self.out}", f"run.name={stem}{suffix}-seed_{seed}", f"run.seed={seed}")
        overrides = (*self.overrides, *setting, *own)
        return Trial(stem + suffix, seed, load_recipe(file, list(overrides)), stem, setting, (file, *overrides))


def _seeds(option: str, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise RecipeError(f"{option} is {text!r}: give distinct integers such as 1,2,3")
    return tuple(map(int, words))


def check_begun(trial: Trial) -> None:
    """Raise RecipeError if the trial's folder holds a run with other settings. A larger number of steps continues the run."""
    folder = trial.recipe.run_folder
    before, now = flat(read_recipe(folder)), flat(trial.recipe.model_dump(mode="json"))
    differing = [key for key in before if key in now and before[key] != now[key] and not key.startswith(OF_NO_EFFECT)]
    for key in differing:
        if key != "train.steps" or before[key] > now[key]:
            was = f"{key}={before[key]}, not {now[key]}"
            raise RecipeError(f"--out has {str(folder)!r}, a run with {was}: choose another --out, or delete it")


def flat(sections: dict[str, Any]) -> dict[str, Any]:
    """By `section.key`."""
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
