"""Runs that are started twice, killed at the very end, or out of disk space: nothing is lost, and the messages are true."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import megafork, run_on_forks, start_megafork
from safetensors.torch import load_file
from task import make_task, write_recipe

from megafork.secret import is_loopback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PIPES = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture
def task(tmp_path: Path) -> Path:
    make_task(tmp_path)
    write_recipe(tmp_path, rollout={"prompts": 16, "samples": 2, "max_response_length": 4}, train={"steps": 4, "micro_batch_tokens": 64})
    return tmp_path


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 400
    while not ready():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_second_start_is_refused_and_takes_over_once_the_first_is_killed(task: Path) -> None:
    words = ("sft", "recipe.yaml", "checkpoint.every=10")
    run = task / "runs/run"
    first = start_megafork(*words, "train.steps=1000000", cwd=task, **PIPES)
    wait_for(lambda: bool(list(run.glob("checkpoints/step_??????"))), first)
    before = rows(run)
    second = megafork(*words, "train.steps=1000000", cwd=task)
    assert second.returncode == 2
    assert second.stderr.startswith(f"megafork: run.folder is '{task}/runs' and run.name 'run': another process is writing there (process ")
    assert second.stderr.count("\n") == 1
    assert f"process {first.pid} on" in second.stderr
    assert rows(run)[: len(before)] == before and first.poll() is None, "the first goes on, and lost nothing"
    family = [*psutil.Process(first.pid).children(recursive=True)]
    first.kill()
    first.communicate()
    psutil.wait_procs(family, timeout=30)
    last = max(int(folder.name[5:]) for folder in run.glob("checkpoints/step_??????"))
    third = megafork(*words, f"train.steps={last + 1}", cwd=task)
    assert third.returncode == 0, third.stderr
    assert [row["step"] for row in rows(run)] == list(range(1, last + 2))


def _weights(run: Path) -> tuple[dict[str, Any], Any]:
    return json.loads((run / "hf/megafork.json").read_text()), load_file(run / "hf/model.safetensors")["model.norm.weight"]


def test_what_a_supervised_run_lacks_at_its_end_is_made_good(task: Path) -> None:
    """Killed after its last checkpoint, with hf/ of an earlier one; and without some of its lines."""
    run = task / "runs/run"
    run_on_forks("sft", task / "recipe.yaml")
    origin, old = _weights(run)
    assert origin == {"run": "run", "step": 4}
    run_on_forks("sft", task / "recipe.yaml", "train.steps=6", "checkpoint.export_hf=false")
    assert _weights(run)[0] == {"run": "run", "step": 4}, "as a kill before the export leaves it"
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], *lines[2:4]]))
    done = megafork("sft", "recipe.yaml", "train.steps=6", cwd=task)
    assert done.returncode == 0, done.stderr
    assert "metrics.jsonl has no line for steps 2, 5 to 6, which the checkpoint includes" in done.stdout
    origin, new = _weights(run)
    assert origin == {"run": "run", "step": 6} and not old.equal(new)
    finished = megafork("sft", "recipe.yaml", "train.steps=6", cwd=task)
    assert finished.returncode == 0
    assert "has all its 6 steps" in finished.stderr and "has no line for steps 2, 5 to 6" in finished.stderr
    (run / "metrics.jsonl").unlink()
    finished = megafork("sft", "recipe.yaml", "train.steps=6", cwd=task)
    assert finished.returncode == 0 and "has no line for steps 1 to 6" in finished.stderr


def test_what_a_run_lacks_at_its_end_is_made_good_and_nothing_listens_to_others(task: Path) -> None:
    """Two ranks that share an engine: all that listens anywhere in the run listens on the loopback."""
    run = task / "runs/run"
    words = ("train", "recipe.yaml", "parallel.tp=2", "rollout.tp=2", "train.steps=2")
    process = start_megafork(*words, cwd=task, **PIPES)
    seen: set[tuple[int, str]] = set()
    while process.poll() is None:
        seen |= set(_listening(process.pid))
        time.sleep(0.1)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert len({pid for pid, _ in seen}) >= 2, "the ranks' gloo was seen (a child that has not yet called exec holds it too)"
    assert process.pid not in {pid for pid, _ in seen}, "the launcher needs no port"
    assert all(is_loopback(ip) for _, ip in seen), seen

    whole = rows(run)
    (run / "evaluations/step_000002.json").unlink()
    (run / "report.html").unlink()
    shutil.rmtree(run / "hf")
    (run / "metrics.jsonl").write_text("".join(json.dumps({k: v for k, v in r.items() if k[:5] != "eval/"}) + "\n" for r in whole))
    again = megafork(*words, cwd=task)
    assert again.returncode == 0, again.stderr
    assert (run / "report.html").exists() and _weights(run)[0]["step"] == 2
    assert json.loads((run / "evaluations/step_000002.json").read_text())["step"] == 2
    assert rows(run)[-1]["step"] == 2 and rows(run)[-1]["eval/accuracy"] == whole[-1]["eval/accuracy"]
    assert rows(run)[-1]["reward/mean"] == whole[-1]["reward/mean"], "its line is amended, not replaced"


def _listening(launcher: int) -> Iterator[tuple[int, str]]:
    with contextlib.suppress(psutil.Error):
        for process in [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        yield process.pid, connection.laddr.ip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(kilobytes: int) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("a small disk can't be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.parametrize(
    ("kilobytes", "how"),
    [
        (4, ["log.tensorboard=true", "checkpoint.every=0"]),  # no room for the log
        (900, []),  # nor for the first checkpoint's tensors
        (1600, ["run.ranks=2", "checkpoint.background=true"]),
        (2700, []),  # nor for the second's
        (3400, []),  # nor for the model
    ],
)
def test_a_full_disk_is_one_line_and_nothing_is_lost(kilobytes: int, how: list[str], task: Path, small_disk: Callable[[int], Path]) -> None:
    folder = small_disk(kilobytes)
    words = ("sft", "recipe.yaml", f"run.folder={folder}", "checkpoint.every=2", *how)
    done = megafork(*words, cwd=task)
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if "RuntimeWarning" not in line]  # of forked ranks
    assert "no room is left" in said[0] and "the same command continues" in said[0], done.stderr
    assert len(said) <= 3 and "Traceback" not in done.stderr
    subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
    again = megafork(*words, cwd=task)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in rows(folder / "run")] == [1, 2, 3, 4]
    assert _weights(folder / "run")[0]["step"] == 4


@pytest.mark.parametrize("folder", ["file", "file/deeper", "/proc/runs"])
def test_a_run_folder_that_cannot_be_is_refused_before_ranks_start(folder: str, task: Path) -> None:
    (task / "file").write_text("")
    done = megafork("sft", "recipe.yaml", f"run.folder={folder}", cwd=task)
    assert done.returncode == 2
    assert done.stderr.startswith(f"megafork: run.folder is {folder!r} and run.name 'run': ") and done.stderr.count("\n") == 1


def test_a_stopped_run_leaves_no_process(task: Path) -> None:
    process = start_megafork("sft", "recipe.yaml", "train.steps=1000000", cwd=task, **PIPES)
    wait_for(lambda: (task / "runs/run/metrics.jsonl").exists(), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stderr.splitlines()[-1] == "stopped by SIGTERM; the same command resumes the run"
    assert psutil.wait_procs(family, timeout=10)[1] == []
