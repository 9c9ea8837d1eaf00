"""Processes within a verifier process: how a forked one leaves, and how all that came of one are ended."""

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
    """The life of a forked process: it ends here, whatever happens, and never returns into its parent's code."""
    code = 1
    try:
        yield
        code = 0
    finally:
        os._exit(code)


def silence(*descriptors: int) -> None:
    """Nothing is read there, and what is written goes nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def end_all_but_me(*, boxed: bool) -> None:
    """SIGKILL for all that came of this process. In a sandbox (`boxed`) for all that is there, this one and process 1 excepted, in one call
    that no fork outruns."""
    if boxed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        return
    import psutil  # it takes longer than the rest of a start in a sandbox

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
