"""Profiling a step: it changes no numbers, its trace has our phases, and the report shows where the time went."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import megafork, run_on_forks
from safetensors.torch import load_file
from task import make_task, write_recipe
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

from megafork.recipe import Profile, RecipeError
from megafork.recipe.run import Log
from megafork.report.report import report_html
from megafork.train.profile import check_profile, operators

PHASES = {"train": {"rollout", "reward", "score", "update", "checkpoint", "refit"}, "sft": {"update"}}
NUMBERS = ("time/", "throughput/", "memory/", "rollout/idle_share")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_task(tmp_path_factory.mktemp("task"))
    (folder / "odd.py").write_text("def score(response, row):\n    return sum(map(ord, response)) % 2\n")  # something to learn from
    train = {"steps": 2, "minibatches": 2, "micro_batch_tokens": 64}
    write_recipe(folder, data={"eval": None}, train=train, reward={"verifier": str(folder / "odd.py") + ":score"})
    return folder


def events(trace: Path) -> list[dict[str, Any]]:
    with gzip.open(trace, "rt") as file:
        return list(json.load(file)["traceEvents"])


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(NUMBERS)} for row in rows]


@pytest.mark.parametrize("command", [pytest.param("sft"), pytest.param("train", marks=pytest.mark.slow)])
def test_a_profiled_run_has_the_numbers_of_one_that_is_not(command: Any, task: Path) -> None:
    plain, seen = task / f"runs/{command}-plain", task / f"runs/{command}-seen"
    run_on_forks(command, task / "recipe.yaml", f"run.name={plain.name}", "parallel.tp=2")
    run_on_forks(command, task / "recipe.yaml", f"run.name={seen.name}", "parallel.tp=2", "log.profile={steps: [2], what: torch}")
    assert metrics(seen) == metrics(plain)
    weights = [load_file(run / "hf/model.safetensors") for run in (plain, seen)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    assert not (plain / "profile").exists()
    assert {file.name for file in (seen / "profile").iterdir()} == {"step_000002.json", "step_000002.trace.json.gz"}
    every = events(seen / "profile/step_000002.trace.json.gz")
    ranges = [e for e in every if str(e.get("name", "")).startswith("megafork/")]
    assert {e["name"].removeprefix("megafork/") for e in ranges} == PHASES[command]
    (update,) = (e for e in ranges if e["name"] == "megafork/update")
    products = [e for e in every if e.get("name") == "aten::mm"]
    assert any(update["ts"] <= e["ts"] <= update["ts"] + update["dur"] for e in products), "operators lie in their phase's range"

    table = json.loads((seen / "profile/step_000002.json").read_text())
    assert [row["seconds"] for row in table] == sorted((row["seconds"] for row in table), reverse=True)
    assert 0.5 < sum(row["share"] for row in table) <= 1.0 + 1e-9
    names = {row["name"] for row in table}
    assert any(name.startswith("aten::") for name in names) and not any("megafork/" in name for name in names)
    page = report_html(seen)
    assert "<h2>Operators</h2>" in page and f'<th scope="row">{table[0]["name"]}</th><td>{table[0]["calls"]:,}</td>' in page
    assert "<h2>Operators</h2>" not in report_html(plain)


def test_on_a_gpu_each_kernel_counts_once() -> None:
    """torch gives a kernel's time to the operator that launched it, to itself, and to every range around it."""

    def row(key: str, device: DeviceType, microseconds: float, *, annotation: bool = False) -> FunctionEventAvg:
        one = FunctionEventAvg()
        one.key, one.count, one.device_type, one.is_user_annotation = key, 2, device, annotation
        one.self_device_time_total, one.self_cpu_time_total = microseconds, 7e6  # type: ignore[assignment]
        return one

    rows = [
        row("aten::mm", DeviceType.CPU, 3e6),
        row("gemm", DeviceType.CUDA, 3e6),
        row("softmax", DeviceType.CUDA, 1e6),
        row("megafork/update", DeviceType.CUDA, 4e6, annotation=True),
        row("nccl:all_reduce", DeviceType.CUDA, 4e6, annotation=True),
    ]
    assert operators(rows, cuda=True) == [
        {"name": "gemm", "calls": 2, "seconds": 3.0, "share": 0.75},
        {"name": "softmax", "calls": 2, "seconds": 1.0, "share": 0.25},
    ]
    assert operators(rows, cuda=False) == [{"name": "aten::mm", "calls": 2, "seconds": 7.0, "share": 1.0}]


@pytest.mark.parametrize("what", ["memory", "nsys"])
def test_what_needs_cuda_is_refused_without_it(what: Any, task: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    check_profile(Log())
    check_profile(Log(profile=Profile(steps=[1])))
    with pytest.raises(RecipeError, match=rf"^log.profile.what is '{what}', .* no GPU here: choose torch"):
        check_profile(Log(profile=Profile(steps=[1], what=what)))


@pytest.mark.parametrize("command", ["train", "sft"])
def test_it_is_refused_before_the_run(command: str, task: Path) -> None:
    ended = megafork(command, "recipe.yaml", "run.name=refused", "log.profile={steps: [1], what: memory}", cwd=task)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "log.profile.what is 'memory'" in ended.stderr
    assert not (task / "runs/refused").exists()


@pytest.mark.parametrize("text", ["{", "5", '[{"name": "aten::mm"}]', '[{"name": "a", "calls": "x", "seconds": 1, "share": 1}]'])
def test_a_damaged_table_is_answered_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile/step_000001.json").write_text(text)
    with pytest.raises(RecipeError, match=r"step_000001.json' is not a table of operators: remove it$"):
        report_html(tmp_path)
