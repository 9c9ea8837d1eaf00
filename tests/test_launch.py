"""Ranks started, joined and stopped: the first failure is reported first, and no run leaves a process behind, however it ends.

Launchers and ranks are forked, as what is tested begins after their imports; `test_cli` has a whole run of executed ones. Executed are
torchrun's, and those that are stopped while they import.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import forked_python, megafork
from silent import fail_behind_a_back, stopped_after_recording
from task import make_task, write_recipe

from megafork import ranks
from megafork.joined import first_host

TESTS = Path(__file__).parent
MEGAFORK = [sys.executable, "-m", "megafork.cli"]


class Run:
    """A command and all processes that it starts, told from others by the folder that they work in. NAME in it becomes the run's name."""

    def __init__(self, task: Path, start: Callable[..., Any], *command: str, **environment: str) -> None:
        self.name = uuid.uuid4().hex
        self.place = task / self.name
        self.place.mkdir()
        self.folder = self.place / "runs" / self.name
        self.output = self.place / "output.txt"
        with self.output.open("w") as output:
            self.process = start(
                [argument.replace("NAME", self.name) for argument in command],
                cwd=self.place,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )

    def wait_for(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not ready():
            assert time.monotonic() < deadline and self.process.poll() is None, self.output.read_text()
            time.sleep(0.02)

    def has_done_a_step(self) -> bool:
        file = self.folder / "metrics.jsonl"
        return file.exists() and '"step": 1,' in file.read_text()

    def processes(self) -> list[psutil.Process]:
        return working_in(self.place)

    def end(self) -> tuple[int, str]:
        """Exit code and output, once the command and all that it started have ended within seconds."""
        code = self.process.wait(30)
        _, alive = psutil.wait_procs(self.processes(), timeout=10)
        assert alive == []
        return code, self.output.read_text()


def working_in(folder: Path) -> list[psutil.Process]:
    """All processes that do, or in a folder within."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
        except psutil.Error:  # somebody else's, or gone
            continue
    return found


def executed(arguments: list[str], **how: Any) -> subprocess.Popen[Any]:
    """A shell's background commands ignore SIGINT."""
    return subprocess.Popen(arguments, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **how)


def long_run(task: Path, start: Callable[..., Any] = forked_python, **environment: str) -> Run:
    """Two ranks that would meet for ever."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return Run(task, start, sys.executable, "-m", "meeting", "meet", "runs/NAME", PYTHONPATH=path, **environment)


def long_training(task: Path, **environment: str) -> Run:
    """A supervised run of two ranks that would take minutes."""
    words = ("sft", str(task / "recipe.yaml"), "run.name=NAME", "train.steps=20000")
    return Run(task, forked_python, *MEGAFORK, *words, **environment)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = make_task(tmp_path_factory.mktemp("task"))
    write_recipe(folder, run={"folder": "runs", "ranks": 2}, checkpoint={"export_hf": False})
    yield folder
    for process in working_in(folder):  # of a test that failed
        process.kill()


FAILURES = {
    "error": (1, ["Traceback (most recent call last):", "ArithmeticError: deliberate", "rank 1 failed"]),
    "error in a training": (1, ["Traceback (most recent call last):", "ArithmeticError: deliberate", "rank 1 failed"]),
    "input": (2, ["megafork: forks.select is deliberate: choose another"]),
    "exit": (1, ["rank 1 ended with exit code 3 and recorded no reason"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAILURES)
def test_a_rank_that_fails_ends_the_run_and_is_told_first(fault: str, task: Path, tmp_path: Path) -> None:
    start = long_training if "training" in fault else long_run
    run = start(task, FAULT=fault, FAULT_WHEN=str(tmp_path / "now"))
    run.wait_for(run.has_done_a_step)
    (tmp_path / "now").touch()
    code, output = run.end()
    expected_code, expected = FAILURES[fault]
    assert code == expected_code
    lines = [line for line in output.splitlines() if line in expected or "Traceback" in line]
    assert lines == expected, output  # and no other rank's traceback
    assert {file.name for file in (run.folder / "logs").iterdir()} - {"rank_0.log"} == {"rank_1.log"}
    if "error" in fault:
        assert "ArithmeticError: deliberate" in (run.folder / "logs/rank_1.log").read_text()


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run(task: Path) -> None:
    run = long_run(task)
    run.wait_for(run.has_done_a_step)
    psutil.Process(run.process.pid).children()[0].kill()  # the oldest
    code, output = run.end()
    assert code == 1
    assert "rank 0 was killed by SIGKILL" in output and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(("number", "early"), [(signal.SIGKILL, False), (signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_launcher_that_is_stopped_leaves_nothing(number: signal.Signals, early: bool, task: Path) -> None:
    run = long_run(task, executed if early else forked_python)
    run.wait_for((lambda: len(run.processes()) == 3) if early else run.has_done_a_step)
    run.process.send_signal(number)
    code, output = run.end()
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 1
        assert output.splitlines()[-1] == f"stopped by {number.name}; the same command resumes the run"
    assert "Traceback" not in output


@pytest.mark.slow
def test_joins_the_ranks_of_torchrun_and_does_not_repeat_a_finished_run(task: Path) -> None:
    """Of the real torchrun, whose agent keeps the store: ranks that are started by others start none, and rank 0 alone speaks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ("sft", str(task / "recipe.yaml"), "run.name=NAME", "run.ranks=1", "--json")
    run = Run(task, subprocess.Popen, *torchrun, "-m", "megafork.cli", *words)
    run.process.wait(120)
    code, output = run.end()
    assert code == 0, output
    assert json.loads(output.splitlines()[-1])["step"] == 3
    assert output.count("\n 3/3 ") == 1, "only rank 0 speaks"
    assert not (run.folder / "logs").exists(), "the ranks were not started a second time"

    again = megafork("sft", str(task / "recipe.yaml"), f"run.name={run.name}", cwd=run.place)
    assert again.returncode == 0
    assert (again.stderr + again.stdout).splitlines() == [
        f"run {run.name!r} has all its 3 steps: raise train.steps, or choose another run.name",
        f"run: runs/{run.name}",
    ]


@pytest.mark.slow
def test_joins_the_ranks_of_slurm(task: Path) -> None:
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    folder = task / "of Slurm"
    command = [*MEGAFORK, "sft", str(task / "recipe.yaml"), f"run.folder={folder}", "run.ranks=1", "--json"]
    runs = [Run(task, forked_python, *command, **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)]
    for run in runs:
        run.process.wait(120)
    (first, output), (second, silence) = (run.end() for run in runs)
    assert (first, second) == (0, 0), output + silence
    assert json.loads(output.splitlines()[-1])["run"] == f"{folder}/run"
    assert silence == ""
    assert not (folder / "run/logs").exists(), "the ranks were not started a second time"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[003-010,012],login", "gpu003"),
        ("a1,b[2-3]", "a1"),
        ("localhost", "localhost"),
        ("rack[1,4]-n", "rack1-n"),
        ("x[07]", "x07"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("r[01-02]-n[1-8].cluster,login", "r01-n1.cluster"),
        ("a[1-2]b[03,5]c[7-9]d,e", "a1b03c7d"),
        ("gpu-a[1,3-5],gpu-b[1-2]", "gpu-a1"),
        ("nid00[1-4]-ib", "nid001-ib"),
        ("cn-0001", "cn-0001"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_failure_that_no_other_rank_notices(
    rank: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the ranks find this file there
    before = set(psutil.Process().children())
    assert ranks.do(partial(fail_behind_a_back, tmp_path, rank), 3, tmp_path) == ranks.FAILED
    assert f"rank {rank} ended with exit code 3 and recorded no reason" in capfd.readouterr().err
    assert set(psutil.Process().children()) <= before


@pytest.mark.slow
def test_a_recorded_reason_is_told_even_if_the_rank_is_stopped_before_it_ends(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    assert ranks.do(partial(stopped_after_recording, ranks.FAILED), 2, tmp_path) == ranks.FAILED
    assert capfd.readouterr().err.splitlines()[-3:-1] == ["deliberate", "rank 1 failed"]
    with pytest.raises(ranks.RecipeError, match="deliberate"):
        ranks.do(partial(stopped_after_recording, ranks.WRONG_INPUT), 2, tmp_path)
