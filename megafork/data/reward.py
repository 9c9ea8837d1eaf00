"""Score responses in verifier processes that may raise, hang or crash without harm to the run or to other responses."""

from __future__ import annotations

import contextlib
import difflib
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from megafork import recipe
from megafork.data.verifiers import BUILT_IN
from megafork.recipe import RecipeError

Item = tuple[str, dict[str, Any]]
START_LIMIT_S = 120.0
"""Seconds that loading a verifier may take; generous, as a user's file may import anything from a shared disk."""


@dataclass(frozen=True)
class Verdict:
    """`accuracy` in [0, 1]. With an `error`, one line, it is 0."""

    accuracy: float
    error: str | None = None


def check(reward: recipe.Reward) -> None:
    """Refuse an unknown verifier or a missing file by RecipeError. Starts nothing."""
    name = reward.verifier
    if name in BUILT_IN:
        return
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not function.isidentifier():
        close = difflib.get_close_matches(name, list(BUILT_IN), n=1, cutoff=0.5)
        mend = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(BUILT_IN)}, or give FILE.py:FUNCTION"
        raise RecipeError(f"reward.verifier is {name!r}: {mend}")
    if not Path(path).is_file():
        raise RecipeError(f"reward.verifier is {name!r}: no such file; give a path relative to the working directory")


def needs(reward: recipe.Reward) -> tuple[str, ...]:
    """Fields that a row must have for this verifier (for `load_prompts`). A verifier of the user's own reads what it likes."""
    return {"exact": ("answer",), "math": ("answer",), "reasoning_gym": ("answer", "metadata")}.get(reward.verifier, ())


class Verifiers:
    """`reward.workers` verifier processes, as a context manager. `score` is not for several threads at once.

    They die with this process, by kill -9 too. Raises RecipeError if the verifier cannot be loaded.
    """

    def __init__(self, reward: recipe.Reward) -> None:
        check(reward)
        self._workers = [_Worker(reward) for _ in range(reward.workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        # these threads only wait for a process each; they also outlive every process they start, see _Worker.start
        self._threads = ThreadPoolExecutor(reward.workers, thread_name_prefix="verifier")
        try:
            for worker in self._workers:
                worker.await_ready()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def score(self, items: list[Item]) -> list[Verdict]:
        """Verdicts of (response text, row), in the order of the items. What a verifier does with one item never harms another."""
        return list(self._threads.map(self._judge, items))

    def close(self) -> None:
        """End the processes; waits for verdicts under way, at most `reward.timeout_s`."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def _judge(self, item: Item) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.judge(item)
        finally:
            self._idle.put(worker)


class _Worker:
    """One verifier process (`worker.py`) and the socket to it."""

    def __init__(self, reward: recipe.Reward) -> None:
        self._reward = reward
        self.start()

    def start(self) -> None:
        """Start the process; `await_ready` must follow. On Linux it dies with the thread that calls this."""
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megafork.data.worker", str(theirs.fileno()), str(os.getpid()), self._reward.verifier],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a verifier prints is a message, not output of the run
                start_new_session=True,  # a group of its own, so that `kill` also ends what a verifier started
            )

    def await_ready(self) -> None:
        name = self._reward.verifier
        try:
            failure = self._pipe.recv() if self._pipe.poll(START_LIMIT_S) else f"still not loaded after {START_LIMIT_S:.0f} s"
        except (EOFError, ConnectionError):
            failure = self._how_it_ended()
        if failure is not None:
            self.kill()
            raise RecipeError(f"reward.verifier is {name!r}: it cannot be loaded; mend the file or its imports ({failure})")

    def judge(self, item: Item) -> Verdict:
        """The verdict; afterwards a process is ready again, whatever became of this one."""
        if self._process.poll() is not None:  # it died while idle, which is no fault of this item
            self._restart()
        try:
            self._pipe.send(item)
            if self._pipe.poll(self._reward.timeout_s):
                return Verdict(*self._pipe.recv())
            error = f"timeout: no verdict within {self._reward.timeout_s:g} s"
        except (EOFError, ConnectionError):
            error = self._how_it_ended()
        self._restart()
        return Verdict(0.0, error)

    def kill(self) -> None:
        """SIGKILL for the process and whatever it started: nothing else ends one that is stuck in C code."""
        self._pipe.close()
        with contextlib.suppress(ProcessLookupError):  # it may have gone, and its children too
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _restart(self) -> None:
        self.kill()
        self.start()
        self.await_ready()

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "the verifier process closed its pipe"
        return (
            f"the verifier process died of {signal.Signals(-code).name}"
            if code < 0
            else f"the verifier process ended with exit code {code}"
        )
