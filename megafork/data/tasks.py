"""Generate reasoning-gym rows in a separate interpreter: `python -m megafork.data.tasks TASK SIZE SEED` writes JSON lines to stdout.

In 0.1.25 the rows of seven tasks also depend on Python's hash seed or on the global random state (word_ladder, list_functions, ...): two
ranks, or a run and its resumption, would have different data for one seed. The caller sets PYTHONHASHSEED; `random` is seeded here.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

from reasoning_gym.factory import DATASETS, create_dataset

from megafork.data.generated import MOST_ROWS


def make(task: str, size: int, seed: int) -> dict[str, Any]:
    """{"rows": an iterator}, or {"unknown": known names}, or {"failed": reason}.

    reasoning-gym generates item i of a task from seed + i. Seeds are spaced so that no two ranges overlap, whatever the sizes.
    """
    if task not in DATASETS:
        return {"unknown": sorted(DATASETS)}
    start = seed * MOST_ROWS
    random.seed(start)
    try:
        dataset = create_dataset(task, size=size, seed=start)
        dataset[0]  # numpy's older generators, which pool_matrix uses, take 32 bits
    except (AssertionError, TypeError, ValueError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    random.seed(start)
    return {"rows": map(_row, (dataset[index] for index in range(size)))}


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}


def _lines(made: dict[str, Any]) -> Iterator[str]:
    """The rows, one per line, or a single line with the reason why there are none."""
    for row in made.get("rows", [made]):
        yield json.dumps(row, default=lambda number: number.item()) + "\n"  # numpy's numbers


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a generator prints must not mix with the rows
    task, size, seed = sys.argv[1:]
    with out:
        out.writelines(_lines(make(task, int(size), int(seed))))


if __name__ == "__main__":
    main()
