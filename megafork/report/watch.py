"""Keeps a report page up to date while its runs are in progress."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

from megafork.report.comparison import write_comparison
from megafork.report.report import write_report
from megafork.report.summary import setting
from megafork.run_folder import read_metrics, read_recipe


def write_page(folders: Sequence[Path], path: Path | None = None, *, refresh: float | None = None) -> Path:
    """Write the report of one run, or the comparison of several. `refresh`: seconds after which an open page reloads; None: never."""
    if len(folders) == 1:
        return write_report(folders[0], path, refresh=refresh)
    return write_comparison(folders, path, refresh=refresh)


def watch(folders: Sequence[Path], path: Path | None = None, *, seconds: float) -> Path:
    """Write the page every `seconds` until each run has its last step, or until Ctrl-C; returns its path.

    Waits for a run that has not written a step yet, and for a killed run to resume. The final page no longer reloads.
    Raises RecipeError as `write_page` does, for errors that waiting does not fix.
    """
    stopped: list[int] = []
    # Python's own handler raises an exception, which would be lost if raised in a callback or a finalizer.
    before = signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
    try:
        while not (stopped or all(map(_finished, folders))):
            if all(map(_begun, folders)):
                write_page(folders, path, refresh=seconds)
            until = time.monotonic() + seconds
            while not stopped and time.monotonic() < until:
                time.sleep(0.1)
    finally:
        signal.signal(signal.SIGINT, before)
    return write_page(folders, path)


def _begun(folder: Path) -> bool:
    file = folder / "metrics.jsonl"
    return file.exists() and bool(read_metrics(file))


def _finished(folder: Path) -> bool:
    """Whether the run has written its last step. A run without a recipe, whose number of steps is unknown, counts as finished."""
    steps = setting(read_recipe(folder), "train", "steps")
    return _begun(folder) and (not isinstance(steps, int) or read_metrics(folder / "metrics.jsonl")[-1]["step"] >= steps)
