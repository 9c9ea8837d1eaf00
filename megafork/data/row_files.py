"""Rows from files: resolves a path, a folder or a glob, and reads jsonl, json and parquet."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megafork.data.plain_json import parse
from megafork.files import LFS_POINTER
from megafork.recipe import RecipeError
from megafork.recipe.kinds import shown

Rows = Iterator[tuple[str, dict[str, Any]]]
FORMS = "give a .jsonl, .json or .parquet file, a folder or a glob of them, hub:NAME[@SUBSET][:SPLIT], or reasoning_gym:TASK[:SIZE[:SEED]]"
LONGEST_LINE = 64 * 2**20
"""Maximum bytes per line of JSON. A longer one means that the file has another form."""
_SUFFIXES = (".jsonl", ".json", ".parquet")
_IN_FOLDERS = (".jsonl", ".parquet")  # a folder's .json files mostly describe it
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")
_BOM = b"\xef\xbb\xbf"
_PACKED = re.compile(r"(.*\.(?:jsonl|json|parquet))\.(?:gz|zst|bz2|xz|lz4|zip)", re.DOTALL)
_OTHER_FORMS = {LFS_POINTER: "a Git LFS pointer, not the file itself: run `git lfs pull`"} | dict.fromkeys(
    (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"PK\x03\x04"), "compressed: unpack it first"
)
"""What files named like data are too often, by their first bytes."""
_UNREADABLE = (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError, NotImplementedError)


def data_files(source: str, field: str) -> list[Path]:
    """The files that a path, a folder or a glob names, sorted; `~` is the home folder.

    Raises RecipeError if there are none, and for a folder with files of several splits or forms: the user must choose.
    """
    path, named = Path(os.path.expanduser(source)), f"{field} is {shown(source)}"
    mode = _mode(path, named) if source else None
    if mode is None and re.search(r"[*?\[]", source):
        names = glob.glob(str(path), recursive=True)
        found = sorted(Path(name) for name in names if name.endswith(_SUFFIXES))
        _refuse_packed(names, named)
        files = [file for file in found if stat.S_ISREG(_mode(file, named) or 0)]
        if not files:
            raise RecipeError(f"{named}: no .jsonl, .json or .parquet file matches")
        return files
    if mode is not None and stat.S_ISDIR(mode):
        return _of_folder(path, named)
    _refuse_packed([path.name], named)
    if path.suffix not in _SUFFIXES:
        raise RecipeError(f"{named}: unknown form of data; {FORMS}")
    if mode is None:
        raise RecipeError(f"{named}: no such file; {FORMS}")
    if not stat.S_ISREG(mode):
        raise RecipeError(f"{named}: not a regular file, and data is read by every rank; write it to a file first")
    return [path]


def read_file(path: Path, place: str, field: str) -> Rows:
    """Yield (place, row), where place is `place`, the file's name, plus the number of the line or row, from 1. Raises RecipeError."""
    start = _start(path, field)
    if form := next((form for mark, form in _OTHER_FORMS.items() if start.startswith(mark)), None):
        raise RecipeError(f"{field}: {path} is {form}")
    if path.suffix == ".parquet":
        return _parquet(path, place, field)
    if path.suffix == ".json" and start.removeprefix(_BOM).lstrip().startswith(b"["):
        return _json_array(path, place, field)
    return _json_lines(path, place, field)


def _mode(path: Path, named: str) -> int | None:
    """The file's mode bits, or None if it does not exist."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # name too long, loop of links, no permission
        raise RecipeError(f"{named}: {error.strerror or error}; {FORMS}") from None
    except ValueError as error:  # a NUL character
        raise RecipeError(f"{named}: not a path ({error}); {FORMS}") from None


def _of_folder(folder: Path, named: str) -> list[Path]:
    try:
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise RecipeError(f"{named}: {error.strerror}") from None
    _refuse_packed(names, named)
    inside = [folder / name for name in names if name.endswith(_IN_FOLDERS)]
    if not inside:
        raise RecipeError(f"{named}, a folder without .jsonl or .parquet files: name another, or a glob such as FOLDER/*/*")
    for path in inside:
        if not stat.S_ISREG(_mode(path, f"{named}, with {path.name!r}") or 0):
            raise RecipeError(f"{named}, a folder whose {path.name!r} is not a file: restore it, or name the files by a glob")
    splits = sorted({match[1] for path in inside if (match := _SPLIT.search(path.stem.lower()))})
    if len(splits) > 1:
        raise RecipeError(
            f"{named}, a folder with files of several splits ({', '.join(splits)}): choose some by a glob such as "
            f"{folder / f'*{splits[0]}*'}"
        )
    if len({path.suffix for path in inside}) > 1:
        raise RecipeError(f"{named}, a folder with .jsonl and .parquet files: choose some by a glob such as *.parquet")
    return inside


def _refuse_packed(names: list[str], named: str) -> None:
    """Raise RecipeError for a shard that is only there compressed: without it the others would be read as the whole set."""
    for name in sorted(names):
        if (packed := _PACKED.fullmatch(name)) and packed[1] not in names:
            raise RecipeError(f"{named}: {Path(name).name!r} is compressed, and only plain files are read: unpack it first")


def _json_lines(path: Path, place: str, field: str) -> Rows:
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise RecipeError(f"{field}: {place} line {number} has over {LONGEST_LINE >> 20} MiB: write one JSON object per line")
                text = _decoded(line.removeprefix(_BOM) if number == 1 else line, f"{field}: {place} line {number}")
                if text.strip():
                    yield (
                        f"{place} line {number}",
                        _row(_parsed(text, f"{field}: {place} line {number}"), f"{field}: {place} line {number}"),
                    )
    except OSError as error:
        raise RecipeError(f"{field}: {place} cannot be read after line {number}: {error.strerror}") from None


def _start(path: Path, field: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError as error:
        raise RecipeError(f"{field}: {path.name} cannot be read: {error.strerror}") from None


def _json_array(path: Path, place: str, field: str) -> Rows:
    """Rows of a single array of objects, the form of Alpaca's and ShareGPT's files."""
    rows = _parsed(_decoded(path.read_bytes().removeprefix(_BOM), f"{field}: {place}"), f"{field}: {place}")
    for number, row in enumerate(rows, start=1):
        yield f"{place} row {number}", _row(row, f"{field}: {place} row {number}")


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where} is not valid JSON: it is not UTF-8; save the file as UTF-8 ({error})") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        fix = "write each row on one line, or all in one array in a .json file" if text.strip() in ("{", "[") else "fix or delete it"
        raise RecipeError(f"{where} is not valid JSON: {fix} ({error})") from None


def _row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RecipeError(f'{where} is a {type(row).__name__}: it must be one JSON object such as {{"prompt": ...}}')
    return row


def _parquet(path: Path, place: str, field: str) -> Rows:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):  # DAPO-Math's public file has 1.8 million rows, most of them repeats
                for row in _rows_of(batch):
                    number += 1
                    yield f"{place} row {number}", row
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"{field} is {str(path)!r}: not a readable parquet file after row {number}; write it again ({reason})") from None


def _rows_of(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows of a batch; if it cannot be read as a whole, row by row up to the bad one: non-UTF-8 text, or a date beyond year 9999."""
    try:
        rows = batch.to_pylist()
    except _UNREADABLE:
        rows = (batch.slice(place, 1).to_pylist()[0] for place in range(len(batch)))
    yield from rows
