"""Rows of prompts in a file, and the prompts that are read from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megafork.data.prompts import Prompt, load_prompts
from megafork.data.tokenizer import Tokenizer
from megafork.recipe import Data


def write(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def load(
    source: str, tokenizer: Tokenizer, needs: tuple[str, ...] = ("answer",), *, remarks: list[str] | None = None, **settings: Any
) -> list[Prompt]:
    said = [] if remarks is None else remarks
    return load_prompts(source, Data(train=source, **settings), tokenizer, needs=needs, remark=said.append)
