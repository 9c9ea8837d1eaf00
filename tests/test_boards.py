"""Boards get each step once, even across a resume; the real Weights & Biases, offline; what is missing is reported before the run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import megafork
from task import make_task, write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from megafork.doctor import can_run, examine
from megafork.recipe import Log, Recipe, RecipeError
from megafork.recipe_file import load_recipe
from megafork.train.boards import TensorBoard, WeightsAndBiases, check_boards


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        board.write({"step": step, "entropy/mean": 0.1 * step, "gone": None})
    board.close()
    board = TensorBoard(tmp_path, resume_step=1)
    board.write({"step": 2, "entropy/mean": 0.7})
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["entropy/mean"]
    found = {event.step: event.value for event in events.Scalars("entropy/mean")}
    assert found == {1: pytest.approx(0.1), 2: pytest.approx(0.7)}


def records(file: Path) -> Iterator[bytes]:
    """Of a .wandb file: 7 bytes of header, then LevelDB's log, blocks of 32 KiB with records that may be cut at their edges."""
    data, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def drawn(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the offline runs below `folder` were given, in order, and the last one's (id, project, name, config)."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    rows: list[dict[str, Any]] = []
    run: dict[str, Any] = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in records(file):
            record = pb.Record.FromString(data)
            if record.HasField("run"):
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update if item.key}
                run = {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name, "config": config}
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows, run


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("WANDB_MODE", "offline")
    return load_recipe(write_recipe(tmp_path, log={"wandb": "forks"}))


def test_weights_and_biases_has_each_step_once(recipe: Recipe) -> None:
    pytest.importorskip("wandb")
    board = WeightsAndBiases(recipe)
    for step in (0, 1, 2, 2):
        board.write({"step": step, "entropy/mean": 0.5 * step, "gone": None})
    board.close()
    rows, run = drawn(recipe.run_folder)
    assert [(row["_step"], row["entropy/mean"]) for row in rows] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert all("gone" not in row and "step" not in row for row in rows)
    assert (run["project"], run["name"]) == ("forks", "run")
    assert run["config"]["forks"]["top_entropy_quantile"] == 0.2


def test_a_resumed_run_is_the_same_run_and_a_new_one_another(recipe: Recipe) -> None:
    pytest.importorskip("wandb")
    identities = []
    for resume_step in (0, 3, 0):
        WeightsAndBiases(recipe, resume_step).close()
        identities.append((recipe.run_folder / "wandb" / "id").read_text())
    assert identities[0] == identities[1] != identities[2]


def test_what_is_missing_is_said_before_the_run(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    check_boards(Log())
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "wandb", None)
        with pytest.raises(
            RecipeError, match=r"log.wandb is 'forks' but the package wandb is not installed: pip install 'megafork\[wandb\]'"
        ):
            check_boards(recipe.log)
        check_boards(Log())
    with pytest.raises(RecipeError, match=r"log\.wandb is 'a/b': it names a project"):
        check_boards(Log(wandb="a/b"))
    with pytest.raises(RecipeError, match=r"^log\.wandb is 'false': it names a project; leave it out, or give null, for none$"):
        check_boards(Log(wandb="false"))


def test_doctor_looks_for_the_package(recipe: Recipe) -> None:
    pytest.importorskip("wandb")
    found = {finding.name: finding for finding in examine(recipe)}
    assert found["log.wandb"].ok and can_run([found["log.wandb"]])
    assert "log.wandb" not in {finding.name for finding in examine(recipe.model_copy(update={"log": Log()}))}


@pytest.mark.slow
def test_without_a_key_it_does_not_begin(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    make_task(tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
    done = megafork("sft", "recipe.yaml", cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("megafork: log.wandb is 'forks' but wandb can't log in (") and done.stderr.count("\n") == 1
    assert done.stderr.endswith(": run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline\n")
    assert not recipe.run_folder.exists()


@pytest.mark.slow
def test_a_whole_run_that_is_continued(recipe: Recipe, tmp_path: Path) -> None:
    """Plain text where the output is no terminal, the same in log.txt, and every step on the board, without a word of wandb's own."""
    pytest.importorskip("wandb")
    make_task(tmp_path)
    output = ""
    for steps in (2, 4):
        done = megafork("sft", "recipe.yaml", "log.text=true", f"train.steps={steps}", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        output += done.stdout
    assert "\x1b" not in output and "\r" not in output
    counts = [line.split()[0] for line in output.splitlines() if "/" in line.split()[0]]
    assert counts == ["1/2", "2/2", "3/4", "4/4"]
    text = (recipe.run_folder / "log.txt").read_text()
    assert [line.split()[0] for line in text.splitlines() if "/" in line.split()[0]] == counts
    losses = [json.loads(line)["loss/sft"] for line in (recipe.run_folder / "metrics.jsonl").read_text().splitlines()]
    rows, run = drawn(recipe.run_folder)
    assert [(row["_step"], row["loss/sft"]) for row in rows] == list(enumerate(losses, 1))
    assert run["id"] == (recipe.run_folder / "wandb" / "id").read_text()
