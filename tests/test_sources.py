"""Where rows come from: files, shards, the hub and reasoning-gym; and one clear line for every wrong source."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megafork.data.row_files import LONGEST_LINE
from megafork.data.sources import read_rows
from megafork.recipe import Data, RecipeError
from megafork.recipe_file import load_recipe

ROWS = [{"prompt": f"{n}?", "answer": n} for n in range(3)]


def write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(source: Any) -> list[Any]:
    return [row["answer"] for _, row in read_rows(source, "data.train")]


# ---------------------------------------------------------------- shards


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_folder_a_glob_and_a_list_are_their_files_in_order(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [write(tmp_path / "set" / f"train-0000{n}-of-00003.{ending}", [row]) for n, row in enumerate(ROWS)]
    (tmp_path / "set" / "README.md").write_text("about it")
    write(tmp_path / "other" / f"train-00000-of-00003.{ending}", [{"prompt": "9?", "answer": 9}])
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (
        f"{tmp_path}/set",
        f"{tmp_path}/set/",
        f"{tmp_path}/set/*.{ending}",
        f"{tmp_path}/s*/**/train-*",
        "~/set",
        "~/set/*",
        shards,
    ):
        assert answers(source) == [0, 1, 2], source
    assert answers([shards[2], shards[0]]) == [2, 0], "a list keeps its order"
    assert answers([shards[1], f"{tmp_path}/set"]) == [1, 0, 2], "each file once"
    assert answers(f"{tmp_path}/*/*") == [9, 0, 1, 2]
    places = [place for place, _ in read_rows(f"{tmp_path}/*/*", "data.train")]
    what = "line" if ending == "jsonl" else "row"
    assert places[0].endswith(f"other/train-00000-of-00003.{ending} {what} 1") and places[2] == f"train-00001-of-00003.{ending} {what} 1"


def test_a_list_comes_from_a_recipe_and_from_an_override(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {path: m}\ndata: {train: [a.jsonl, 'b/*.parquet'], columns: {answer: gold}}\n")
    assert load_recipe(file).data.train == ["a.jsonl", "b/*.parquet"]
    changed = load_recipe(file, ["data.train=[c.jsonl,hub:x/y]", "data.columns.prompt=problem", "data.eval=*.jsonl", "data.add_bos=false"])
    assert changed.data.train == ["c.jsonl", "hub:x/y"] and changed.data.eval == "*.jsonl" and changed.data.add_bos is False
    assert changed.data.columns == {"answer": "gold", "prompt": "problem"}
    for override, reason in {
        "data.columns.reply=x": r"data.columns is 'reply': must be a mapping of prompt or answer or response to text",
        "data.columns=7": r"data.columns is 7: must be a mapping",
        "data.add_bos=maybe": r"data.add_bos is 'maybe': must be auto or true or false",
        "data.train=[]": r"data.train is \[\]: name a file",
        "data.eval=[a.jsonl,'b/*.parquet']": r"data.eval is .*, the same as data.train",
    }.items():
        with pytest.raises(RecipeError, match=reason):
            load_recipe(file, [override])


def test_a_folder_of_several_splits_or_forms_is_not_guessed_at(tmp_path: Path) -> None:
    for one, other in (("train-0.jsonl", "test-0.jsonl"), ("math_train.jsonl", "Math_TEST.jsonl"), ("0.test.jsonl", "0.train.jsonl")):
        folder = tmp_path / one.split(".")[0]
        write(folder / one, ROWS)
        write(folder / other, ROWS)
        with pytest.raises(RecipeError, match=r"a folder with files of several splits \(test, train\): choose some by a glob"):
            answers(str(folder))
    write(tmp_path / "forms" / "a.jsonl", ROWS)
    write(tmp_path / "forms" / "a.parquet", ROWS)
    with pytest.raises(RecipeError, match=r"a folder with .jsonl and .parquet files"):
        answers(str(tmp_path / "forms"))
    (tmp_path / "none").mkdir()
    with pytest.raises(RecipeError, match=r"a folder without .jsonl or .parquet files"):
        answers(str(tmp_path / "none"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train-0.parquet").symlink_to("not downloaded")
    with pytest.raises(RecipeError, match=r"a folder whose 'train-0.parquet' is not a file"):
        answers(str(tmp_path / "broken"))
    with pytest.raises(RecipeError, match=r"no .jsonl, .json or .parquet file matches"):
        answers(str(tmp_path / "none" / "*.jsonl"))


def test_a_json_file_may_be_one_array(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("\ufeff" + json.dumps(ROWS, indent=2))
    assert [place for place, _ in read_rows(str(tmp_path / "rows.json"), "data.train")] == [f"rows.json row {n}" for n in (1, 2, 3)]
    (tmp_path / "rows.json").write_text("[1]")
    with pytest.raises(RecipeError, match=r"rows.json row 1 is a int: it must be one JSON object"):
        answers(str(tmp_path / "rows.json"))


def test_byte_order_mark_carriage_returns_and_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes("\ufeff".encode() + b'{"answer": 1}\r\n\r\n   \r\n{"answer": "\xe6\x95\xb0"}')
    assert answers(str(tmp_path / "rows.jsonl")) == [1, "数"]


def test_a_compressed_shard_is_not_left_out_in_silence(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train-0.jsonl", ROWS)
    (tmp_path / "set" / "train-1.jsonl.gz").write_bytes(gzip.compress(b"{}", mtime=0))
    for source in ("set", "set/*", "set/train-1.jsonl.gz"):
        with pytest.raises(RecipeError, match=r"'train-1.jsonl.gz' is compressed, and only plain files are read: unpack it first"):
            answers(str(tmp_path / source))
    write(tmp_path / "set" / "train-1.jsonl", [{"prompt": "9?", "answer": 9}])
    assert answers(str(tmp_path / "set")) == answers(f"{tmp_path}/set/*") == [0, 1, 2, 9], "it is there unpacked as well"


# ---------------------------------------------------------------- wrong files


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
        (gzip.compress(b"{}", mtime=0), "is compressed: unpack it first"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_a_file_of_another_form_than_its_name_says(content: bytes, reason: str, ending: str, tmp_path: Path) -> None:
    (tmp_path / f"rows.{ending}").write_bytes(content)
    with pytest.raises(RecipeError, match=f"^data.train: .*rows.{ending} {reason}"):
        answers(str(tmp_path / f"rows.{ending}"))


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_row_over_several_lines_is_said_to_be_one(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"rows.{ending}").write_text(json.dumps(ROWS[0], indent=1))
    with pytest.raises(RecipeError, match=f"rows.{ending} line 1 is not valid JSON: write each row on one line"):
        answers(str(tmp_path / f"rows.{ending}"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("rows.csv", "unknown form of data; give a .jsonl, .json or .parquet file, a folder or a glob of them, hub:NAME[@SUBSET]"),
        ("gsm8k", "unknown form of data"),
        ("hub:", "unknown form of data"),
        ("torn.parquet", "not a readable parquet file after row 0"),
        ("reasoning_gym:chain_sun", "reasoning_gym has no task 'chain_sun': did you mean 'chain_sum'?"),
        ("reasoning_gym:chain_sum:many", "SIZE must be an integer above 0"),
        ("reasoning_gym:chain_sum:0", "SIZE must be an integer above 0"),
        ("reasoning_gym:chain_sum:5:-1", "SEED one of at least 0"),
        ("reasoning_gym:chain_sum:5:1:2", "SIZE must be an integer above 0"),
        ("reasoning_gym:chain_sum:٣", "SIZE must be an integer above 0"),
        ("reasoning_gym:chain_sum:1000000000000", "SIZE is at most 1,048,576"),
        ("reasoning_gym:chain_sum:5:4294967296", "SEED is at most 4,294,967,295"),
        ("reasoning_gym:pool_matrix:5:5000", "cannot be made with its default settings and this seed"),
        ("reasoning_gym:composite:5", "cannot be made with its default settings"),
    ],
)
def test_a_wrong_source_is_one_recipe_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("prompt,answer\n")
    Path("torn.parquet").write_bytes(Path(write(tmp_path / "whole.parquet", ROWS)).read_bytes()[:-20])
    with pytest.raises(RecipeError) as caught:
        list(read_rows(source, "data.train"))
    assert str(caught.value).startswith(f"data.train is {source!r}: ") and message in str(caught.value) and "\n" not in str(caught.value)


def test_parquet_rows_count_on_over_batches(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.parquet", [{"prompt": str(i)} for i in range(5000)])
    places = [(place, row["prompt"]) for place, row in read_rows(source, "data.train")]
    assert places == [(f"rows.parquet row {i + 1}", str(i)) for i in range(5000)]


def odd_paths(folder: Path) -> dict[str, str]:
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "l1.jsonl").symlink_to("l2.jsonl")
    (folder / "l2.jsonl").symlink_to("l1.jsonl")
    (folder / "file").write_text("")
    return {
        str(folder / "pipe.jsonl"): "not a regular file",
        "/dev/null": "unknown form of data",
        str(folder / "l1.jsonl"): "Too many levels of symbolic links",
        str(folder / ("z" * 300 + ".jsonl")): "File name too long",
        str(folder / "a\0.jsonl"): "not a path",
        str(folder / "*\0.jsonl"): "not a path",
        str(folder / "file" / "rows.jsonl"): "no such file",
        "~nobody-by-that-name/rows.jsonl": "no such file",
        "": "unknown form of data",
    }


def test_odd_paths_are_one_line_and_nothing_waits(tmp_path: Path) -> None:
    for source, reason in odd_paths(tmp_path).items():
        if source:
            Data(train=source, eval=source + "x")
        with pytest.raises(RecipeError, match=f"^data.train is .*{reason}") as caught:
            answers(source)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "half \\ud83d"}', "half of a surrogate pair"),
        (b'{"other": ["\\uDC00"]}', "half of a surrogate pair"),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
        (b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
        (b'{"x": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"\0\0\0", "Expecting value"),
        (b"null", "is a NoneType: it must be one JSON object"),
        (b'"text"', "is a str: it must be one JSON object"),
    ],
)
def test_a_line_that_cannot_travel_on_is_named(line: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"answer": 1}\n' + line + b"\n")
    with pytest.raises(RecipeError, match=f"^data.train: rows.jsonl line 2 .*{reason}"):
        answers(str(tmp_path / "rows.jsonl"))


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"answer": "\\ud83d\\ude00"}')
    assert answers(str(tmp_path / "rows.jsonl")) == ["😀"]


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("wb") as file:
        file.truncate(LONGEST_LINE * 1000)  # a hole, which takes no room
    with pytest.raises(RecipeError, match=r"rows.jsonl line 1 has over 64 MiB"):
        answers(str(tmp_path / "rows.jsonl"))


def test_what_arrow_cannot_hand_over_is_named_by_its_row(tmp_path: Path) -> None:
    bad_text = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(struct.pack("<3i", 0, 1, 2)), pyarrow.py_buffer(b"a\xff")]
    )
    late = pyarrow.array([0, 2**62], type=pyarrow.timestamp("us"))
    for column in (bad_text, late):
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["?", "?"], "answer": column}), tmp_path / "rows.parquet")
        with pytest.raises(RecipeError, match="not a readable parquet file after row 1; write it again"):
            answers(str(tmp_path / "rows.parquet"))


# ---------------------------------------------------------------- hub


def test_hub_dataset_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` loads a local folder by the same call as a hub name."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", [{"prompt": f"{i}?", "answer": i} for i in range(3)])
    write(folder / "test.jsonl", [{"prompt": "7?", "answer": 7}])
    assert answers(f"hub:{folder}") == [0, 1, 2]
    assert answers(f"hub:{folder}:test") == [7]
    assert answers(f"hub:{folder}:train[:2]") == [0, 1]
    files = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    assert answers(f"hub:{folder}@test:train") == [7], "a subset's only split is called train"
    script = Path(write(tmp_path / "apps" / "apps.py", [])).parent  # as the hub's APPS, TACO and LiveCodeBench: `datasets` runs none
    for wrong in (f"hub:{folder}:train", f"hub:{folder}@nope", f"hub:{folder}@test:nope", f"hub:{tmp_path / 'missing'}", f"hub:{script}"):
        with pytest.raises(
            RecipeError, match=r"^data.train is 'hub:.*: the dataset could not be loaded; check its name, subset, split and the network"
        ):
            answers(wrong)


def test_hub_without_the_package_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['datasets'] = None; from megafork.data.sources import read_rows; next(read_rows('hub:a/b', 'data.eval'))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "RecipeError: data.eval is 'hub:a/b': the package `datasets` is missing; pip install 'megafork[hub]'" in result.stderr
