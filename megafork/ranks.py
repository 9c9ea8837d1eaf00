"""Ranks: started on this machine, or joined where torchrun or Slurm has started them; and what becomes of one that fails.

A rank that fails ends all at once: the launcher prints that rank's traceback first, and no process is left.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megafork.compat import noise
from megafork.process import die_with_parent
from megafork.recipe import RecipeError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import LogsSpecs

DONE, FAILED, WRONG_INPUT = 0, 1, 2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
Job = Callable[[], int]
"""The work of a rank: joins the others, returns an exit code. Of a module's functions and plain values, so that it can be pickled."""
_LAUNCHER = "MEGAFORK_LAUNCHER"
GB_A_CPU_RANK = 0.8
"""Memory that Python, torch, megatron-core and vLLM take in a rank before any model, measured without a GPU."""
_STOP_LIMIT_S = 5
"""How long a rank may take to end after SIGTERM before it is killed."""


class Interrupted(RuntimeError):
    """A signal stopped the ranks, as Ctrl-C does."""


def is_main() -> bool:
    """Whether this process speaks for the run: the launcher, or rank 0 under torchrun or Slurm."""
    return os.environ.get("RANK", "0") == "0"


def joined() -> bool:
    """Whether torchrun or Slurm has started this process as a rank; its environment then says which."""
    return "RANK" in os.environ or _join_slurm()


def do(job: Job, world: int, folder: Path) -> int:
    """Do a job on the ranks that this process is one of, or else on `world` new ones of this machine; returns the exit code.

    `folder`: of logs/. Raises RecipeError when a new rank did, Interrupted when a signal stopped the new ranks. A rank that was started
    by others does not return from a failure.
    """
    if not joined():
        return _start(job, world, folder / "logs")
    code = _rank(job)
    if code != DONE:
        _leave(code)
    return DONE


def _join_slurm() -> bool:
    """Under srun without torchrun: take rank, world and address from Slurm's environment. False outside of a step of several tasks.

    A batch script's own shell has no step, so that `megafork` in it starts ranks itself. Give srun --kill-on-bad-exit.
    """
    step = {name: os.environ.get(f"SLURM_{name}", "") for name in ("PROCID", "STEP_NUM_TASKS", "STEP_NODELIST", "JOB_ID", "STEP_ID")}
    if not (step["PROCID"] and step["STEP_NODELIST"] and int(step["STEP_NUM_TASKS"] or 1) > 1):
        return False
    os.environ.update(RANK=step["PROCID"], WORLD_SIZE=step["STEP_NUM_TASKS"], LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0"))
    os.environ.setdefault("MASTER_ADDR", first_host(step["STEP_NODELIST"]))
    os.environ.setdefault("MASTER_PORT", str(20000 + (int(step["JOB_ID"] or 0) * 8 + int(step["STEP_ID"] or 0)) % 20000))
    return True


def first_host(nodes: str) -> str:
    """First name of a Slurm node list: `gpu[003-010,12],login` is gpu003. Slurm puts rank 0 there."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise RecipeError(f"SLURM_STEP_NODELIST is {nodes!r}: it names no node; set MASTER_ADDR to the host of rank 0")
    return "".join(part or "" for part in match.groups())


def _start(job: Job, world: int, logs: Path) -> int:
    """Start the ranks with torch's elastic launcher; rank 0 has the terminal, the others write to `logs/rank_N.log`."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("rank_*"):
        old.unlink()
    file = logs / "job.pickle"  # what was checked is what the ranks do, whatever becomes of the files it came from
    file.write_bytes(pickle.dumps(job))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[_LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",  # no look-up of a host name that a laptop may not resolve
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=_STOP_LIMIT_S,
        logs_specs=_logs_specs(logs),
    )
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        elastic_launch(config, sys.executable)("-m", "megafork.ranks", str(file))
    except ChildFailedError as error:
        return _explain(error.failures.values(), logs)
    except SignalException as stopped:
        raise Interrupted(f"stopped by {stopped.sigval.name}; the same command continues") from None
    finally:
        for number, handler in handlers.items():  # the launcher sets its own, and leaves them
            signal.signal(number, handler)
    return DONE


def _logs_specs(folder: Path) -> LogsSpecs:
    """Where ranks write: `rank_N.log`, and `rank_N.error` for `record`. torch's own specs nest four folders with random names."""
    from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

    class RankLogs(LogsSpecs):
        @property
        def root_log_dir(self) -> str:
            return str(folder)

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            files = {rank: "" if rank == 0 else str(folder / f"rank_{rank}.log") for rank in envs}  # "": the terminal
            errors = {rank: str(folder / f"rank_{rank}.error") for rank in envs}
            for rank, env in envs.items():
                env["TORCHELASTIC_ERROR_FILE"] = errors[rank]
            return LogsDest(stdouts=files, stderrs=files, error_files=errors)

    return RankLogs()


def _explain(failures: Iterable[Any], logs: Path) -> int:
    """Say why the run failed: the first rank's traceback, and where the rest is. Raises RecipeError when its input was wrong."""
    failures = sorted(failures, key=_when)
    for failure in failures:
        if _recorded(failure):
            with (logs / f"rank_{failure.local_rank}.log").open("a") as file:
                file.write(failure.message + "\n")
            Path(failure.error_file).unlink()
    first = failures[0]
    if first.exitcode == WRONG_INPUT and _recorded(first):
        raise RecipeError(first.message)
    if first.exitcode < 0:
        say(f"rank {first.local_rank} was killed by {signal.Signals(-first.exitcode).name}")
    elif _recorded(first):
        say(first.message)
        say(f"rank {first.local_rank} failed")
    else:
        say(f"rank {first.local_rank} ended with exit code {first.exitcode} and no word of its own")
    say(f"all ranks were stopped; what they wrote is in {logs}")
    return FAILED


def _recorded(failure: Any) -> bool:
    """Whether the rank told its exception (`record`), which a killed one can't."""
    return "time_ns" in failure.error_file_data


def _when(failure: Any) -> tuple[bool, float]:
    """Order of failures. One rank's failure makes the others lose their connection, and the launcher stop them: these come later.

    A rank that told its exception also told the nanosecond; of others torch notes the second in which it noticed.
    """
    stopped = failure.exitcode == -signal.SIGTERM
    noticing_s = 2.0
    assert noticing_s < _STOP_LIMIT_S, "a rank that the launcher had to kill would come first"
    return stopped, failure.error_file_data["time_ns"] / 1e9 if _recorded(failure) else failure.timestamp - noticing_s


def say(text: str) -> None:
    sys.stderr.write(text.rstrip() + "\n")


def _rank(job: Job) -> int:
    """This process is a rank: do the job. Whatever goes wrong is told to whoever started it."""
    try:
        return job()
    except RecipeError as error:
        record(str(error))
        return WRONG_INPUT
    except BaseException:  # noqa: BLE001 - whatever it is, the launcher must hear of it
        record(traceback.format_exc())
        return FAILED


def record(message: str) -> None:
    """Say why this rank failed: for the launcher, or torchrun, in the file that it reads; without one on standard error."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
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


def _main(file: str) -> None:
    """A rank that `_start` started."""
    die_with_parent(int(os.environ[_LAUNCHER]))  # a launcher that is killed by SIGKILL can't stop its ranks
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher passes Ctrl-C on: end at once, also inside of a collective
    if os.environ["RANK"] != "0":
        os.dup2(2, 1)  # both streams were opened on the same file: one position for both
    noise.silence()
    _leave(_rank(lambda: pickle.loads(Path(file).read_bytes())()))


if __name__ == "__main__":
    _main(*sys.argv[1:])
