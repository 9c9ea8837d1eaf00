"""Start the ranks of a run on this machine, or join those that torchrun or Slurm has started.

A rank that fails ends the run at once: the launcher prints that rank's traceback first, and no process is left.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
import uuid
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from megafork.recipe import Recipe, RecipeError, load_recipe

Command = Literal["train", "sft"]
DONE, FAILED, WRONG_INPUT = 0, 1, 2
_LAUNCHED = "MEGAFORK_LAUNCHED"


def run(command: Command, recipe_file: Path, overrides: Sequence[str]) -> int:
    """Run a recipe and return the exit code: 0 done, 1 failed, 2 the input was wrong. Inputs are checked before any rank starts."""
    recipe = load_recipe(recipe_file, list(overrides))
    started = _started_by_slurm() or "RANK" in os.environ
    world = int(os.environ["WORLD_SIZE"]) if started else _ranks_here(recipe)
    preflight(command, recipe, world)
    if started:
        return _rank(command, recipe)
    return _start(command, recipe_file, overrides, recipe, world)


def is_main() -> bool:
    """Whether this process speaks for the run: the launcher, or rank 0 under torchrun or Slurm."""
    return os.environ.get("RANK", "0") == "0"


def preflight(command: Command, recipe: Recipe, world: int) -> None:
    """Everything about the input that can be known before ranks start. Raises RecipeError."""
    from megafork.parallel.mesh import check_world
    from megafork.train.run import read_inputs

    check_world(recipe.parallel, world)
    if command == "train" and world % recipe.rollout.tp:
        raise RecipeError(f"rollout.tp is {recipe.rollout.tp}, which does not divide the {world} ranks: choose one that does")
    read_inputs(recipe, supervised=command == "sft")


def _ranks_here(recipe: Recipe) -> int:
    import torch

    return recipe.run.ranks or torch.cuda.device_count() or recipe.parallel.model_size


def _started_by_slurm() -> bool:
    """srun without torchrun: take rank and world from Slurm, and the address from its node list's first host."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) == 1 or "SLURM_PROCID" not in os.environ:
        return False
    first = os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or os.environ.get("SLURMD_NODENAME", "127.0.0.1")
    os.environ.setdefault("MASTER_ADDR", first)
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"], WORLD_SIZE=os.environ["SLURM_NTASKS"], LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0")
    )
    return True


def _start(command: Command, recipe_file: Path, overrides: Sequence[str], recipe: Recipe, world: int) -> int:
    """Start `world` ranks with torch's elastic launcher; rank 0 has the terminal, the others write to `logs/`."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logs = recipe.run_folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[_LAUNCHED] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects={rank: Std.ALL for rank in range(1, world)}),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "megafork.launch", command, str(recipe_file), *overrides)
    except ChildFailedError as error:
        return _explain(error.failures.values(), logs)
    return DONE


def _explain(failures: Any, logs: Path) -> int:
    """Print why the run failed: the rank that failed first, killed ones before those that only lost their connection to it."""
    first = min(failures, key=lambda failure: (failure.exitcode >= 0 or failure.exitcode == -signal.SIGTERM, failure.timestamp))
    if first.exitcode == WRONG_INPUT:
        _say(_last_line(first.message))
        return WRONG_INPUT
    if first.exitcode < 0:
        _say(f"rank {first.local_rank} was killed by {signal.Signals(-first.exitcode).name}")
    else:
        _say(_traceback(first.message))
        _say(f"rank {first.local_rank} failed at {datetime.fromtimestamp(first.timestamp):%H:%M:%S}")
    _say(f"the other ranks were stopped; their output is in {logs}")
    return FAILED


def _traceback(message: Any) -> str:
    if isinstance(message, dict):
        return str(message.get("extraInfo", {}).get("py_callstack") or message.get("message"))
    return str(message)


def _last_line(message: Any) -> str:
    return _traceback(message).strip().splitlines()[-1].partition("RecipeError: ")[2]


def _say(text: str) -> None:
    sys.stderr.write(text.rstrip() + "\n")


def _rank(command: Command, recipe: Recipe) -> int:
    """This process is a rank: join the others and run."""
    _die_with_launcher()
    from megafork.parallel.mesh import build_mesh, join_world
    from megafork.train.loop import train
    from megafork.train.sft import sft

    device = join_world()
    mesh = build_mesh(recipe.parallel, seed=recipe.run.seed, device=device)
    {"train": train, "sft": sft}[command](recipe, mesh)
    return DONE


def _die_with_launcher() -> None:
    """A launcher that is killed by SIGKILL can't stop its ranks: ask the kernel to (Linux)."""
    launcher = os.environ.get(_LAUNCHED)
    if launcher is None or sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before the call
        os._exit(FAILED)


def _main(arguments: list[str]) -> int:
    """Entry of a rank that `_start` started: errors go to the launcher, which prints the first one."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    command, recipe_file, *overrides = arguments
    try:
        return _rank("sft" if command == "sft" else "train", load_recipe(recipe_file, overrides))
    except RecipeError as error:
        handler.record_exception(error)
        return WRONG_INPUT
    except Exception as error:  # noqa: BLE001 - whatever it is, the launcher must hear of it
        handler.record_exception(error)
        with (load_recipe(recipe_file, overrides).run_folder / "logs" / f"error_rank_{os.environ['RANK']}.txt").open("w") as file:
            file.write(traceback.format_exc())
        return FAILED


if __name__ == "__main__":
    code = _main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # do not wait for peers in exit handlers: a failed rank must end at once
