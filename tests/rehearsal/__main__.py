"""Shows where a step of a tiny model waits for the GPU, and what it copies:

    PYTHONPATH=.:tests python -m rehearsal [key=value ...]

for example `python -m rehearsal parallel.tp=2 parallel.sp=true model.recompute=full`. Prints rank 0's events of a whole step, and each
rank's waits per micro-batch, derived from two steps with different numbers of micro-batches.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from ranks import on_ranks
from tiny import recipe, save_model

from rehearsal.step import waits_of


def main(*changes: str) -> None:
    sections: dict[str, dict[str, Any]] = {"train": {"micro_batch_tokens": 64}, "optimizer": {"lr": 1e-2, "eps": 1e-2}}
    for change in changes:
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = yaml.safe_load(value)
    with tempfile.TemporaryDirectory() as folder:
        spec = recipe(save_model(Path(folder), tie_word_embeddings=False), **sections)
        found = on_ranks(spec.parallel.model_size, waits_of, spec)
    sys.stdout.write(f"{found[0].ledger.table()}\n{[round(one.each, 2) for one in found]} waits a micro-batch, by rank\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
