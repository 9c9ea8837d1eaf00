"""A run's output per step: a line of metrics.jsonl, a live line, and the dashboards' data. Rank 0 only."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from megafork.files import whole
from megafork.report import numbers
from megafork.run_folder import read_metrics
from megafork.train.boards import Board

__all__ = ["RunLog", "gap", "read_metrics"]

HEADING_EVERY = 25  # lines


@dataclass(frozen=True)
class Column:
    """One column of the live lines. `wide` ones are omitted in terminals with fewer than 100 columns."""

    key: str
    heading: str
    width: int
    form: Callable[[float | None], str]
    style: str = ""
    wide: bool = False


COLUMNS = (
    Column("accuracy/mean", "acc", 6, numbers.percent, "bold green"),
    Column("loss/sft", "loss", 6, numbers.plain, "bold green"),
    Column("reward/mean", "reward", 6, numbers.plain, wide=True),
    Column("response_length/mean", "length", 6, numbers.plain, wide=True),
    Column("entropy/mean", "entropy", 7, numbers.plain, "cyan"),
    Column("forks/tau", "tau", 5, numbers.plain, "magenta"),
    Column("throughput/tokens_per_s", "tok/s", 7, numbers.plain),
    Column("time/rollout", "rollout", 7, numbers.seconds, "dim"),
    Column("time/score", "score", 6, numbers.seconds, "dim"),
    Column("time/update", "update", 6, numbers.seconds, "dim"),
    Column("time/refit", "refit", 5, numbers.seconds, "dim"),
)


class RunLog:
    """The log of one run, written by rank 0.

    `steps`: steps in the whole run. `resume_step`: the last step in the checkpoint; metrics of later steps, and a half-written last line,
    are dropped from metrics.jsonl, because those steps are repeated. 0 starts a new file. Every line is on disk when `write` returns.
    `boards`: also receive each step, and are closed with the log. `text`: also write the live lines to log.txt. `show_every`: steps per
    live line. `console`: destination of the live lines, by default standard output.

    Raises RecipeError if an existing metrics.jsonl is damaged anywhere but at its end.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        resume_step: int = 0,
        boards: Iterable[Board] = (),
        text: bool = False,
        show_every: int = 1,
        console: Console | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        kept = _kept(self._path, resume_step)
        _rewrite(self._path, kept)
        self._file = self._path.open("a", encoding="utf-8")
        self._last_step = kept[-1]["step"] if kept else -1
        self._boards = list(boards)
        self._text = (folder / "log.txt").open("a" if resume_step else "w", encoding="utf-8", buffering=1) if text else None
        screens = [console or _Terminal(highlight=False), *([_plain(self._text)] if self._text else [])]
        first = next((row["eval/accuracy"] for row in kept if row.get("eval/accuracy") is not None), None)
        self._lines = [LiveLines(steps, screen, every=show_every, first_accuracy=first) for screen in screens]
        if lost := _gap(kept, resume_step):
            self.note(lost)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Log one step. `metrics` maps names to numbers (Python, or one-element tensors and arrays) or None; "step" is required.

        Keys are written in alphabetical order after "step"; a non-finite number is written as null. Raises ValueError if "step" is not
        above the last one written, TypeError for a value that is not a number.
        """
        row = _clean(metrics)
        if row["step"] <= self._last_step:
            raise ValueError(f"step {row['step']} written after step {self._last_step}")
        self._last_step = row["step"]
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for board in self._boards:
            board.write(row)
        now = time.monotonic()
        for lines in self._lines:
            lines.show(row, now)

    def amend(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add metrics to the line of `step`, the last one of the previous process, or write a new line if that one was lost."""
        kept = read_metrics(self._path)
        before = kept.pop() if kept and kept[-1]["step"] == step else {}
        self._file.close()
        _rewrite(self._path, kept)
        self._file = self._path.open("a", encoding="utf-8")
        self._last_step = step - 1
        self.write({**before, **metrics, "step": step})

    def note(self, text: str) -> None:
        """Print a line between the steps' lines."""
        for lines in self._lines:
            lines.note(text)

    def close(self) -> None:
        """Close the log and its boards. Idempotent."""
        self._file.close()
        if self._text is not None:
            self._text.close()
        for board in self._boards:
            board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Terminal(Console):
    """Standard output. Its reader may end before the run (`| head`), which then goes on without it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), self.file.fileno())


class LiveLines:
    """One line per step, under a heading repeated from time to time; plain text if the output is not a terminal."""

    def __init__(self, steps: int, console: Console, *, every: int = 1, first_accuracy: float | None = None) -> None:
        self._steps, self._console, self._every = steps, console, every
        self._columns: list[Column] = []
        self._printed = 0
        self._first_accuracy = first_accuracy
        self._ends: deque[tuple[float, int]] = deque(maxlen=11)  # when recent steps ended

    def show(self, row: Mapping[str, Any], now: float) -> None:
        """`now`: when the step ended, in seconds of one clock; every log of a run is given the same."""
        self._ends.append((now, row["step"]))
        due = row["step"] % self._every == 0 or row["step"] in (1, self._steps)
        if due and any(column.key in row for column in COLUMNS):
            self._show_step(row)
        if row.get("eval/accuracy") is not None:
            self._show_accuracy(row["step"], row["eval/accuracy"])

    def note(self, text: str) -> None:
        self._print(Text(f"{' ' * self._step_width} {text}", style="dim"))

    def _show_step(self, row: Mapping[str, Any]) -> None:
        narrow = self._console.width < 100
        columns = [c for c in COLUMNS if (c.key in row or c in self._columns) and not (narrow and c.wide)]
        if columns != self._columns:  # a first step that had nothing to learn from lacks most
            self._columns, self._printed = columns, 0
        if self._printed % HEADING_EVERY == 0:
            heading = ["step".rjust(self._step_width), *(c.heading.rjust(c.width) for c in self._columns), "left".rjust(7)]
            self._print(Text(" ".join(heading), style="dim"))
        self._printed += 1
        line = Text(f"{row['step']}/{self._steps}".rjust(self._step_width), style="bold")
        for column in self._columns:
            line.append(" ").append(column.form(row.get(column.key)).rjust(column.width), style=f"not bold {column.style}")
        self._print(line.append(" ").append(self._left(row["step"]).rjust(7), style="not bold"))

    def _show_accuracy(self, step: int, accuracy: float) -> None:
        if self._first_accuracy is None:
            self._first_accuracy = accuracy
        gain = 100 * (accuracy - self._first_accuracy)
        change = f" ({gain:+.1f} points since the first)" if gain else ""
        when = "before training" if step == 0 else f"after step {step}"
        self._print(Text(f"{' ' * self._step_width} held-out accuracy {numbers.percent(accuracy)} {when}{change}", style="bold green"))

    def _left(self, step: int) -> str:
        """Time left, extrapolated from the wall-clock pace of the last ten steps."""
        if step >= self._steps:
            return "done"
        (start, first), (end, last) = self._ends[0], self._ends[-1]
        return numbers.duration((end - start) / (last - first) * (self._steps - step)) if last > first else numbers.MISSING

    @property
    def _step_width(self) -> int:
        return max(4, 2 * len(str(self._steps)) + 1)

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)


def gap(path: Path, step: int) -> str | None:
    """A remark naming the steps up to `step`, the checkpoint's, that a metrics.jsonl lacks; None if it lacks none."""
    return _gap(_kept(path, step), step)


def _gap(kept: list[dict[str, Any]], step: int) -> str | None:
    lost = set(range(1, step + 1)) - {row["step"] for row in kept}
    if not lost:
        return None
    starts = [number for number in sorted(lost) if number - 1 not in lost]
    ends = [number for number in sorted(lost) if number + 1 not in lost]
    named = ", ".join(f"{start} to {end}" if end > start else str(start) for start, end in zip(starts, ends, strict=True))
    return f"metrics.jsonl has no line for {'steps' if len(lost) > 1 else 'step'} {named}, which the checkpoint includes: curves lack them"


def _kept(path: Path, resume_step: int) -> list[dict[str, Any]]:
    """The complete lines of steps up to `resume_step`; none if it is 0, as the initial evaluation is repeated."""
    return [row for row in read_metrics(path) if row["step"] <= resume_step] if resume_step and path.exists() else []


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    with whole(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def _plain(file: TextIO) -> Console:
    """A plain-text console, whatever colours and width the environment sets."""
    return Console(file=file, width=120, force_terminal=False, color_system=None, highlight=False)


def _clean(metrics: Mapping[str, Any]) -> dict[str, Any]:
    step = _number("step", metrics.get("step"))
    if not isinstance(step, int):
        raise TypeError(f"step is {step!r}: it must be an integer")
    return {"step": step, **{key: _number(key, metrics[key]) for key in sorted(metrics) if key != "step"}}


def _number(key: str, value: Any) -> int | float | None:
    value = value.item() if hasattr(value, "item") else value
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if not isinstance(value, float):
        raise TypeError(f"metric {key!r} is {value!r}: it must be a number or None")
    return value if math.isfinite(value) else None
