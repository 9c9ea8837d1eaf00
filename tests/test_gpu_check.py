"""`python tools/gpu`: what it runs on a GPU runs here at a small scale, and a call resumes where the last one was stopped."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny import save_model
from typer.testing import CliRunner

from megafork.user_code import import_file

ROOT = Path(__file__).parent.parent

gpu_check = import_file(ROOT / "tools/gpu/__main__.py", "gpu_check")


def test_a_part_that_failed_or_never_ended_is_told_and_tried_again(tmp_path: Path) -> None:
    marker = tmp_path / "there"
    fails = f"python -c 'import os, sys; print(1); sys.exit(not os.path.exists(\"{marker}\"))'"
    good = 'python -c \'print("first"); print("{\\"figure\\": 3}")\''

    def run(*commands: str, limit_s: float = 60.0) -> dict[str, Any]:
        result: dict[str, Any] = gpu_check.run(gpu_check.Part("name", limit_s, list(commands)), tmp_path / "log")
        assert result["commands"] == list(commands)
        return result

    assert run(good)["figures"] == {"figure": 3}
    assert run(good, 'printf \'{\\n "deep": {\\n  "figure": 4\\n }\\n}\\n\'')["figures"] == {"deep": {"figure": 4}}
    failed = run(good, fails, good)
    assert (failed["ok"], failed["output"]) == (False, ["first", '{"figure": 3}', "1"])
    assert failed["why"].startswith("exit code 1: python -c")
    marker.touch()
    assert run(fails, good)["ok"]
    late = run("python -c 'import time; time.sleep(60)'", limit_s=0.5)
    assert not late["ok"] and late["why"].startswith("not done after 0.5 s")


@pytest.mark.slow
def test_what_has_a_result_is_not_run_again(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "tools/gpu", "--dry", "--out", str(out), "--work", str(tmp_path / "work"), "--only", "numerics"]
    for said in ("numerics ...", ""):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout and bool(said) == bool(done.stdout)
    (part,) = json.loads(out.read_text())["parts"].values()
    assert part["figures"]["over"] == {} and part["figures"]["checkpoint bf16"] == 0.0 and part["figures"]["log-prob fp32"] < 1e-5
    assert part["commands"] == ["python tools/gpu/numerics.py --dry"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run_starts(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(gpu_check.main)
    refused = CliRunner().invoke(app, ["--out", str(tmp_path / "gpu.json"), "--work", str(tmp_path / "work")])
    assert refused.exit_code == 2 and "there is no GPU: give --dry" in refused.output
    assert not list(tmp_path.iterdir())


def test_what_decides_most_comes_first() -> None:
    names = [part.name for part in gpu_check.parts("WORK", False)]
    assert len(set(names)) == len(names) and names == [part.name for part in gpu_check.parts("WORK", True)]
    assert names[:7] == [
        "attention over 200 distinct lengths",
        "sleep, refit and wake, twice, on Qwen3-0.6B",
        "a layer of Qwen3-32B's width, plain and fused",
        "a layer of Qwen3-30B-A3B's width, plain and fused",
        "a checkpoint with vLLM awake",
        "doctor",
        "numerics",
    ]
    attention = import_file(ROOT / "tools/gpu/attention.py", "gpu_attention")
    batches = attention.micro_batches(200, 8000, 20480)
    assert sorted(itertools.chain(*batches)) == list(range(40, 8001, 40)) and all(sum(lengths) <= 20480 for lengths in batches)


def _main(name: str, *arguments: Any) -> Any:
    """What a part's script prints, in a rank of its own."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert import_file(ROOT / f"tools/gpu/{name}.py", f"gpu_{name}").main(*arguments) == 0
    return json.loads(said.getvalue())


@pytest.mark.slow
def test_attention_and_vllm_beside_the_trainer_run_at_a_small_scale(tmp_path: Path) -> None:
    [found] = on_ranks(1, _main, "attention", True)
    assert found["lengths"] == 4 and found["each length"]["difference"] == 0.0
    for what in ("cycle", "checkpoint"):
        [found] = on_ranks(1, _main, "colocated", what, save_model(tmp_path / what), True, engines=True, timeout_s=240)
        assert all(found["held"].values()) and all(phase["s"] > 0 for phase in found["phases"].values())


def test_every_command_names_what_is_there() -> None:
    for dry in (False, True):
        for part in gpu_check.parts("WORK", dry):
            for word in " ".join(part.commands).split():
                if word.endswith((".py", ".yaml")):
                    assert (ROOT / word).exists(), word
