"""An ablation from its trials to its results: first those that tune, if there is a grid, then those that are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megafork.ablate.grid import choose, tuning_trials
from megafork.ablate.options import AblationOptions, Trial, check_begun
from megafork.ablate.results import Results, summarise
from megafork.data.prompts import problems
from megafork.recipe import Recipe, RecipeError


@dataclass
class Ablation:
    """`preflight` checks a recipe and returns its inputs; `attempt` trains one and returns why it failed, or None; `say` prints a line."""

    options: AblationOptions
    preflight: Callable[[Recipe], Any]
    attempt: Callable[[Recipe], str | None]
    say: Callable[[str], None]
    failed: dict[Trial, str] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what can be refused before anything is trained: a trial for each recipe and setting, and runs of other settings in the
        folder. Raises RecipeError."""
        trials = tuning_trials(self.options) if self.options.grid else self.options.trials()
        held_out: dict[str, str] = {}
        for trial in trials:
            if trial.begun:
                check_begun(trial)
            elif trial.seed == trials[0].seed:
                held_out[problems(self.preflight(trial.recipe).held_out)] = trial.name
        if len(held_out) > 1:
            raise RecipeError(
                f"data.eval shares prompts with data.train, and different ones in {' and '.join(held_out.values())}, so that their "
                "held-out prompts differ: hold out prompts that none of them trains on"
            )

    def run(self) -> Results:
        """Train what is left, and summarise. A trial that fails is reported, and the others continue."""
        if not self.options.grid:
            trials = self.options.trials()
            self._train(trials)
            return summarise(self.options, trials, self.failed)
        tuning = tuning_trials(self.options)
        self._train(tuning)
        table = choose(self.options, tuning, self.failed)
        best = {row["recipe"]: tuple(row["setting"]) for row in table if row["chosen"]}
        for recipe, setting in best.items():
            self.say(f"tuned: {recipe}: {' '.join(setting)}")
        trials = self.options.trials(best)
        for trial in trials:
            if trial.begun:
                check_begun(trial)
        self._train(trials)
        return summarise(self.options, trials, self.failed, tuning=table)

    def _train(self, trials: Sequence[Trial]) -> None:
        for number, trial in enumerate(trials, 1):
            left = "done before" if trial.finished else str(trial.recipe.run_folder)
            self.say(f"run {number} of {len(trials)}: {trial}: {left}")
            if not trial.finished and (why := self.attempt(trial.recipe)):
                self.failed[trial] = why
