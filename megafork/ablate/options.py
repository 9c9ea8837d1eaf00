"""Options of an ablation. Each recipe with each seed is a trial, an ordinary run in its own folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megafork.recipe import Recipe, RecipeError
from megafork.recipe_file import load_recipe
from megafork.run_folder import is_evaluated, is_exported, read_recipe

_OF_THE_TRIAL = ("run.name", "run.folder", "run.seed")
_OF_NO_EFFECT = ("run.ranks", "model.path", "log.", "checkpoint.")
"""Keys that may change when a run is resumed. A checkpoint knows its model."""


@dataclass(frozen=True)
class Trial:
    """One run of the ablation, in OUT/<name>-seed_<seed>/."""

    name: str
    """The recipe's file name without `.yaml`."""
    seed: int
    recipe: Recipe = field(compare=False)

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def begun(self) -> bool:
        return self.recipe.run_folder.exists()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: trained, exported and evaluated."""
        from megafork.weights import checkpoint  # imports megatron

        found = checkpoint.complete(self.recipe.run_folder / "checkpoints")
        step = found[-1][0] if found else 0
        return step >= self.recipe.train.steps and is_exported(self.recipe, step) and is_evaluated(self.recipe, step)


@dataclass(frozen=True)
class AblationOptions:
    """Options of `megafork ablate`."""

    recipes: tuple[str, ...]
    """Files; the first is the baseline of the others."""
    overrides: tuple[str, ...]
    """`section.key=value`, applied to every recipe."""
    seeds: tuple[int, ...]
    out: str

    @classmethod
    def parse(cls, arguments: Sequence[str], seeds: str, out: str) -> AblationOptions:
        """Parse `arguments` (recipes and overrides in any order) and `seeds` (such as "1,2,3"). Raises RecipeError."""
        overrides = [argument for argument in arguments if "=" in argument]
        recipes = list(dict.fromkeys(argument for argument in arguments if "=" not in argument))  # `top_20.yaml *.yaml` names it twice
        if not recipes:
            raise RecipeError("RECIPE is missing: give recipes such as recipes/ablation/all.yaml, the baseline first")
        for override in overrides:
            if override.startswith(_OF_THE_TRIAL):
                raise RecipeError(f"override {override!r} is set for each trial: give --seeds and --out instead")
        words = [word.strip() for word in seeds.split(",")]
        if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
            raise RecipeError(f"--seeds is {seeds!r}: give distinct integers such as 1,2,3")
        return cls(tuple(recipes), tuple(overrides), tuple(map(int, words)), out)

    def trials(self) -> list[Trial]:
        """All trials, one seed after another, so that a comparison is available early. Raises RecipeError for incomparable recipes."""
        names = [Path(file).stem for file in self.recipes]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise RecipeError(f"RECIPE {twice!r} is given twice: trials are told apart by the names of the recipes' files")
        files = dict(zip(names, self.recipes, strict=True))
        every = [Trial(name, seed, self._recipe(file, name, seed)) for seed in self.seeds for name, file in files.items()]
        first = every[0].recipe
        for trial in every:
            if trial.recipe.data.eval is None:
                raise RecipeError(f"data.eval of {trial.name!r} is unset: an ablation compares the accuracy on held-out prompts, name some")
            if (trial.recipe.data.eval, trial.recipe.eval) != (first.data.eval, first.eval):
                raise RecipeError(f"data.eval or the section eval of {trial.name!r} differs from {names[0]!r}: evaluate all alike")
        return every

    def _recipe(self, file: str, name: str, seed: int) -> Recipe:
        own = [f"run.folder={self.out}", f"run.name={name}-seed_{seed}", f"run.seed={seed}"]
        return load_recipe(file, [*self.overrides, *own])


def check_begun(trial: Trial) -> None:
    """Raise RecipeError if the trial's folder holds a run with other settings. A larger number of steps continues the run."""
    folder = trial.recipe.run_folder
    before, now = _flat(read_recipe(folder)), _flat(trial.recipe.model_dump(mode="json"))
    differing = [key for key in before if key in now and before[key] != now[key] and not key.startswith(_OF_NO_EFFECT)]
    for key in differing:
        if key != "train.steps" or before[key] > now[key]:
            was = f"{key}={before[key]}, not {now[key]}"
            raise RecipeError(f"--out has {str(folder)!r}, a run with {was}: choose another --out, or delete it")


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
