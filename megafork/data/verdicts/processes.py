"""Processes within a verifier process: how a forked one exits, and how all descendants are ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

_END_LIMIT_S = 2.0


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Wrap the code of a forked process: it exits at the end of the block, whatever happens, and never runs its parent's code."""
    code = 1
    try:
        yield
        code = 0
    finally:
        os._exit(code)


def silence(*descriptors: int) -> None:
    """Redirect the descriptors to /dev/null."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def end_all_but_me(*, boxed: bool) -> None:
    """Send SIGKILL to all descendants of this process. In a sandbox (`boxed`): to every process except this one and process 1, in one call
    that no fork can outrun."""
    if boxed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        return
    import psutil  # the import takes longer than the rest of a start in a sandbox

    me, end = psutil.Process(), time.monotonic() + _END_LIMIT_S
    while (running := list(filter(_runs, me.children(recursive=True)))) and time.monotonic() < end:
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.002)


def _runs(process: psutil.Process) -> bool:
    import psutil

    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
