"""`megafork report --watch`: the page follows runs in progress, and no longer changes afterwards."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import start_megafork
from task import make_task, write_recipe

from megafork.run_folder import read_metrics

REFRESH = '<meta http-equiv="refresh" content="1">'


@contextmanager
def watching(*runs: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    words = ("report", *runs, "--watch", "0.2", "--json")
    process = start_megafork(*words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def begin(folder: Path, steps: int = 3) -> None:
    """As a run does, before its first step is done."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"run": {"name": folder.name}, "train": {"steps": steps}}))
    (folder / "metrics.jsonl").touch()


def write(folder: Path, **metrics: Any) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics) + "\n")


def says(page: Path, text: str) -> bool:
    return page.exists() and text in page.read_text(encoding="utf-8")


def ended(process: subprocess.Popen[str]) -> str:
    """The page that a watch which went well names at its end."""
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    return str(json.loads(output.splitlines()[-1])["report"])


def test_it_follows_a_run_to_its_last_step(tmp_path: Path) -> None:
    run, page = tmp_path / "a", tmp_path / "a" / "report.html"
    begin(run)
    with watching("a", cwd=tmp_path) as process:
        for step in (1, 2):
            write(run, step=step, **{"accuracy/mean": 0.25 * step})
            wait_for(lambda step=step: says(page, f"The run has written {step} of its 3 steps."))  # type: ignore[misc]
            assert says(page, REFRESH)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "accu')  # as a reader may find it
        time.sleep(0.5)
        assert process.poll() is None and says(page, "2 of its 3 steps")
        (run / "metrics.jsonl").write_text("")  # killed, and begun anew without a checkpoint
        time.sleep(0.5)
        assert process.poll() is None and says(page, "2 of its 3 steps")
        for step in (1, 2, 3):
            write(run, step=step, **{"accuracy/mean": 0.25 * step})
        assert ended(process) == "a/report.html"
    assert says(page, "trained for 3 steps") and not says(page, "refresh")
    assert not list(run.glob("*.writing"))


def test_it_ends_with_the_last_of_several_or_by_ctrl_c(tmp_path: Path) -> None:
    page = tmp_path / "comparison.html"
    for name in ("a", "b"):
        begin(tmp_path / name)
        write(tmp_path / name, step=1, **{"accuracy/mean": 0.5})
    write(tmp_path / "a", step=3, **{"accuracy/mean": 0.5})
    with watching("a", "b", cwd=tmp_path) as process:
        wait_for(lambda: says(page, REFRESH))
        assert says(page, "B: The run has written 1 of its 3 steps.") and process.poll() is None
        process.send_signal(signal.SIGINT)
        assert ended(process) == str(page)
    assert says(page, "1 of its 3 steps") and not says(page, "refresh")


@pytest.mark.slow
def test_it_follows_a_real_run(tmp_path: Path) -> None:
    make_task(tmp_path)
    recipe = write_recipe(tmp_path, run={"folder": "runs"}, train={"steps": 300})
    run, page = tmp_path / "runs" / "run", tmp_path / "runs" / "run" / "report.html"
    with start_megafork("sft", recipe.name, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as training:
        wait_for(lambda: (run / "metrics.jsonl").exists())
        with watching("runs/run", cwd=tmp_path) as process:
            wait_for(lambda: says(page, REFRESH) or training.poll() is not None)
            seen = training.poll() is None
            assert ended(process) == "runs/run/report.html"
        assert training.wait(60) == 0
    assert seen, "the page was there before the run ended"
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 300
    assert says(page, "trained for 300 steps") and not says(page, "refresh")
