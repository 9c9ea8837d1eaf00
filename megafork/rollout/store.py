"""Completions on disk: one JSON line each, written as it ends, so that interrupted sampling can resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megafork.recipe import RecipeError
from megafork.rollout.engine import Completion

Key = tuple[str, int]
"""(`prompt_key`, sample number)."""
_FIELDS = {"prompt", "sample", "text", "tokens", "truncated"}


def prompt_key(tokens: Sequence[int]) -> str:
    """16 hex digits that identify a prompt, the same in every data set."""
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()[:16]


class Store:
    """The completions of one model under one sampling: a folder with `part-N.jsonl` for each engine N that wrote some."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield each completion once, file by file: {"prompt", "sample" (its `Key`), "text", "tokens" (ids), "truncated"}.

        An incomplete last line is skipped. Raises RecipeError, naming file and line, for any other line that is not a completion.
        """
        seen: set[Key] = set()
        for file in sorted(self.folder.glob("part-*.jsonl")):
            for row, _ in _lines(file):
                key = (row["prompt"], row["sample"])
                if key not in seen:
                    seen.add(key)
                    yield row

    @contextmanager
    def append(self, part: int) -> Iterator[Callable[[Key, Completion, str], None]]:
        """Yield a function that writes one completion with its text. A partial last line is removed first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"part-{part}.jsonl"
        with path.open("a") as file:
            file.truncate(max((end for _, end in _lines(path)), default=0))

            def write(key: Key, completion: Completion, text: str) -> None:
                row = {"prompt": key[0], "sample": key[1], "text": text, "tokens": completion.tokens, "truncated": completion.truncated}
                file.write(json.dumps(row) + "\n")
                file.flush()  # data in the kernel's buffers outlives this process

            yield write


def _lines(file: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each line's object and the byte offset at which the line ends."""
    end, broken = 0, ""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if broken:
                raise RecipeError(f"{broken}: delete that line, its completion is then generated again")
            end += len(line)
            try:
                row = json.loads(line)
                complete = row.keys() >= _FIELDS and line.endswith(b"\n")
            except (ValueError, AttributeError):
                complete = False
            if complete:
                yield row, end
            else:
                broken = f"{str(file)!r} line {number} is not a completion"
