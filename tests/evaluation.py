"""Benchmarks, options and a verifier for `megafork eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megafork.evaluate.options import EvaluationOptions


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def options_for(task: Path, **changes: Any) -> EvaluationOptions:
    values: dict[str, Any] = {
        "model": str(task / "model"),
        "benchmarks": (str(task / "held_out.jsonl"),),
        "samples": 4,
        "template": "plain",
        "verifier": "exact",
        "workers": 1,
        "ranks": 1,
        "kv_cache_mb": 32,
        "out": str(task / "evaluations"),
    }
    return EvaluationOptions(**{**values, **changes})


def own_verifier(folder: Path) -> str:
    """Right if the answer stands anywhere in the response: of a random model some are, and some are not."""
    (folder / "own.py").write_text("def score(text, row):\n    return row['answer'] in text.split()\n")
    return f"{folder / 'own.py'}:score"
