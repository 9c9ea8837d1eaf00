"""Run a function on N real ranks (gloo), forked from a process that has already imported torch and megatron: one second per case."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
_PORTS = itertools.cycle(range(15000 + 2000 * _WORKER, 17000 + 2000 * _WORKER))


def on_ranks(world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240.0, engines: bool = False) -> list[Any]:
    """Call `function(*args)` on `world` ranks with the default process group up; returns each rank's (picklable) result in rank order.

    A rank that raises fails the call with that rank's traceback; a rank that hangs fails it after `timeout_s`. `engines`: the ranks make
    vLLM engines, whose modules are imported before they are forked.
    """
    assert not dist.is_initialized(), "the parent must not have a process group"
    if engines:
        import_vllm()
    torch.set_num_threads(1)  # a fork after OpenMP threads were started may hang
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(rank, world, f"{folder}/store", send, function, args))
            process.start()
            send.close()
            pipes.append(receive)
            processes.append(process)
        try:
            return _results(pipes, timeout_s)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


@functools.cache
def import_vllm() -> None:
    """What vLLM does once in each process with an engine, done here for all that are forked from this one."""
    from megafork.compat import vllm as vllm_fixes

    vllm_fixes.prepare()
    import vllm.entrypoints.llm
    import vllm.model_executor.models.qwen3
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed
    from vllm.platforms.cpu import CpuPlatform

    configure_logging_if_needed(LoggingConfig())
    CpuPlatform.register_triton_kernel_overrides()
    # each engine would look through all modules again
    setattr(CpuPlatform, "register_triton_kernel_overrides", staticmethod(lambda: None))  # noqa: B010


def import_vllm_server() -> None:
    """The same for its server."""
    import_vllm()
    import vllm.entrypoints.launchers.api_server.entry
    import vllm.v1.engine.async_llm  # noqa: F401


def _results(pipes: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout_s)
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting)} gave no result within {timeout_s:.0f} s")
        for rank, pipe in list(waiting.items()):
            if pipe not in ready:
                continue
            try:
                failed, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a result") from None
            if failed:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
            del waiting[rank]
    return [results[rank] for rank in range(len(pipes))]


def _child(rank: int, world: int, store: str, send: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what is inherited never becomes garbage here, and takes long to look through
    own_thread_pool()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        answer = (False, function(*args))
    except BaseException:  # noqa: BLE001 - whatever a rank raises is the test's result
        answer = (True, traceback.format_exc())
    send.send_bytes(pickle.dumps(answer))  # plain pickle: tensors by value, the rank is about to end
    send.close()
    os._exit(0)  # skip other tests' exit handlers inherited from the parent


def own_thread_pool() -> None:
    """Give a forked process its own pool of threads now: torch replaces the inherited one when it is first used, and fails ("Invalid thread
    pool") if two threads do that at once."""
    torch.set_num_threads(1)


def free_port() -> int:
    """A port below those that the kernel gives to outgoing connections, from a share of this test process's own: between here and the
    moment when it is opened nobody else takes it."""
    for port in _PORTS:
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")
