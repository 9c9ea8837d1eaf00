"""Atomic file writes, and full disks."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text begins that Git puts in place of a file which Git LFS has not fetched."""


@contextmanager
def whole(file: Path, *, alone: bool = True) -> Iterator[Path]:
    """Yield a temporary name to write to; that file replaces `file` when the block ends, and is deleted if the block raises.

    `alone`: no other process writes `file` at the same time, so the name is fixed and killed writers leave at most one file.
    """
    unfinished = file.with_name(f"{file.name}.writing" if alone else f"{file.name}.{os.getpid()}.writing")
    try:
        yield unfinished
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def check_room(folder: Path) -> None:
    """Raise OSError unless one more megabyte can be written."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())


def full_disk(error: BaseException | None) -> str | None:
    """One line about the full disk or exceeded quota behind an error; None if neither is the cause."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" for {str(error.filename)!r}" if error.filename else ""
            return f"no room is left{where} ({error.strerror}): completed work is kept; make room, and the same command continues"
        error = error.__cause__ or error.__context__
    return None
