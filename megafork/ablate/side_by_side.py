"""Trials side by side: each is a `megafork train` in a process of its own, which ends with this one."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired

from megafork.ablate.options import Trial, check_begun
from megafork.process import STARTER, stop_signals
from megafork.recipe import RecipeError

_LOOK_S = 0.1
_STOP_LIMIT_S = 15.0
"""How long a trial may take to end its ranks before it is killed, and they with it."""


@dataclass
class _Running:
    trial: Trial
    place: Mapping[str, str]
    process: Popen[bytes]

    @classmethod
    def start(cls, trial: Trial, place: Mapping[str, str]) -> _Running:
        log = log_file(trial)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "megafork.cli", "train", *trial.arguments]
        environment = {**os.environ, **place, STARTER: str(os.getpid())}
        with log.open("wb") as output:
            started = Popen(command, env=environment, stdin=DEVNULL, stdout=output, stderr=STDOUT, start_new_session=True)
        return cls(trial, place, started)

    def failure(self) -> str | None:
        """Why the ended trial failed."""
        if self.process.returncode:
            return f"see {log_file(self.trial)}"
        try:
            check_begun(self.trial)  # its file may have changed since it was read here
        except RecipeError as error:
            return str(error)
        return None


def log_file(trial: Trial) -> Path:
    """What the trial writes to its terminal."""
    recipe = trial.recipe
    return Path(recipe.run.folder) / "logs" / f"{recipe.run.name}.txt"


def side_by_side(
    trials: Iterable[Trial],
    places: Sequence[Mapping[str, str]],
    started: Callable[[Trial], None],
    ended: Callable[[Trial, str | None], None],
) -> None:
    """Train the trials in their order, as many at once as there are places (environment variables, as `room.places` gives them).

    `started` and `ended` are called for each, `ended` with the reason if it failed; the others go on. A stop signal ends all of them and
    raises Interrupted; they also end if this process is killed. Main thread only.
    """
    waiting, free = deque(trials), deque(places)
    running: list[_Running] = []
    with stop_signals():
        try:
            while waiting or running:
                while waiting and free:
                    started(waiting[0])
                    running.append(_Running.start(waiting.popleft(), free.popleft()))
                time.sleep(_LOOK_S)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    free.append(one.place)
                    ended(one.trial, one.failure())
        finally:
            _end(running)


def _end(running: Sequence[_Running]) -> None:
    for one in running:
        with contextlib.suppress(ProcessLookupError):
            one.process.terminate()
    deadline = time.monotonic() + _STOP_LIMIT_S
    for one in running:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except TimeoutExpired:
            one.process.kill()
            one.process.wait()
