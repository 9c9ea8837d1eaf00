"""Process control that the standard library lacks."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

STARTER = "MEGAFORK_STARTER"
"""Environment variable with the id of the `megafork` process that started this one."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Interrupted(RuntimeError):
    """A signal stopped the command, as Ctrl-C does."""


class _Stop(BaseException):
    """A stop signal arrived."""


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Inside this context a stop signal ends the block, whose `finally` clauses run; then Interrupted is raised. Ignored signals (`nohup`)
    stay so. Main thread only."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stop(number)

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    except _Stop as stopped:
        raise Interrupted(f"stopped by {signal.Signals(stopped.args[0]).name}; the same command resumes the run") from None


def print_anything() -> None:
    """Print `?` for what standard output cannot encode, in a Latin-1 locale for example, instead of raising in the middle of a run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def die_with_parent(parent: int) -> None:
    """Kill this process when its parent, with the id `parent`, ends, even by SIGKILL. Linux only; elsewhere it has no effect."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


def die_with_starter() -> None:
    """`die_with_parent` if another `megafork` has started this process; not for processes that this one starts."""
    if starter := os.environ.pop(STARTER, None):
        die_with_parent(int(starter))
