"""Files that appear when they are whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """The name to write under; it becomes `file`, in the place of what is there, when the block ends without an error."""
    unfinished = file.with_name(file.name + ".writing")
    yield unfinished
    unfinished.replace(file)
