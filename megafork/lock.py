"""A lock that gives a folder to one process at a time, until that process ends in whatever way, on any file system with locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megafork.recipe.kinds import RecipeError

LOCK = ".lock"
"""Name of the lock file. It stays after the lock is released, and names the last holder."""
_LOOK_S = 1.0
_TAKEN = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def sole_writer(folder: Path, field: str, *, patience_s: float = 0.0) -> Iterator[None]:
    """Hold `folder` exclusively within the block, creating it if missing. `field`: the key or option that names it, with its value.

    A POSIX lock (fcntl): the kernel releases it with the process, and network file systems pass it on to their server, so it also excludes
    other machines. Raises RecipeError when another process holds it for longer than `patience_s`, and for a folder that can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RecipeError(f"{field}: {str(folder)!r} can't be written ({error.strerror}): choose another folder") from None
    with file:
        _take(file.fileno(), folder, field, time.monotonic() + patience_s)
        with contextlib.suppress(OSError):  # the lock also works on a full disk
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}\n")
            file.flush()
        yield


def _take(file: int, folder: Path, field: str, deadline: float) -> None:
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                sys.stderr.write(
                    f"{str(folder)!r} is on a file system without locks ({error.strerror}): don't start two processes there at once\n"
                )
                return
        if time.monotonic() > deadline:
            holder = (folder / LOCK).read_text(encoding="utf-8").strip() or "unknown"
            raise RecipeError(f"{field}: another process is writing there ({holder}): wait until it ends, or choose another")
        time.sleep(_LOOK_S)
