"""A process that holds the lock of a folder."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megafork.lock import sole_writer


def _hold(folder: Path, for_s: float, taken: Any) -> None:
    with sole_writer(folder, "--out is 'x'"):
        taken.set()
        time.sleep(for_s)


@contextmanager
def another(folder: Path, for_s: float = 60.0) -> Iterator[Any]:
    """A process that holds the folder."""
    context = multiprocessing.get_context("fork")
    taken = context.Event()
    process = context.Process(target=_hold, args=(folder, for_s, taken))
    process.start()
    assert taken.wait(30)
    yield process
    process.kill()
    process.join()
