"""One process at a time for a folder, until that process ends, however it ends, and whatever file system the folder is on."""

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
"""The file's name. It stays when nobody holds it, and names who held it last."""
_LOOK_S = 1.0
_TAKEN = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def sole_writer(folder: Path, field: str, *, patience_s: float = 0.0) -> Iterator[None]:
    """Within, this process alone holds `folder`, which is made where it is missing. `field`: what names it, and its value.

    The lock is POSIX's (fcntl): the kernel drops it with the process, and network file systems pass it on to their server, so that it
    also holds against other machines. Raises RecipeError when another process has it for longer than `patience_s`, and for a folder that
    can't be written.
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
        with contextlib.suppress(OSError):  # on a full disk it is a lock all the same
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
                    f"{str(folder)!r} is on a file system without locks ({error.strerror}): start nothing there twice at once\n"
                )
                return
        if time.monotonic() > deadline:
            holder = (folder / LOCK).read_text(encoding="utf-8").strip() or "of unknown name"
            raise RecipeError(f"{field}: another process is writing there ({holder}): wait for its end, or choose another")
        time.sleep(_LOOK_S)
