"""Ranks: started on this machine, or joined if torchrun or Slurm has started them; and how failures are handled.

If a rank fails, all end at once: the launcher prints that rank's traceback first, and no process is left. No port is opened for this: the
ranks inherit two anonymous files, one with the job and one through which they meet.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from subprocess import STDOUT, Popen, TimeoutExpired
from typing import IO, Any

from megafork.compat import noise
from megafork.files import full_disk
from megafork.joined import STORE, first_host, joined, loopback, on_one_machine
from megafork.process import Interrupted, die_with_parent, print_anything, stop_signals
from megafork.recipe import RecipeError

__all__ = ["DONE", "FAILED", "WRONG_INPUT", "Interrupted", "Job", "do", "first_host", "is_main", "joined", "record", "say"]

DONE, FAILED, WRONG_INPUT = 0, 1, 2
Job = Callable[[], int]
"""The work of a rank: joins the others, returns an exit code. Built from module-level functions and plain values, so it can be pickled."""
_LAUNCHER = "MEGAFORK_LAUNCHER"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""torchrun's environment variable for the file to which a rank writes why it failed."""
_STOP_LIMIT_S = 5.0
"""How long a rank may take to end after SIGTERM before it is killed."""
_LOOK_S = 0.05
_NOTICING_S = 2.0
"""Maximum delay in noticing the end of a rank that recorded nothing. Its peers lose their connection to it and report that sooner."""


def is_main() -> bool:
    """Whether this is the main process of the run: the launcher, or rank 0 under torchrun or Slurm."""
    return os.environ.get("RANK", "0") == "0"


def do(job: Job, world: int, folder: Path, *, reaches_out: bool = False) -> int:
    """Run a job on the ranks that this process belongs to, or else on `world` new ranks on this machine; returns the exit code.

    `folder`: parent of logs/. `reaches_out`: the job sends weights to other machines. Raises RecipeError if a new rank did, Interrupted if
    a signal stopped the new ranks. A rank started by torchrun or Slurm does not return from a failure.
    """
    if not joined():
        return _start(job, world, folder / "logs", reaches_out)
    if on_one_machine():
        os.environ.update(loopback(reaches_out=reaches_out))
    code = _rank(job)
    if code != DONE:
        _leave(code)
    return DONE


def _start(job: Job, world: int, logs: Path, reaches_out: bool) -> int:
    """Start the ranks; rank 0 has the terminal, the others write to `logs/rank_N.log`."""
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("rank_*"):
        old.unlink()
    ranks: list[_Started] = []
    with _nameless("job") as work, _nameless("store") as store:
        work.write(pickle.dumps(job))  # the ranks run exactly what was checked, even if its files change meanwhile
        work.flush()
        shared = {
            **os.environ,
            **loopback(reaches_out=reaches_out),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            _LAUNCHER: str(os.getpid()),
            STORE: _path(store.fileno()),
        }
        with stop_signals():
            try:
                for rank in range(world):
                    ranks.append(_Started.new(rank, shared, (work, store), logs))
                while _all_is_well(ranks):
                    time.sleep(_LOOK_S)
            finally:
                _end(ranks)
    return _explain([rank for rank in ranks if rank.failed], logs)


def _nameless(name: str) -> IO[bytes]:
    """An anonymous file that only this process and those that inherit it can open; it disappears with them."""
    return os.fdopen(os.memfd_create(name), "w+b")


def _path(descriptor: int) -> str:
    """Path with which a process reopens an inherited descriptor."""
    return f"/proc/self/fd/{descriptor}"


@dataclass
class _Started:
    """A rank that `_start` started, the leader of its own process group, and what is known about its end."""

    number: int
    process: Popen[bytes]
    words: IO[bytes]
    """Its record of a failure; not a file in the run folder, because the disk may be full."""
    ended: float = 0.0
    """Unix time at which its end was noticed, in seconds."""
    stopped: bool = False
    """Whether the launcher stopped it."""

    @classmethod
    def new(cls, number: int, shared: dict[str, str], files: Iterable[IO[bytes]], logs: Path) -> _Started:
        words = _nameless("words")
        inherited = [file.fileno() for file in (*files, words)]
        mine = {**shared, "RANK": str(number), "LOCAL_RANK": str(number), _ERROR_FILE: _path(words.fileno())}
        command = [sys.executable, "-m", "megafork.ranks", *map(str, inherited)]
        with contextlib.ExitStack() as opened:
            streams: dict[str, Any] = {}
            if number:
                streams = {"stdout": opened.enter_context((logs / f"rank_{number}.log").open("wb")), "stderr": STDOUT}
            return cls(number, Popen(command, env=mine, pass_fds=inherited, start_new_session=True, **streams), words)

    def running(self) -> bool:
        if self.process.poll() is None:
            return True
        self.ended = self.ended or time.time()
        return False

    @property
    def failed(self) -> bool:
        return bool(self.process.returncode)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the rank and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def told(self) -> dict[str, Any] | None:
        """The rank's own record of its failure; None if there is none, as after a kill."""
        self.words.seek(0)
        try:
            return json.loads(self.words.read())
        except ValueError:
            return None


def _all_is_well(ranks: Iterable[_Started]) -> bool:
    """Whether some rank runs and none has failed. Polls every rank, because peers may not notice a failure."""
    running = [rank.running() for rank in ranks]
    return any(running) and not any(rank.failed for rank in ranks)


def _end(ranks: Iterable[_Started]) -> None:
    """Stop running ranks, and processes left behind by ended ones."""
    for rank in ranks:
        rank.stopped = rank.running()
        rank.signal(signal.SIGTERM)
    deadline = time.monotonic() + _STOP_LIMIT_S
    for rank in ranks:
        try:
            rank.process.wait(max(0.0, deadline - time.monotonic()))
        except TimeoutExpired:
            rank.signal(signal.SIGKILL)
            rank.process.wait()
        rank.running()


def _explain(failures: list[_Started], logs: Path) -> int:
    """Print why the run failed: the first failing rank's traceback, and where the rest is. Raises RecipeError if the input was wrong."""
    told = {rank.number: said for rank in failures if (said := rank.told()) is not None}

    def when(rank: _Started) -> tuple[bool, float]:
        """When a rank failed. After the first failure the others lose their connection and the launcher stops them: they sort later."""
        said = told.get(rank.number)
        return said is None and rank.stopped, said["time_ns"] / 1e9 if said else rank.ended - _NOTICING_S

    for number, said in told.items():
        with contextlib.suppress(OSError), (logs / f"rank_{number}.log").open("a") as file:  # the disk may be full
            file.write(said["message"] + "\n")
    if not failures:
        return DONE
    first = min(failures, key=when)
    code = first.process.returncode
    if (said := told.get(first.number)) is not None:  # also if it was stopped between recording this and ending
        if said["code"] == WRONG_INPUT:
            raise RecipeError(said["message"])
        say(said["message"])
        say(f"rank {first.number} failed")
    elif code < 0:
        say(f"rank {first.number} was killed by {signal.Signals(-code).name}")
    else:
        say(f"rank {first.number} ended with exit code {code} and recorded no reason")
    say(f"all ranks were stopped; their output is in {logs}")
    return FAILED


def say(text: str) -> None:
    sys.stderr.write(text.rstrip() + "\n")


def _rank(job: Job) -> int:
    """Run the job in this process, which is a rank. Any error is reported to the process that started it."""
    try:
        return job()
    except RecipeError as error:
        record(str(error), WRONG_INPUT)
        return WRONG_INPUT
    except BaseException as error:  # noqa: BLE001 - every failure must be reported to the launcher
        record(full_disk(error) or traceback.format_exc())
        return FAILED


def record(message: str, code: int = FAILED) -> None:
    """Report why this rank fails and with which exit code, in the file that the launcher or torchrun reads, or without a launcher on
    standard error."""
    file = os.environ.get(_ERROR_FILE)
    if file:
        # slurm/common.sh cuts the message out of the text, between the first two keys
        told = {"message": message, "timestamp": int(time.time()), "time_ns": time.time_ns(), "code": code}
        Path(file).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    if _LAUNCHER not in os.environ:
        say(f"rank {os.environ['RANK']}: {message}")


def _leave(code: int) -> None:
    """Exit at once: libraries' exit handlers wait for peers that may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _main(work: int, *others: int) -> None:
    """Entry point of a rank that `_start` started, with its inherited files; its job is in `work`."""
    die_with_parent(int(os.environ[_LAUNCHER]))  # a launcher that is killed by SIGKILL can't stop its ranks
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once, even inside a collective
    print_anything()
    for file in (work, *others):
        os.set_inheritable(file, False)  # not for processes that this rank starts
    noise.silence()
    _leave(_rank(lambda: pickle.loads(Path(_path(work)).read_bytes())()))


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
