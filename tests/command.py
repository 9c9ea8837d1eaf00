"""The command line, and its ranks, in processes forked from this one, which has their modules already."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from ranks import on_ranks
from test_rollout import free_port

from megafork import launch
from megafork.recipe import Recipe
from megafork.recipe_file import load_recipe


def megafork(*arguments: str, cwd: Path, limit_s: float = 240.0) -> subprocess.CompletedProcess[str]:
    """`megafork ARGUMENTS` in the folder `cwd`, with its exit code and what it wrote. Ranks that it starts are new processes."""
    torch.set_num_threads(1)  # a fork after OpenMP threads were started may hang
    with tempfile.TemporaryDirectory() as folder:
        written = [Path(folder, name) for name in ("out", "err")]
        process = multiprocessing.get_context("fork").Process(target=_main, args=(arguments, cwd, *written))
        process.start()
        process.join(limit_s)
        if process.is_alive():
            process.terminate()  # it stops its ranks
            process.join()
            raise subprocess.TimeoutExpired(arguments, limit_s, *(file.read_bytes() for file in written))
        return subprocess.CompletedProcess(arguments, process.exitcode or 0, *(file.read_text() for file in written))


def _main(arguments: tuple[str, ...], cwd: Path, *written: Path) -> None:
    code = 1
    os.chdir(cwd)
    for number, file in enumerate(written, 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
    sys.stdin = open(os.devnull)  # noqa: SIM115 - to the process's end
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.argv = ["megafork", *arguments]
    try:
        from megafork.cli import main

        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:  # noqa: BLE001 - as an interpreter ends
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # skip what the parent registered for its own end


def run_on_forks(command: launch.Command, file: Path, *overrides: str) -> None:
    """What `megafork COMMAND FILE` has its ranks do, checked before as it does, on forked ranks: without launcher and report."""
    recipe = load_recipe(file, list(overrides))
    world = recipe.run.ranks or recipe.parallel.model_size
    launch.preflight(command, recipe, world)
    assert on_ranks(world, _rank, command, recipe, free_port(), engines=command == "train") == [0] * world


def _rank(command: launch.Command, recipe: Recipe, port: int) -> int:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return launch._train(command, recipe, None)
