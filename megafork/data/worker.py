"""A verifier process: `python -m megafork.data.worker PIPE PARENT VERIFIER`, started by `reward.py`; never by hand.

Over the socket PIPE (a file descriptor) it sends None when the verifier is loaded, or a line that says why not; then it answers each
(response, row) with (accuracy, error or None). It starts in a tenth of a second: no torch, no recipe.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from megafork.data import verifiers

_PR_SET_PDEATHSIG = 1


def main() -> None:
    pipe_fd, parent, name = sys.argv[1:]
    _die_with(int(parent))
    pipe = Connection(int(pipe_fd))
    try:
        verifier = verifiers.load(name)
    except BaseException as error:  # noqa: BLE001 - a user's file may raise anything, SystemExit included
        pipe.send(describe(error))
        return
    pipe.send(None)
    while True:
        try:
            response, row = pipe.recv()
        except EOFError:  # the parent closed its end
            return
        pipe.send(verdict(verifier, response, row))


def verdict(verifier: verifiers.Verifier, response: str, row: verifiers.Row) -> tuple[float, str | None]:
    """(accuracy, None), or (0, what went wrong)."""
    try:
        value = verifier(response, row)
        accuracy = _number(value)
    except BaseException as error:  # noqa: BLE001 - one bad answer must not end the run
        return 0.0, describe(error)
    if not 0.0 <= accuracy <= 1.0:  # NaN as well
        return 0.0, f"the verifier returned {accuracy}: an accuracy is between 0 and 1"
    return accuracy, None


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _number(value: Any) -> float:
    if not hasattr(value, "__float__"):  # text that float() would read is refused
        raise TypeError(f"the verifier returned {value!r:.100}: it must be a number or a bool")
    return float(value)


def _die_with(parent: int) -> None:
    """On Linux the kernel kills this process when its parent dies, even if it is stuck in C code. Elsewhere it ends with the pipe."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        sys.exit()


if __name__ == "__main__":
    main()
