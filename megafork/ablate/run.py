"""An ablation from its trials to its results: first those that tune, if there is a grid, then those that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megafork.ablate.grid import choose, tuning_trials
from megafork.ablate.options import AblationOptions, Trial, check_begun
from megafork.ablate.record import Origin, Record
from megafork.ablate.results import Outcome, Results, read_outcome, summarise
from megafork.ablate.side_by_side import log_file, side_by_side
from megafork.data.prompts import problems
from megafork.recipe import Recipe, RecipeError


@dataclass
class Ablation:
    """`preflight` checks a recipe and returns its inputs; `attempt` trains one and returns why it failed, or None; `say` prints a line.

    `places`: the environment of each run that goes on at once (`room.places`), each then in a process of its own in place of `attempt`.
    """

    options: AblationOptions
    preflight: Callable[[Recipe], Any]
    attempt: Callable[[Recipe], str | None]
    say: Callable[[str], None]
    places: Sequence[Mapping[str, str]] = ()
    failed: dict[Trial, str] = field(default_factory=dict)
    _origins: dict[tuple[str, str], Origin] = field(default_factory=dict)

    @cached_property
    def record(self) -> Record | None:
        return None if self.options.record is None else Record(Path(self.options.record))

    def check(self) -> None:
        """Refuse what can be refused before anything is trained: a trial for each recipe and setting, and runs of other settings in the
        folder or the record. Raises RecipeError."""
        tuning, compared = tuning_trials(self.options) if self.options.grid else [], self.options.trials()
        if self.record is not None:
            self.record.check_settings([*tuning, *compared], self.options.grid)
        trials = tuning or compared
        held_out: dict[str, str] = {}
        for trial in trials:
            if trial.begun:
                check_begun(trial)
            elif trial.seed == trials[0].seed and not self._is_recorded(trial):
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
            return summarise(self.options, trials, self.failed, outcome_of=self._outcome)
        tuning = tuning_trials(self.options)
        self._train(tuning)
        table = self._choose(tuning)
        for recipe, setting in _best(table).items():
            self.say(f"tuned: {recipe}: {' '.join(setting)}")
        trials = self._compared(table)
        self._train(trials)
        return summarise(self.options, trials, self.failed, table, self._outcome)

    def left(self) -> list[Trial]:
        """Those that can be trained now, in any order: the ones that tune, and when all of them are done the ones that are compared."""
        if self.options.grid:
            tuning = tuning_trials(self.options)
            if left := [trial for trial in tuning if not self._is_done(trial)]:
                return left
            return [trial for trial in self._compared(self._choose(tuning)) if not self._is_done(trial)]
        return [trial for trial in self.options.trials() if not self._is_done(trial)]

    def _choose(self, tuning: Sequence[Trial]) -> list[dict[str, Any]]:
        return choose(self.options, tuning, self.failed, self._outcome)

    def _compared(self, tuned: list[dict[str, Any]]) -> list[Trial]:
        trials = self.options.trials(_best(tuned))
        for trial in trials:
            if trial.begun:
                check_begun(trial)
        return trials

    def _train(self, trials: Sequence[Trial]) -> None:
        numbered = {trial: f"run {number} of {len(trials)}: {trial}" for number, trial in enumerate(trials, 1)}
        if self.record is not None and not all(map(self._is_recorded, trials)):
            self.record.check_writable()
            self.record.check_origin(trials, [self._origin(trial) for trial in trials])
        left = []
        for trial in trials:
            if self._is_done(trial):
                self.say(f"{numbered[trial]}: done before")
                self._keep(trial)
            else:
                left.append(trial)
        if self.places:
            self._side_by_side(left, numbered)
            return
        for trial in left:
            self.say(f"{numbered[trial]}: {trial.recipe.run_folder}")
            self._ended(trial, self.attempt(trial.recipe))

    def _side_by_side(self, trials: Sequence[Trial], numbered: Mapping[Trial, str]) -> None:
        def ended(trial: Trial, why: str | None) -> None:
            self.say(f"{numbered[trial]}: {'done' if why is None else f'failed: {why}'}")
            self._ended(trial, why)

        side_by_side(trials, self.places, lambda trial: self.say(f"{numbered[trial]}: {log_file(trial)}"), ended)

    def _ended(self, trial: Trial, why: str | None) -> None:
        if why is None:
            self._keep(trial)
        else:
            self.failed[trial] = why

    def _is_done(self, trial: Trial) -> bool:
        return self._is_recorded(trial) or trial.finished

    def _is_recorded(self, trial: Trial) -> bool:
        return self.record is not None and self.record.outcome(trial) is not None

    def _keep(self, trial: Trial) -> None:
        """Record a finished trial that is not recorded yet."""
        if self.record is not None and not self._is_recorded(trial):
            self.record.add(trial, self._origin(trial), read_outcome(trial))

    def _outcome(self, trial: Trial) -> Outcome:
        recorded = self.record.outcome(trial) if self.record is not None else None
        return recorded or read_outcome(trial)

    def _origin(self, trial: Trial) -> Origin:
        recipe = trial.recipe
        key = recipe.model.path, recipe.data.model_dump_json()
        if key not in self._origins:
            inputs = self.preflight(recipe)
            self._origins[key] = Origin.of(inputs.weights.folder, inputs.train, inputs.held_out)
        return self._origins[key]


def _best(table: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    return {row["recipe"]: tuple(row["setting"]) for row in table if row["chosen"]}
