"""Ranks: started on this machine, or joined where torchrun or Slurm has started them; and what becomes of one that fails.

A rank that fails ends all at once: the launcher prints that rank's traceback first, and no process is left. Nothing listens for it: the
ranks inherit two files without a name, one with the job and one through which they meet.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import STDOUT, Popen, TimeoutExpired
from types import FrameType
from typing import IO, Any

from megafork.compat import noise
from megafork.files import full_disk
from megafork.joined import first_host, joined, on_one_machine
from megafork.process import die_with_parent
from megafork.recipe import RecipeError

__all__ = ["DONE", "FAILED", "WRONG_INPUT", "Interrupted", "Job", "do", "first_host", "is_main", "joined", "record", "say"]

DONE, FAILED, WRONG_INPUT = 0, 1, 2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
Job = Callable[[], int]
"""The work of a rank: joins the others, returns an exit code. Of a module's functions and plain values, so that it can be pickled."""
_LAUNCHER = "MEGAFORK_LAUNCHER"
GB_A_CPU_RANK = 0.8
"""Memory that Python, torch, megatron-core and vLLM take in a rank before any model, measured without a GPU."""
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable, of torchrun's, that names the file in which a rank says why it failed."""
_STOP_LIMIT_S = 5.0
"""How long a rank may take to end after SIGTERM before it is killed."""
_LOOK_S = 0.05
_NOTICING_S = 2.0
"""By how much the end of a rank that said nothing may be noticed late. Its peers, which lose their connection to it, say so sooner."""


class Interrupted(RuntimeError):
    """A signal stopped the ranks, as Ctrl-C does."""


class _Stop(BaseException):
    """A signal came."""


def is_main() -> bool:
    """Whether this process speaks for the run: the launcher, or rank 0 under torchrun or Slurm."""
    return os.environ.get("RANK", "0") == "0"


def do(job: Job, world: int, folder: Path, *, reaches_out: bool = False) -> int:
    """Do a job on the ranks that this process is one of, or else on `world` new ones of this machine; returns the exit code.

    `folder`: of logs/. `reaches_out`: the job sends weights to other machines. Raises RecipeError when a new rank did, Interrupted when a
    signal stopped the new ranks. A rank that was started by others does not return from a failure.
    """
    if not joined():
        return _start(job, world, folder / "logs", reaches_out)
    if on_one_machine():
        from megafork.parallel.meeting import loopback

        os.environ.update(loopback(reaches_out=reaches_out))
    code = _rank(job)
    if code != DONE:
        _leave(code)
    return DONE


def _start(job: Job, world: int, logs: Path, reaches_out: bool) -> int:
    """Start the ranks; rank 0 has the terminal, the others write to `logs/rank_N.log`."""
    from megafork.parallel.meeting import STORE, loopback

    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("rank_*"):
        old.unlink()
    ranks: list[_Started] = []
    with _nameless("job") as work, _nameless("store") as store:
        work.write(pickle.dumps(job))  # what was checked is what the ranks do, whatever becomes of the files it came from
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
        try:
            with _stop_signals():
                try:
                    for rank in range(world):
                        ranks.append(_Started.new(rank, shared, (work, store), logs))
                    while _all_is_well(ranks):
                        time.sleep(_LOOK_S)
                finally:
                    _end(ranks)
        except _Stop as stop:
            raise Interrupted(f"stopped by {signal.Signals(stop.args[0]).name}; the same command continues") from None
    return _explain([rank for rank in ranks if rank.failed], logs)


def _nameless(name: str) -> IO[bytes]:
    """A file that only this process and those that inherit it can open, and that is gone with them."""
    return os.fdopen(os.memfd_create(name), "w+b")


def _path(descriptor: int) -> str:
    """By which a process opens anew what it inherited."""
    return f"/proc/self/fd/{descriptor}"


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """Within, a signal that asks to stop raises _Stop, unless it is ignored (`nohup`)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stop(number)

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Started:
    """A rank that `_start` started, the leader of a process group of its own, and what is known of its end."""

    number: int
    process: Popen[bytes]
    words: IO[bytes]
    """What it records of its failure; not a file of the run's, for the disk may be full."""
    ended: float = 0.0
    """When that was noticed, in seconds."""
    stopped: bool = False
    """Whether the launcher ended it."""

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
        """To the rank and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def told(self) -> dict[str, Any] | None:
        """What the rank recorded of its failure; a killed one can't."""
        self.words.seek(0)
        try:
            return json.loads(self.words.read())
        except ValueError:
            return None


def _all_is_well(ranks: Iterable[_Started]) -> bool:
    """Some run, and none has failed; each is looked at, for its peers may not notice."""
    running = [rank.running() for rank in ranks]
    return any(running) and not any(rank.failed for rank in ranks)


def _end(ranks: Iterable[_Started]) -> None:
    """Stop those that run, and what others have left behind."""
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
    """Say why the run failed: the first rank's traceback, and where the rest is. Raises RecipeError when its input was wrong."""
    told = {rank.number: said for rank in failures if (said := rank.told()) is not None}

    def when(rank: _Started) -> tuple[bool, float]:
        """One rank's failure makes the others lose their connection, and the launcher stop them: these come later."""
        said = told.get(rank.number)
        return said is None and rank.stopped, said["time_ns"] / 1e9 if said else rank.ended - _NOTICING_S

    for number, said in told.items():
        with contextlib.suppress(OSError), (logs / f"rank_{number}.log").open("a") as file:  # the disk may be full
            file.write(said["message"] + "\n")
    if not failures:
        return DONE
    first = min(failures, key=when)
    code, message = first.process.returncode, told[first.number]["message"] if first.number in told else None
    if code == WRONG_INPUT and message:
        raise RecipeError(message)
    if code < 0:
        say(f"rank {first.number} was killed by {signal.Signals(-code).name}")
    elif message:
        say(message)
        say(f"rank {first.number} failed")
    else:
        say(f"rank {first.number} ended with exit code {code} and no word of its own")
    say(f"all ranks were stopped; what they wrote is in {logs}")
    return FAILED


def say(text: str) -> None:
    sys.stderr.write(text.rstrip() + "\n")


def _rank(job: Job) -> int:
    """This process is a rank: do the job. Whatever goes wrong is told to whoever started it."""
    try:
        return job()
    except RecipeError as error:
        record(str(error))
        return WRONG_INPUT
    except BaseException as error:  # noqa: BLE001 - whatever it is, the launcher must hear of it
        record(full_disk(error) or traceback.format_exc())
        return FAILED


def record(message: str) -> None:
    """Say why this rank failed: for the launcher, or torchrun, in the file that it reads; without one on standard error."""
    file = os.environ.get(_ERROR_FILE)
    if file:
        told = {"message": message, "timestamp": int(time.time()), "time_ns": time.time_ns()}
        Path(file).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    if _LAUNCHER not in os.environ:
        say(f"rank {os.environ['RANK']}: {message}")


def _leave(code: int) -> None:
    """End at once: exit handlers of libraries wait for peers that may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _main(work: int, *others: int) -> None:
    """A rank that `_start` started, with the files that it inherited; its job is in `work`."""
    die_with_parent(int(os.environ[_LAUNCHER]))  # a launcher that is killed by SIGKILL can't stop its ranks
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end at once, also inside of a collective
    for file in (work, *others):
        os.set_inheritable(file, False)  # not for what this rank starts
    noise.silence()
    _leave(_rank(lambda: pickle.loads(Path(_path(work)).read_bytes())()))


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
