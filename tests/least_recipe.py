"""The shortest recipe, and a file of it."""

from __future__ import annotations

from pathlib import Path

import pytest

LEAST = "model: {path: m}\ndata: {train: d.jsonl}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(LEAST)
    return file
