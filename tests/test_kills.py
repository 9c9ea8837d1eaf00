"""A run that is killed repeatedly at random moments, and resumed under a different layout each time, loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from command import run_on_forks, start_megafork
from safetensors.torch import load_file
from task import make_task, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KILLS = 10
LAYOUTS = (
    ["run.ranks=1"],
    ["parallel.tp=2", "parallel.sp=true"],
    ["run.ranks=2"],
    ["run.ranks=2", "optimizer.overlap=true"],
    ["parallel.pp=2"],
    ["parallel.cp=2"],
)


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss/sft"]) for row in rows]


def kill_at_random(process: subprocess.Popen[str], chance: random.Random, after_s: float) -> bool:
    """SIGKILL to one process of the run, or SIGTERM to its launcher, `after_s` after its start. False when it had ended by then."""
    try:
        process.wait(after_s)
        return False
    except subprocess.TimeoutExpired:
        pass
    launcher = psutil.Process(process.pid)
    family = [launcher, *launcher.children(recursive=True)]
    victim = chance.choice(family)
    os.kill(victim.pid, signal.SIGTERM if victim is launcher and chance.random() < 0.5 else signal.SIGKILL)
    process.wait(60)
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []
    return True


def test_kills_under_random_layouts(tmp_path: Path) -> None:
    """Whatever moment a kill meets, start, step, or the writing of a checkpoint, the next start finds a whole checkpoint and goes on."""
    make_task(tmp_path)
    write_recipe(
        tmp_path,
        run={"folder": str(tmp_path / "runs")},
        rollout={"prompts": 16, "max_response_length": 4, "samples": 2},
        train={"steps": 160, "micro_batch_tokens": 64},
        optimizer={"lr": 1e-3, "eps": 1e-3, "decay": "cosine", "warmup_steps": 10},
        checkpoint={"every": 3},
    )
    run_on_forks("sft", tmp_path / "recipe.yaml", "run.name=unbroken")
    chance, kills, started = random.Random(20), 0, time.monotonic()
    for attempt in range(40):
        layout = [*chance.choice(LAYOUTS), f"checkpoint.background={chance.choice(['true', 'false'])}"]
        words = ("sft", "recipe.yaml", "run.name=killed", *layout)
        process = start_megafork(*words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if kills < KILLS:
            kills += kill_at_random(process, chance, chance.uniform(0.5, 4.0))
        _, stderr = process.communicate()
        if process.returncode == 0:
            break
        assert "damaged" not in stderr, (attempt, stderr)
    assert process.returncode == 0, stderr
    assert kills >= KILLS // 2, f"only {kills} kills in {time.monotonic() - started:.0f} s: make the run longer"

    whole, broken = losses(tmp_path / "runs/unbroken"), losses(tmp_path / "runs/killed")
    assert [step for step, _ in broken] == list(range(1, 161))
    assert [loss for _, loss in broken] == pytest.approx([loss for _, loss in whole], rel=1e-3)
    weights = [load_file(tmp_path / f"runs/{name}/hf/model.safetensors") for name in ("unbroken", "killed")]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-4 for name in weights[0])


def test_a_killed_writer_of_checkpoints_ends_the_run(tmp_path: Path) -> None:
    """As the kernel does with a process that takes too much memory."""
    make_task(tmp_path)
    write_recipe(tmp_path, run={"folder": str(tmp_path / "runs")}, train={"steps": 400}, checkpoint={"every": 1, "background": True})
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = start_megafork("sft", "recipe.yaml", cwd=tmp_path, text=True, **streams)
    deadline, victims = time.monotonic() + 120, 0
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
            for rank in psutil.Process(process.pid).children():
                for writer in rank.children(recursive=True):
                    writer.kill()
                    victims += 1
        time.sleep(0.01)
    _, stderr = process.communicate(timeout=60)
    assert victims
    assert process.returncode == 1
    assert "the process that was writing this rank's files was killed" in stderr
