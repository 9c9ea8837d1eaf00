"""Finished runs in one small file, so that an ablation goes on without their folders: on another machine, or in a later month."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megafork.ablate.options import OF_NO_EFFECT, OF_THE_TRIAL, Trial, flat
from megafork.ablate.results import Outcome
from megafork.data.prompts import Prompt, fingerprint, problems
from megafork.files import check_room, whole
from megafork.recipe import Recipe, RecipeError

_FINGERPRINTED = ("data.train", "data.eval")


@dataclass(frozen=True)
class Origin:
    """What a run starts from, as 16 hex digits each that change with any of it."""

    model: str
    train: str
    held_out: str

    @classmethod
    def of(cls, model: Path, train: Sequence[Prompt], held_out: Sequence[Prompt]) -> Origin:
        """model: its folder, whose weights are all read."""
        digest = hashlib.sha256()
        for file in [model / "config.json", *sorted(model.glob("*.safetensors"))]:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return cls(digest.hexdigest()[:16], fingerprint(train), problems(held_out))


@dataclass(frozen=True)
class Recorded:
    """A finished run."""

    recipe: str
    """The recipe's file name without `.yaml`."""
    seed: int
    settings: dict[str, Any]
    """By `section.key`, without those that name the run or have no effect on its numbers."""
    origin: Origin
    outcome: Outcome

    def is_of(self, trial: Trial) -> bool:
        return (self.recipe, self.seed) == (trial.of, trial.seed) and not list(self.differing(trial))

    def differing(self, trial: Trial) -> Iterator[tuple[str, Any, Any]]:
        """Keys with the value here and the trial's, where they differ. Keys of older or newer versions do not count."""
        now = settings_of(trial.recipe)
        for key in self.settings.keys() & now.keys():
            if self.settings[key] != now[key]:
                yield key, self.settings[key], now[key]


class Record:
    """The runs in a file: `{"common": settings that all share, "runs": [Recorded, with its other settings]}`, a line for each run."""

    def __init__(self, file: Path) -> None:
        """Raises RecipeError for a file that is no record."""
        self.file = file
        self.runs = list(_read(file))

    def outcome(self, trial: Trial) -> Outcome | None:
        """None if the trial is not recorded."""
        return next((run.outcome for run in self.runs if run.is_of(trial)), None)

    def add(self, trial: Trial, origin: Origin, outcome: Outcome) -> None:
        """Write the file anew, with this run."""
        self.runs = [*_read(self.file), Recorded(trial.of, trial.seed, settings_of(trial.recipe), origin, outcome)]
        first = self.runs[0].settings
        shared = {key: first[key] for key in first if all(run.settings.get(key, ...) == first[key] for run in self.runs)}
        with whole(self.file) as unfinished:
            unfinished.write_text(_text(shared, self.runs))

    def check_writable(self) -> None:
        """Raise RecipeError if the file can't be written."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            check_room(self.file.parent)
        except OSError as error:
            raise RecipeError(f"--record is {str(self.file)!r}: it can't be written ({error.strerror}): choose another file") from None

    def check_settings(self, trials: Iterable[Trial], grid: Iterable[str]) -> None:
        """Raise RecipeError if a run of the same recipe and seed has other settings, apart from the keys of the grid."""
        varied = {".".join(axis.partition("=")[0].split(".")[:2]) for axis in grid}
        for trial in trials:
            for run in self.runs:
                if (run.recipe, run.seed) == (trial.of, trial.seed):
                    for key, was, now in sorted(run.differing(trial)):
                        if key not in varied:
                            raise self._refusal(trial, f"with {key}={was}, not {now}")

    def check_origin(self, trials: Sequence[Trial], origins: Sequence[Origin]) -> None:
        """Raise RecipeError if a recorded trial has seen other data, or if some trials of a seed are recorded and the others would start
        from another model: the runs of one seed are compared with each other."""
        found = [next((run for run in self.runs if run.is_of(trial)), None) for trial in trials]
        incomplete = {trial.seed for trial, run in zip(trials, found, strict=True) if run is None}
        for trial, run, origin in zip(trials, found, origins, strict=True):
            if run is None:
                continue
            for key, was, now in (("train", run.origin.train, origin.train), ("eval", run.origin.held_out, origin.held_out)):
                if was != now:
                    raise self._refusal(trial, f"with other contents of data.{key}")
            if run.origin.model != origin.model and trial.seed in incomplete:
                raise self._refusal(trial, f"from another model.path, and other runs of seed {trial.seed} are missing")

    def _refusal(self, trial: Trial, what: str) -> RecipeError:
        return RecipeError(
            f"--record is {str(self.file)!r}: it has {trial.of}, seed {trial.seed}, {what}: choose another file, or delete the lines of "
            f"seed {trial.seed}"
        )


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """As in `Recorded.settings`."""
    without = (*OF_THE_TRIAL, *OF_NO_EFFECT, *_FINGERPRINTED)
    return {key: value for key, value in flat(recipe.model_dump(mode="json")).items() if not key.startswith(without)}


def _text(common: dict[str, Any], runs: Sequence[Recorded]) -> str:
    def line(run: Recorded) -> str:
        own = {key: value for key, value in run.settings.items() if key not in common}
        return json.dumps({**asdict(run), "settings": own})

    return f'{{"common": {json.dumps(common)},\n"runs": [\n' + ",\n".join(map(line, runs)) + "\n]}\n"


def _read(file: Path) -> Iterator[Recorded]:
    if not file.exists():
        return
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        for run in written["runs"]:
            settings = {**written["common"], **run["settings"]}
            yield Recorded(run["recipe"], run["seed"], settings, Origin(**run["origin"]), Outcome(**run["outcome"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RecipeError(f"--record is {str(file)!r}: it is no record of runs ({error!r}): choose another file") from None
