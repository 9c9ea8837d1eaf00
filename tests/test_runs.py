"""Whole runs from the command line: repeatable, unharmed by kill -9, and truthful in what they record."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from command import megafork, run_on_forks, start_megafork
from task import make_task, write_recipe

from megafork.train.metrics import RunLog
from megafork.weights.checkpoint import complete

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or a scale measured."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/", "memory/", "rollout/idle_share"))} for row in rows]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task with a warm-started model at runs/sft/hf."""
    folder = make_task(tmp_path_factory.mktemp("task"))
    write_recipe(
        folder, run={"name": "sft", "folder": str(folder / "runs")}, rollout={"prompts": 16, "max_response_length": 4, "samples": 4}
    )
    run_on_forks("sft", folder / "recipe.yaml", "train.steps=12")
    return folder


FORK = 0.5
"""Nats, with some of the task's entropies on either side."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 SP, two engines": {"parallel": {"tp": 2, "sp": True}, "rollout": {"fork_temperature": [0.7, 1.3, FORK]}},
    "DP2, one engine of TP 2": {"run": {"ranks": 2}, "rollout": {"tp": 2}, "loss": {"kl": {"coef": 0.05}}},
}
PARKED = {"unbroken": False, "killed": True}
"""Whether training state is parked during roll-outs, which changes no number."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_repeats_and_a_killed_one_continues(layout: str, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With engines and verdicts: a resumed run has the lines, roll-out files and weights of one that was never killed, to the last bit."""
    name = layout.replace(" ", "_").replace(",", "")
    changes = {k: dict(v) for k, v in LAYOUTS[layout].items()}
    model = {"path": str(task / "runs/sft/hf")}
    for run in ("unbroken", "killed"):
        sections = {
            **changes,
            "model": model,
            "run": {"name": f"{name}-{run}", "folder": str(task / "runs"), "seed": 7, **changes.get("run", {})},
        }
        sections["rollout"] = {
            "prompts": 8,
            "samples": 4,
            "max_response_length": 4,
            "kv_cache_mb": 32,
            "max_refills": 2,
            "park_training": PARKED[run],
            **changes.get("rollout", {}),
        }
        recipe = write_recipe(task, **sections, train={"steps": 6, "minibatches": 2, "micro_batch_tokens": 64}, checkpoint={"every": 2})
        recipe.rename(task / f"{name}-{run}.yaml")

    run_on_forks("train", task / f"{name}-unbroken.yaml")
    kill_a_rank_after_step(task, f"{name}-killed.yaml", task / "runs" / f"{name}-killed", step=3)
    if "DP2" in layout:
        kill_before_the_checkpoint_is_published(task, f"{name}-killed.yaml", task / "runs" / f"{name}-killed", monkeypatch)
    done = megafork("train", f"{name}-killed.yaml", cwd=task)
    assert done.returncode == 0, done.stderr

    whole, broken = (metrics(task / "runs" / f"{name}-{run}") for run in ("unbroken", "killed"))
    assert [row["step"] for row in whole] == list(range(7))
    assert broken == whole
    assert all(row["rollout_mismatch/max"] < 1e-3 for row in whole[1:])
    weights = [(task / "runs" / f"{name}-{run}" / "hf" / "model.safetensors").read_bytes() for run in ("unbroken", "killed")]
    assert weights[0] == weights[1]
    for run in ("unbroken", "killed"):
        check_rollouts(task / "runs" / f"{name}-{run}", whole)
    check_evaluations(task / "runs" / f"{name}-unbroken", whole)


def test_an_answer_in_a_thought_that_the_template_opened_does_not_count(task: Path) -> None:
    """The model answers at once, and never writes </think>: what it writes is the thought."""
    model = task / "model-that-thinks"
    shutil.copytree(task / "runs/sft/hf", model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    # so that the prompts have the same tokens with <think> and without
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "<think>"}, "content": ""}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    accuracies = {}
    for name, template in {"plain": "{prompt}", "opened": "{prompt} <think>\n"}.items():
        recipe = write_recipe(task, model={"path": str(model)}, run={"name": name, "folder": str(task / "runs")}, train={"steps": 1})
        run_on_forks("train", recipe, f"data.template={json.dumps(template)}")
        first, step = metrics(task / "runs" / name)
        accuracies[name] = (first["eval/accuracy"], step["accuracy/mean"])
    assert min(accuracies["plain"]) > 0.2 and accuracies["opened"] == (0, 0)


def kill_a_rank_after_step(cwd: Path, recipe: str, run: Path, *, step: int) -> None:
    """Start a run and kill -9 one rank as soon as the step's line is written; the command must fail by itself and leave no process."""
    process = start_megafork("train", recipe, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    file = run / "metrics.jsonl"
    while not (file.exists() and f'"step": {step},' in file.read_text()):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    launcher = psutil.Process(process.pid)
    family = launcher.children(recursive=True)
    ranks = sorted(launcher.children(), key=lambda child: child.create_time())
    assert len(ranks) == 2
    ranks[1].kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in stderr
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def kill_before_the_checkpoint_is_published(cwd: Path, recipe: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on from step 2, and kill -9 rank 0 when the checkpoint of step 4 is written, and its line of metrics is not."""
    write = RunLog.write

    def kill(log: RunLog, metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        write(log, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", kill)  # of the ranks that are forked from here
        assert megafork("train", recipe, cwd=cwd).returncode == 1
    written = run / "checkpoints/step_000004.writing"
    assert any(file.stat().st_size > 100_000 for file in written.glob("*.distcp")), "vLLM's wake and the log wait for it"
    assert [step for step, _ in complete(run / "checkpoints")] == [2]
    assert [row["step"] for row in metrics(run)] == [0, 1, 2, 3]


def check_evaluations(run: Path, rows: list[dict[str, Any]]) -> None:
    """A number for each held-out prompt, whatever engine answered it."""
    for row in (row for row in rows if "eval/accuracy" in row):
        found = json.loads((run / "evaluations" / f"step_{row['step']:06d}.json").read_text())
        assert found["step"] == row["step"] and len(found["accuracies"]) == 20
        assert sum(found["accuracies"]) / 20 == pytest.approx(row["eval/accuracy"])


def check_rollouts(run: Path, rows: list[dict[str, Any]]) -> None:
    """The parquet of every step agrees with its line of metrics."""
    for row in rows[1:]:
        table = pq.read_table(run / "rollouts" / f"step_{row['step']:06d}.parquet").to_pylist()
        tokens = sum(len(r["tokens"]) for r in table)
        masked = [e for r in table for e, m in zip(r["entropies"], r["mask"], strict=True) if m]
        assert {e > FORK for r in table for e in r["entropies"]} == {True, False}
        assert len(masked) / tokens == pytest.approx(row["forks/fraction"])
        assert sum(e for r in table for e in r["entropies"]) / tokens == pytest.approx(row["entropy/mean"], rel=1e-5)
        assert len(table) <= row["sampling/responses"]
        if len(table) == row["sampling/responses"]:
            assert tokens / len(table) == pytest.approx(row["response_length/mean"])
        assert sum(r["reward"] for r in table) / len(table) == pytest.approx(row["reward/mean"])
        assert all(len(r["pieces"]) == len(r["tokens"]) == len(r["log_probs"]) for r in table)
