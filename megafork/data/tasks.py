"""Make reasoning-gym rows in an interpreter of their own: `python -m megafork.data.tasks TASK SIZE SEED`, pickled to stdout.

In 0.1.25 the rows of seven tasks also depend on Python's hash seed or on the global random state (word_ladder, list_functions, ...): two
ranks, or a run and its resumption, would hold different data under one seed. The caller sets PYTHONHASHSEED; `random` is seeded here.
"""

from __future__ import annotations

import os
import pickle
import random
import sys
from typing import Any

from reasoning_gym.factory import DATASETS, create_dataset


def make(task: str, size: int, seed: int) -> dict[str, Any]:
    """{"rows": [...]}, or {"unknown": known names}, or {"failed": reason}."""
    if task not in DATASETS:
        return {"unknown": sorted(DATASETS)}
    random.seed(seed)
    try:
        dataset = create_dataset(task, size=size, seed=seed)
    except (AssertionError, TypeError, ValueError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    entries = (dataset[index] for index in range(size))
    return {"rows": [{"prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]} for entry in entries]}


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a generator prints must not mix with the rows
    task, size, seed = sys.argv[1:]
    with out:
        pickle.dump(make(task, int(size), int(seed)), out)


if __name__ == "__main__":
    main()
