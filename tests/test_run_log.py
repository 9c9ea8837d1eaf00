"""The run log: what survives a kill, what a resume keeps, and what the user sees."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.text import Text

from megafork.recipe import RecipeError
from megafork.train.metrics import RunLog, read_metrics


def step(number: int, **more: Any) -> dict[str, Any]:
    return {
        "step": number,
        "accuracy/mean": 0.5,
        "reward/mean": 0.5,
        "response_length/mean": 1234.0,
        "entropy/mean": 0.41,
        "forks/tau": 0.672,
        "throughput/tokens_per_s": 12345.0,
        "time/rollout": 123.4,
        "time/score": 1.25,
        "time/update": 0.5,
        "time/refit": 0.01,
        **more,
    }


def console(width: int, *, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False)


def log(folder: Path, **more: Any) -> RunLog:
    return RunLog(folder, **{"steps": 100, "console": console(100), **more})


def text_of(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_lines_come_back_as_written_in_one_order(tmp_path: Path) -> None:
    with log(tmp_path) as run:
        run.write({"eval/accuracy": 0.25, "step": 0})
        run.write(
            {"b": np.float32(0.5), "a": torch.tensor(3), "step": 1, "c": None, "nan": float("nan"), "inf": torch.tensor(float("inf"))}
        )
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == '{"step": 1, "a": 3, "b": 0.5, "c": null, "inf": null, "nan": null}'
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == {"step": 0, "eval/accuracy": 0.25}


@pytest.mark.slow
def test_a_killed_process_leaves_every_written_step(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib\n"
        "from megafork.train.metrics import RunLog\n"
        "log = RunLog(pathlib.Path(sys.argv[1]), steps=9)\n"
        "for step in range(1, 6): log.write({'step': step, 'accuracy/mean': step / 8})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": n, "accuracy/mean": n / 8} for n in range(1, 6)]


@pytest.mark.slow
def test_a_reader_that_ends_does_not_end_the_run(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from megafork.train.metrics import RunLog\n"
        "with RunLog(pathlib.Path(sys.argv[1]), steps=9) as log:\n"
        "    for step in range(1, 6): log.write({'step': step, 'accuracy/mean': step / 8})\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_terminal_that_lacks_a_character_gets_another() -> None:
    program = "from megafork.process import print_anything; print_anything(); print('0.5 \\u2013 1')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"0.5 ? 1\n", b"")


def test_resume_drops_later_steps_and_the_half_written_line(tmp_path: Path) -> None:
    with log(tmp_path) as run:
        for number in range(6):
            run.write(step(number))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole) + '{"step": 6, "accu')
    with log(tmp_path, resume_step=3) as run:
        run.write(step(4, lr=0.5))
    assert path.read_text().splitlines(keepends=True)[:4] == whole[:4], "kept lines are the same to the byte"
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3, 4]
    assert read_metrics(path)[-1]["lr"] == 0.5


def test_a_run_from_the_start_begins_a_new_file(tmp_path: Path) -> None:
    for accuracy in (0.1, 0.2):
        with log(tmp_path) as run:
            run.write({"step": 0, "eval/accuracy": accuracy})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "eval/accuracy": 0.2}]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_reading_survives_a_cut_at_any_byte_of_the_last_line(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": n, "accuracy/mean": 0.123456, "τ": n}) + "\n" for n in (1, 2)]
    data = "".join(lines).encode()
    path.write_bytes(data[:-cut])
    assert [row["step"] for row in read_metrics(path)] == ([1, 2] if cut == 1 else [1]), "without its newline alone the line is whole"


def test_other_damage_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "acc\n{"step": 3}\n')
    with pytest.raises(RecipeError, match=r"metrics\.jsonl' line 2 is not valid JSON"):
        read_metrics(path)
    path.write_text('{"step": 1}\n{"accuracy": 2}\n')
    with pytest.raises(RecipeError, match="line 2 is not an object with an integer 'step'"):
        read_metrics(path)
    with pytest.raises(RecipeError, match="does not exist"):
        read_metrics(tmp_path / "other.jsonl")


def test_wrong_metrics_are_refused_and_leave_no_line(tmp_path: Path) -> None:
    with log(tmp_path) as run:
        run.write(step(2))
        with pytest.raises(ValueError, match="step 2 written after step 2"):
            run.write(step(2))
        with pytest.raises(TypeError, match="metric 'x' is 'high'"):
            run.write({"step": 3, "x": "high"})
        with pytest.raises(TypeError, match="step is None"):
            run.write({"x": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_the_text_log_is_what_the_terminal_shows_without_its_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    screen = console(120, terminal=True)
    with log(tmp_path, console=screen, text=True) as run:
        run.write({"step": 0, "eval/accuracy": 0.25})
        run.write(step(1))
        run.note("a remark")
    shown, written = text_of(screen), (tmp_path / "log.txt").read_text()
    assert "\x1b" in shown and "\x1b" not in written
    assert Text.from_ansi(shown).plain.splitlines() == written.splitlines()
    with log(tmp_path, text=True, resume_step=1) as run:
        run.write(step(2))
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[: len(written.splitlines())] == written.splitlines() and lines[-1].split()[0] == "2/100", "a resumed run goes on below"
    with log(tmp_path, text=True):
        pass
    assert (tmp_path / "log.txt").read_text() == "", "a run from the start begins a new one"


@pytest.mark.parametrize("width", [80, 100, 120])
def test_live_lines_fit_and_line_up(tmp_path: Path, width: int) -> None:
    screen = console(width)
    with log(tmp_path, console=screen, steps=1000) as run:
        run.write({"step": 0, "eval/accuracy": 0.25})
        for number in (1, 2, 3):
            run.write(step(number))
        run.write(step(1000, **{"eval/accuracy": 0.75}))
    shown = text_of(screen)
    lines = shown.splitlines()
    assert "\x1b" not in shown, "no colour codes in a file"
    assert max(map(len, lines)) <= width
    assert lines[0].strip() == "held-out accuracy 25.0% before training"
    assert lines[-1].strip() == "held-out accuracy 75.0% after step 1000 (+50.0 points since the first)"
    heading, first, last = lines[1], lines[2], lines[5]
    names = heading.split()[:-1]  # without the time left, which may be two words
    cells = dict(zip(names, first.split()[: len(names)], strict=True))
    assert (cells["step"], cells["acc"], cells["entropy"], cells["tau"]) == ("1/1000", "50.0%", "0.410", "0.672")
    assert (cells["tok/s"], cells["rollout"], cells["score"], cells["update"], cells["refit"]) == (
        "12,345",
        "123s",
        "1.2s",
        "0.50s",
        "0.01s",
    )
    assert ("reward" in cells) is (width >= 100)
    for name, value in list(cells.items())[1:]:
        assert first.index(value) + len(value) == heading.index(name) + len(name), f"{name} is right-aligned under its heading"
    assert last.endswith("done")


def test_time_left_follows_the_pace(tmp_path: Path) -> None:
    screen = console(100)
    with log(tmp_path, console=screen, steps=10_000_000) as run:
        for number in range(1, 30):
            run.write(step(number))
    lines = text_of(screen).splitlines()
    assert sum(line.split()[0] == "step" for line in lines) == 2, "the heading comes again"
    assert lines[1].split()[-1] == "\N{EN DASH}", "one step tells no pace"
    assert lines[-1].split()[-1][-1] in "smh"


def test_a_first_step_that_trained_nothing_hides_no_column_of_later_ones(tmp_path: Path) -> None:
    screen = console(100)
    with log(tmp_path, console=screen) as run:
        run.write({"step": 1, "accuracy/mean": 0.0, "time/rollout": 2.0})
        run.write(step(2))
        run.write({"step": 3, "accuracy/mean": 0.0, "time/rollout": 2.0})
    first, _, heading, trained, empty = (line.split() for line in text_of(screen).splitlines())
    assert first == ["step", "acc", "rollout", "left"]
    assert {"entropy", "tau", "update"} < set(heading) and len(trained) == len(empty) == len(heading)


def test_a_supervised_run_shows_its_loss_and_a_missing_number_a_dash(tmp_path: Path) -> None:
    screen = console(80)
    with log(tmp_path, console=screen) as run:
        run.write({"step": 1, "loss/sft": 2.5, "throughput/tokens_per_s": 900.0})
        run.write({"step": 2, "loss/sft": None, "throughput/tokens_per_s": 900.0})
    lines = text_of(screen).splitlines()
    assert lines[0].split() == ["step", "loss", "tok/s", "left"]
    assert lines[1].split()[:3] == ["1/100", "2.50", "900"]
    assert lines[2].split()[1] == "\N{EN DASH}"


def test_gain_counts_from_the_first_evaluation_after_a_resume(tmp_path: Path) -> None:
    with log(tmp_path) as run:
        run.write({"step": 0, "eval/accuracy": 0.25})
        run.write(step(1))
    screen = console(100)
    with log(tmp_path, resume_step=1, console=screen) as run:
        run.write(step(2, **{"eval/accuracy": 0.5}))
    assert "(+25.0 points since the first)" in text_of(screen)
