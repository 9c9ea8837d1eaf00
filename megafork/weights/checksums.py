"""Sizes and SHA-256 sums of a folder's files, stored beside them to detect damage; and syncing files to disk."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

SUMS = "checksums.json"
"""Name of the file that holds {file: [bytes, SHA-256]} for every other file in the folder."""


def sum_of(file: Path) -> list[Any]:
    with file.open("rb") as data:
        return [file.stat().st_size, hashlib.file_digest(data, "sha256").hexdigest()]


def write_sums(folder: Path) -> None:
    """Write the sums of all files below `folder` to its `SUMS` file."""
    sums = {str(file.relative_to(folder)): sum_of(file) for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / SUMS}
    (folder / SUMS).write_text(json.dumps(sums, indent=1, sort_keys=True))


def damaged_files(folder: Path) -> list[str]:
    """Each file that differs from what was written, with the reason. Raises OSError or ValueError if the sums cannot be read."""
    damaged = []
    for name, wanted in sorted(json.loads((folder / SUMS).read_text()).items()):
        file = folder / name
        if not file.is_file():
            damaged.append(f"{name} is missing")
        elif file.stat().st_size != wanted[0]:
            damaged.append(f"{name} has {file.stat().st_size} of {wanted[0]} bytes")
        elif sum_of(file) != wanted:
            damaged.append(f"{name} is not what was written")
    return damaged


def sync(folder: Path) -> None:
    """Flush a folder and everything below it to disk; call before the rename that publishes it."""
    for entry in [*folder.rglob("*"), folder]:
        _sync(entry)


def sync_name(entry: Path) -> None:
    """Flush the new name of `entry`, a file or folder just created or renamed, to disk."""
    _sync(entry.parent)


def _sync(entry: Path) -> None:
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
