"""Recipes to ablate, what a finished run leaves, and the tables as text."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from task import write_recipe

from megafork.ablate.options import Trial
from megafork.ablate.table import tables


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """top.yaml of the tiny task, and all.yaml, which extends it."""
    monkeypatch.chdir(tmp_path)
    relative = {"run": {"folder": "runs"}, "model": {"path": "model"}, "data": {"train": "train.jsonl", "eval": "held_out.jsonl"}}
    write_recipe(tmp_path, **relative, eval={"every": 1, "samples": 2}, checkpoint={"every": 1, "export_hf": False})
    (tmp_path / "recipe.yaml").rename(tmp_path / "top.yaml")
    (tmp_path / "all.yaml").write_text("extends: top.yaml\nforks: {select: all}\n")
    return ["top.yaml", "all.yaml"]


def write_run(trial: Trial, accuracies: list[float], prompts: list[float], **last: float) -> None:
    """What a finished run leaves: an evaluation before the first step and after each."""
    folder = trial.recipe.run_folder
    (folder / "evaluations").mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {"step": step, "eval/accuracy": value, "eval/response_length": 1.0, "entropy/mean": 2.0, "time/step": 30.0}
        for step, value in enumerate(accuracies)
    ]
    rows[-1] |= {key.replace("__", "/"): value for key, value in last.items()}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluations" / f"step_{len(rows) - 1:06d}.json").write_text(json.dumps({"step": len(rows) - 1, "accuracies": prompts}))


def shown(results: dict[str, Any], width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(tables(results))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]
