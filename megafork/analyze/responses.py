"""Responses and entropies as parquet files, written and read one row group at a time, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megafork.analyze.inputs import AnalysisInputs
from megafork.files import whole
from megafork.recipe import RecipeError

AT_ONCE = 256
"""Responses per row group, which are in memory at once."""
_IDENTITY = b"identity"
_RESPONSES = pa.schema(
    [
        ("prompt", pa.string()),
        ("sample", pa.int32()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.int32())),
        ("truncated", pa.bool_()),
        ("response", pa.string()),
    ]
)
_ENTROPIES = pa.schema([("entropies", pa.list_(pa.float32())), ("log_probs", pa.list_(pa.float32()))])


def is_current(file: Path, identity: str) -> bool:
    """Whether the file exists, is complete and has that identity."""
    try:
        found = pq.read_schema(file).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return found.get(_IDENTITY) == identity.encode()


def write_responses(inputs: AnalysisInputs) -> None:
    """Write the analysis's responses, picked from the job's completions, in the order in which they ended."""
    job = inputs.job
    rows = (
        {
            "prompt": row["prompt"],
            "sample": row["sample"],
            "prompt_tokens": list(job.prompts[row["prompt"]]),
            "tokens": row["tokens"],
            "truncated": row["truncated"],
            "response": row["text"],
        }
        for row in job.store(job.samplings[0]).rows()
        if row["prompt"] in job.prompts and row["sample"] < job.samples
    )
    _write(inputs.responses, _RESPONSES, inputs.identity, _grouped(rows))


def write_entropies(inputs: AnalysisInputs, label: str, groups: Iterable[list[dict[str, Any]]]) -> None:
    """Write a model's entropies and log-probs, one row per response; the groups are those of the responses."""
    _write(inputs.entropies(label), _ENTROPIES, inputs.identity_of(label), groups)


def read_responses(inputs: AnalysisInputs, columns: Sequence[str] = ()) -> Iterator[list[dict[str, Any]]]:
    """Read the responses one row group at a time."""
    with pq.ParquetFile(inputs.responses) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=list(columns) or None).to_pylist()


def read_lists(file: Path, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read a list column by row groups: all values flat, and the end of each response. Raises RecipeError for a damaged file."""
    try:
        with pq.ParquetFile(file) as opened:
            for group in range(opened.num_row_groups):
                lists = opened.read_row_group(group, columns=[column])[column].combine_chunks()
                offsets = lists.offsets.to_numpy()
                yield lists.values.to_numpy()[offsets[0] : offsets[-1]], offsets[1:] - offsets[0]
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"{str(file)!r} is damaged ({reason}): delete it and repeat the command to write it again") from None


def _grouped(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for row in rows:
        group.append(row)
        if len(group) == AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _write(file: Path, schema: pa.Schema, identity: str, groups: Iterable[list[dict[str, Any]]]) -> None:
    """Write a parquet file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    described = schema.with_metadata({_IDENTITY: identity})
    with whole(file) as unfinished, pq.ParquetWriter(unfinished, described, compression="zstd") as writer:
        for rows in groups:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
