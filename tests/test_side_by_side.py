"""Runs side by side, and the file of finished runs: what fits, what is refused, and real trials that fail, are killed, and go on."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from command import megafork, start_megafork
from task import make_task
from test_runs import metrics as numbers
from trials import recipes, write_run
from typer.testing import CliRunner

from megafork import commands, room
from megafork.ablate.grid import tuning_trials
from megafork.ablate.options import AblationOptions, Trial
from megafork.ablate.record import Record
from megafork.ablate.run import Ablation
from megafork.cli import app
from megafork.recipe import Recipe, RecipeError
from megafork.recipe_file import load_recipe

__all__ = ["recipes"]


def test_every_run_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "gpu_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert room.places(2, 2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in room.places(8, 1)] == list("01234567")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,7,5")
    monkeypatch.setattr(room, "gpu_count", lambda: 4)
    assert room.places(2, 2) == [{"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, {"CUDA_VISIBLE_DEVICES": "7,5"}]
    with pytest.raises(RecipeError, match=r"^--parallel is 3: 3 runs at once of 2 ranks need 6 GPUs, but this machine has 4: "):
        room.places(3, 2)


def test_runs_that_do_not_fit_are_refused(recipes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cores = len(os.sched_getaffinity(0))
    assert room.places(cores, 1) == [{}] * cores
    make_task(tmp_path)
    with pytest.raises(
        RecipeError, match=rf"^--parallel is {cores + 1}: .* of 1 rank need {cores + 1} cores, but this machine has {cores}: "
    ):
        commands.ablate(AblationOptions.parse(recipes, "1", "out", parallel=cores + 1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(1 << 20))
    with pytest.raises(RecipeError, match=r"^--parallel is 1000000: these ranks need 800000 GB to start, but this machine has \d+ GB: "):
        room.places(1_000_000, 1)
    with pytest.raises(RecipeError, match=r"^--parallel is 0: give the number of runs at once"):
        AblationOptions.parse(recipes, "1", "out", parallel=0)
    assert not Path("out").exists()


def trained(options: AblationOptions, **ends: float) -> tuple[list[str], Ablation]:
    """The runs that an ablation trains, each to the accuracy given for its recipe, and the ablation."""
    done: list[str] = []

    def attempt(recipe: Recipe) -> str | None:
        name = recipe.run.name.partition("-")[0]
        done.append(f"{name} {recipe.optimizer.lr} {recipe.run.seed}")
        end = ends.get(name, 0.5) + recipe.optimizer.lr
        write_run(Trial(name, recipe.run.seed, recipe), [0.1, end / 3, end], [0.5, 1 / 3], update__tokens=7 * recipe.run.seed)
        return None

    def inputs(recipe: Recipe) -> Any:
        return commands.preflight("train", recipe, 1)[0]

    ablation = Ablation(options, inputs, attempt, lambda line: None)
    ablation.check()
    return done, ablation


def test_an_ablation_goes_on_from_its_record_alone(recipes: list[str], tmp_path: Path) -> None:
    """With tuning, without the folders, and with the same tables to the last digit."""
    make_task(tmp_path)
    grid = {"grid": ("optimizer.lr=1e-3,3e-3",), "tuning_seeds": "11", "record": "kept/runs.json"}
    done, ablation = trained(AblationOptions.parse(recipes, "1", "out", **grid))  # type: ignore[arg-type]
    ablation.run()
    assert len(done) == 4 + 2
    shutil.rmtree("out")

    options = AblationOptions.parse(recipes, "1,2", "elsewhere", **grid)  # type: ignore[arg-type]
    done, ablation = trained(options)
    assert [str(trial) for trial in ablation.left()] == ["top, seed 2", "all, seed 2"]
    results = ablation.run()
    assert done == ["top 0.003 2", "all 0.003 2"]

    shutil.rmtree("elsewhere")
    done, ablation = trained(options)
    again = ablation.run()
    assert done == [] and ablation.left() == []
    assert json.dumps(again, sort_keys=True) == json.dumps(results, sort_keys=True)
    assert len(again["recipes"][0]["runs"]) == 2 and again["recipes"][0]["runs"][1]["tokens"] == 14

    shutil.rmtree("model")
    shutil.rmtree("elsewhere")
    assert trained(options)[1].run() == again, "the table needs no model"
    text = Path("kept/runs.json").read_text()
    assert len(text.splitlines()) == 2 + 8 + 1 and str(tmp_path) not in text


def test_a_record_of_other_runs_is_refused(recipes: list[str], tmp_path: Path) -> None:
    make_task(tmp_path)
    trained(AblationOptions.parse(recipes, "1", "out", record="runs.json"))[1].run()
    shutil.rmtree("out")

    def refusal(*overrides: str, seeds: str = "1,2") -> str:
        with pytest.raises(RecipeError) as caught:
            trained(AblationOptions.parse([*recipes, *overrides], seeds, "out", record="runs.json"))[1].run()
        assert "\n" not in str(caught.value) and not Path("out").exists()
        return str(caught.value)

    fix = ": choose another file, or delete the lines of seed 1"
    assert refusal("train.steps=2") == f"--record is 'runs.json': it has top, seed 1, with train.steps=3, not 2{fix}"
    assert refusal("loss.kl.coef=0.1", seeds="1").startswith("--record is 'runs.json': it has top, seed 1, with loss.kl={'coef': 0.0")
    for fine in (("log.text=true",), ("checkpoint.every=2",), ("run.ranks=1",)):
        assert trained(AblationOptions.parse([*recipes, *fine], "1", "out", record="runs.json"))[0] == []

    rows = Path("train.jsonl").read_text()
    Path("train.jsonl").write_text(rows + rows.splitlines(keepends=True)[0].replace("max", "max max"))
    assert refusal() == f"--record is 'runs.json': it has top, seed 1, with other contents of data.train{fix}"
    Path("train.jsonl").write_text(rows)

    for name in ("[]", "{}", "{", '{"common": {}, "runs": [{"recipe": 1}]}'):
        Path("runs.json").write_text(name)
        assert refusal().startswith("--record is 'runs.json': it is no record of runs (")


def test_a_record_that_cannot_be_written_is_refused_before_anything_is_trained(recipes: list[str], tmp_path: Path) -> None:
    make_task(tmp_path)
    done, ablation = trained(AblationOptions.parse(recipes, "1", "out", record="train.jsonl/runs.json"))
    with pytest.raises(RecipeError, match=r"^--record is 'train\.jsonl/runs\.json': it can't be written \(.*\): choose another file$"):
        ablation.run()
    assert done == []


def test_the_runs_of_one_seed_start_from_one_model(recipes: list[str], tmp_path: Path) -> None:
    """A warm start that was trained again, on another machine, may begin another seed but not end one."""
    make_task(tmp_path)
    both = AblationOptions.parse(recipes, "1,2", "out", record="runs.json")
    trained(AblationOptions.parse(recipes, "1", "out", record="runs.json"))[1].run()
    trained(AblationOptions.parse(recipes[:1], "2", "out", record="runs.json"))[1].run()
    shutil.rmtree("out")
    weights = Path("model/model.safetensors")
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(
        RecipeError, match=r"it has top, seed 2, from another model\.path, and other runs of seed 2 are missing: .* seed 2$"
    ):
        trained(both)[1].run()
    lines = Path("runs.json").read_text().splitlines()
    [seed_2] = [line for line in lines if '"seed": 2' in line]
    lines.remove(seed_2)
    lines[-2] = lines[-2].rstrip(",")
    Path("runs.json").write_text("\n".join(lines))
    done, ablation = trained(both)
    ablation.run()
    assert done == ["top 0.003 2", "all 0.003 2"]
    assert len({run.origin.model for run in Record(Path("runs.json")).runs}) == 2


def test_the_listed_commands_are_the_trials(recipes: list[str], tmp_path: Path) -> None:
    """Each in a job of its own: first those that tune."""
    make_task(tmp_path)
    grid = ["--grid", "optimizer.lr=1e-3,3e-3", "--tuning-seeds", "11", "--out", "my runs"]
    done = CliRunner().invoke(app, ["ablate", *recipes, "train.steps=2", *grid, "--seeds", "1", "--list"], catch_exceptions=False)
    assert done.exit_code == 0
    options = AblationOptions.parse([*recipes, "train.steps=2"], "1", "my runs", (grid[1],), "11")
    listed = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(words[:2] == ["megafork", "train"] for words in listed)
    assert [load_recipe(words[2], words[3:]) for words in listed] == [trial.recipe for trial in tuning_trials(options)]
    assert not Path("my runs").exists()


def running(folder: Path) -> bool:
    """Whether the process that last wrote to the run still runs."""
    [process] = re.findall(r"process (\d+) on", (folder / ".lock").read_text())
    return Path(f"/proc/{process}").exists()


def wait_for(what: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 400
    while not what.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_real_trials_side_by_side(recipes: list[str], tmp_path: Path) -> None:
    """One fails while the other goes on; then it is stopped and killed with its parent; in the end the numbers are those of the listed
    commands, each in a job of its own."""
    make_task(tmp_path)
    common = ["ablate", *recipes, "checkpoint.every=1", "--seeds", "1"]
    for line in CliRunner().invoke(app, [*common, "--out", "jobs", "--list"], catch_exceptions=False).stdout.splitlines():
        job = megafork(*shlex.split(line)[1:], cwd=tmp_path, limit_s=600, env={**os.environ, "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"})
        assert job.returncode == 0, job.stderr
    common.append("--json")
    jobs = megafork(*common, "--out", "jobs", cwd=tmp_path, limit_s=600)
    assert jobs.returncode == 0 and jobs.stderr.count("done before") == 2, "they are only tabulated"
    command = [*common, "--out", "out", "--parallel", "2", "--record", "runs.json"]
    top, every = tmp_path / "out/top-seed_1", tmp_path / "out/all-seed_1"

    (every / "metrics.jsonl").mkdir(parents=True)  # which the run can't write to
    done = megafork(*command, cwd=tmp_path, limit_s=600)
    assert done.returncode == 1 and [one["recipe"] for one in json.loads(done.stdout.splitlines()[-1])["failed"]] == ["all"]
    assert "run 2 of 2: all, seed 1: failed: see out/logs/all-seed_1.txt" in done.stderr.splitlines()
    assert "IsADirectoryError" in (tmp_path / "out/logs/all-seed_1.txt").read_text()
    assert [run.recipe for run in Record(tmp_path / "runs.json").runs] == ["top"]
    (every / "metrics.jsonl").rmdir()

    for step, (number, code) in enumerate(((signal.SIGTERM, 1), (signal.SIGKILL, -signal.SIGKILL)), start=1):
        process = start_megafork(*command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(every / f"checkpoints/step_{step:06d}", process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code
        assert ("stopped by SIGTERM; the same command resumes the run" in errors.splitlines()) == (number == signal.SIGTERM)
        deadline = time.monotonic() + 60
        while running(every):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    done = megafork(*command, cwd=tmp_path, limit_s=600)
    assert done.returncode == 0, done.stderr
    for folder in (top, every):
        assert numbers(folder) == numbers(tmp_path / "jobs" / folder.name)
        assert (folder / "report.html").exists()
    ours, theirs = (json.loads(run.stdout.splitlines()[-1]) for run in (done, jobs))
    for results in (ours, theirs):
        for recipe in results["recipes"]:
            recipe.pop("seconds")
            for run in recipe["runs"]:
                run.pop("seconds"), run.pop("folder")
    assert (ours["recipes"], ours["comparisons"]) == (theirs["recipes"], theirs["comparisons"])
