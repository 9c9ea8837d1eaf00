"""The doctor: what it reports about this machine, and when a recipe cannot run on it."""

from __future__ import annotations

import importlib.metadata
import io
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import megafork
from packaging.requirements import Requirement
from rich.console import Console
from task import make_task, write_recipe

from megafork.doctor import MEGATRON, PYTHON, Finding, can_run, examine, render
from megafork.recipe import Recipe


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (tmp_path / "train.jsonl").write_text("{}\n")
    return folder


def recipe(folder: Path, **sections: dict[str, Any]) -> Recipe:
    values: dict[str, dict[str, Any]] = {
        "run": {"ranks": 1},
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl")},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Recipe.model_validate(values)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def without_vllm(findings: list[Finding]) -> list[Finding]:
    """What the recipe itself needs: these tests also run where no engine is installed."""
    return [finding for finding in findings if finding.name not in ("vLLM", "megatron-core")]


def test_finds_what_is_installed() -> None:
    found = by_name(examine())
    assert found["torch"].found == torch.__version__
    assert found["Python"].ok and found["Python"].found == ".".join(map(str, sys.version_info[:3]))
    assert found["CUDA"].ok is torch.cuda.is_available()
    assert found["megatron-core"].found == importlib.metadata.version("megatron-core")
    assert found["megatron-core"].ok
    assert (found["Slurm"].found is not None) is bool(shutil.which("sinfo") or shutil.which("srun"))
    for finding in found.values():
        assert finding.ok or finding.cost, f"{finding.name} is missing and nobody says what that costs"


def test_versions_are_those_of_the_package() -> None:
    requirements = {r.name: r for r in map(Requirement, importlib.metadata.requires("megafork") or [])}
    assert str(requirements["megatron-core"].specifier) == str(Requirement(f"x{MEGATRON}").specifier)
    assert importlib.metadata.metadata("megafork")["Requires-Python"] == PYTHON


def test_a_recipe_that_fits_can_run(model: Path) -> None:
    assert can_run(without_vllm(examine(recipe(model.parent))))


@pytest.mark.parametrize(
    ("sections", "name", "fix"),
    [
        ({"run": {"ranks": 3}, "parallel": {"tp": 2}}, "ranks", "run.ranks is 3: set it to a multiple of 2"),
        ({"run": {"ranks": 3}, "rollout": {"tp": 2}}, "ranks", "rollout.tp is 2: set it to a divisor of 3"),
        ({"model": {"path": "/no/such/model"}}, "model.path", "'/no/such/model': give a Hugging Face model folder"),
        ({"data": {"train": "/no/such.jsonl"}}, "data.train", "'/no/such.jsonl': no such file"),
        ({"data": {"eval": "/no/such.parquet"}}, "data.eval", "'/no/such.parquet': no such file"),
        ({"reward": {"verifier": "/no/such.py:score"}}, "reward.verifier", "no such file"),
        ({"run": {"ranks": 1000}}, "memory for the ranks", "they need 800.0 GB"),
    ],
)
def test_a_recipe_that_cannot_run_names_field_and_fix(model: Path, sections: dict[str, dict[str, Any]], name: str, fix: str) -> None:
    findings = examine(recipe(model.parent, **sections))
    assert not can_run(findings)
    assert not by_name(findings)[name].ok
    assert fix in by_name(findings)[name].cost


def test_a_model_folder_without_weights_is_not_a_model(model: Path) -> None:
    (model / "model.safetensors").unlink()
    finding = by_name(examine(recipe(model.parent)))["model.path"]
    assert not finding.ok and finding.needed and "put weights (*.safetensors) there" in finding.cost


def test_hub_names_are_fetched_unless_offline(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    named = recipe(model.parent, model={"path": "Qwen/Qwen3-0.6B"})
    assert can_run(without_vllm(examine(named)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not can_run(examine(named))
    (tmp_path / "hub" / "models--Qwen--Qwen3-0.6B").mkdir(parents=True)
    assert by_name(examine(named))["model.path"].ok
    (tmp_path / "hub" / "datasets--openai--gsm8k").mkdir()
    assert by_name(examine(recipe(model.parent, data={"train": "hub:openai/gsm8k@main:train"})))["data.train"].ok


def test_a_mistyped_path_is_not_taken_for_a_hub_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model.parent / "runs").mkdir()
    monkeypatch.chdir(model.parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("runs/modle", "~no such user/model"):
        finding = by_name(examine(recipe(model.parent, model={"path": name})))["model.path"]
        assert not finding.ok and finding.needed


def test_servers_are_looked_for_and_not_needed_yet(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        urls = [f"http://127.0.0.1:{listening.getsockname()[1]}", "http://127.0.0.1:1"]
        findings = examine(recipe(model.parent, run={"ranks": 3}, rollout={"tp": 2, "servers": urls}))
    servers = [finding for finding in findings if finding.name == "rollout.servers"]
    assert [finding.ok for finding in servers] == [True, False] and "http://127.0.0.1:1 does not answer" in servers[1].cost
    assert can_run(without_vllm(findings)), "rollout.tp is the servers' alone"


@pytest.mark.skipif(not can_run(examine()), reason="what is installed does not run on this machine")
def test_what_train_refuses_the_doctor_refuses_too(tmp_path: Path) -> None:
    make_task(tmp_path)
    write_recipe(tmp_path)
    (tmp_path / "no_answers.jsonl").write_text('{"prompt": "max 1 2 =", "response": "2"}\n')

    def refused(*overrides: str) -> str | None:
        checked = megafork("doctor", "recipe.yaml", *overrides, "--json", cwd=tmp_path)
        finding = json.loads(checked.stdout.splitlines()[-1])["findings"][-1]
        assert finding["name"] == "recipe" and checked.returncode == (0 if finding["ok"] else 1)
        return None if finding["ok"] else finding["cost"]

    assert refused() is None
    assert refused("data.train=no_answers.jsonl", "data.eval=null") is None  # for sft
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "max 1 2 ="}\n')
    assert "data.train: prompts.jsonl line 1 has no answer" in str(refused("data.train=prompts.jsonl"))
    assert "parallel.pp is 3" in str(refused("parallel.pp=3"))
    assert megafork("doctor", "recipe.yaml", "train.stps=3", cwd=tmp_path).returncode == 2


def test_table_shows_each_finding_with_its_cost_as_it_is_written() -> None:
    screen = Console(file=io.StringIO(), width=200)
    screen.print(
        render([Finding("vLLM", None, False, "pip install 'megafork[cpu]'", needed=True), Finding("torch", "2.13.0+cpu", True, "unseen")])
    )
    assert isinstance(screen.file, io.StringIO)
    missing, there = screen.file.getvalue().splitlines()[1:3]
    assert missing.split(maxsplit=3) == ["✗", "vLLM", "nothing", "pip install 'megafork[cpu]'"]
    assert there.split() == ["✓", "torch", "2.13.0+cpu"]


def test_heavy_packages_are_not_imported() -> None:
    program = (
        "import sys; from megafork.doctor import examine; examine(); "
        "sys.exit(','.join(n for n in ('vllm', 'megatron', 'transformers', 'transformer_engine') if n in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "" and done.returncode == 0
