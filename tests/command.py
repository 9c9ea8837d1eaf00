"""Runs the command line, and the ranks that it starts, in processes forked from this one, which has already imported their modules."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ranks import free_port, import_vllm, on_ranks, own_thread_pool

from megafork import commands
from megafork import ranks as launcher
from megafork.ablate import side_by_side
from megafork.recipe import Recipe
from megafork.recipe_file import load_recipe
from megafork.rollout import serve
from megafork.user_code import import_file

FAULTS = Path(__file__).with_name("faults")
WITH_ENGINES = ("train", "eval", "analyze", "ablate")


def forked_python(args: Sequence[str], *, env: dict[str, str] | None = None, **how: Any) -> subprocess.Popen[Any]:
    """Popen of `python -m MODULE ARGUMENTS` that is forked instead of executed, as are the ranks that it starts: seconds of imports less
    for each. What /proc says of its environment is this process's."""
    torch.set_num_threads(1)  # a fork after OpenMP threads were started may hang
    before = _open_files()
    return subprocess.Popen(args, preexec_fn=lambda: _become(list(args), env, before), **how)


def start_megafork(*arguments: str, **how: Any) -> subprocess.Popen[Any]:
    """`megafork ARGUMENTS`, forked."""
    if arguments[0] in WITH_ENGINES:
        import_vllm()
    return forked_python([sys.executable, "-m", "megafork.cli", *arguments], **how)


def megafork(*arguments: str, cwd: Path, limit_s: float = 240.0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`megafork ARGUMENTS` in the folder `cwd`, to its end: its exit code and what it wrote."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start_megafork(*arguments, cwd=cwd, env=env, text=True, **streams) as process:
        try:
            written = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # it stops its ranks
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, *written)


def _open_files() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd")}


def _become(args: list[str], env: dict[str, str] | None, before: set[int]) -> None:
    """In the child, which has its directory, session and standard streams already."""
    for file in _open_files() - before - {0, 1, 2}:  # Popen's pipes; it waits for the end of one of them
        with contextlib.suppress(OSError):
            os.close(file)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    gc.freeze()  # as `ranks` does
    own_thread_pool()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.root.handlers.clear()  # pytest's
    # those that are replaced may be objects of an earlier fork, and would close what they stand for
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, buffering=1, closefd=False) for number, mode in enumerate("rww"))
    if "FAULT" in os.environ:  # this interpreter has started long ago
        import_file(FAULTS / "sitecustomize.py", "faults")
    for starter in (launcher, side_by_side, serve):
        setattr(starter, "Popen", forked_python)  # noqa: B010 - of that module
    forks = multiprocessing.get_context("fork")
    setattr(multiprocessing, "get_context", lambda method=None: forks)  # noqa: B010 - vLLM's servers spawn their engines
    assert args[1] == "-m", args
    sys.argv = args[2:]
    code = 1
    try:
        if args[2] == serve.__name__:
            serve.main()  # of the module above; run as __main__, it would be another
        else:
            runpy.run_module(args[2], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:  # noqa: BLE001 - as an interpreter ends
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # skip what the parent registered for its own end


def run_on_forks(command: commands.Command, file: Path, *overrides: str) -> None:
    """What `megafork COMMAND FILE` has its ranks do, checked before as it does, on forked ranks: without launcher and report."""
    recipe = load_recipe(file, list(overrides))
    world = recipe.run.ranks or recipe.parallel.smallest_world
    commands.preflight(command, recipe, world)
    assert on_ranks(world, _rank, command, recipe, free_port(), engines=command == "train") == [0] * world


def _rank(command: commands.Command, recipe: Recipe, port: int) -> int:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return commands._train(command, recipe, None)
