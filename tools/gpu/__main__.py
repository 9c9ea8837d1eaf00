"""Everything that only a GPU can show, most valuable first: `make gpu`, or `python tools/gpu`. `--dry` uses tiny sizes on any machine, and
multiplies in bf16 instead of FP8, which would need Transformer Engine.

Each part runs in separate processes under one time limit. Its results are written at once to `benchmarks/results/gpu.json`, with its
commands and the machine; a later call skips finished parts, so it resumes where the last one stopped, and repeats failed parts.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/gpu.json"
PYTHON = "python"
"""Stands for this interpreter in recorded commands."""


@dataclass(frozen=True)
class Part:
    """Commands, run one after another; the last line printed by the last command is JSON: the part's figures."""

    name: str
    limit_s: float
    commands: list[str]


def parts(work: str, dry: bool) -> Iterator[Part]:
    """The parts in order. `work`: a folder for models and runs."""
    flag, steps = (" --dry", 2) if dry else ("", 0)
    megafork, here = f"{PYTHON} -m megafork.cli", f"{PYTHON} tools/gpu"
    task = f"{work}/task"
    one = f"run.folder={work} run.ranks=1 parallel.tp=1 rollout.tp=1 data.train={task}/train.jsonl data.eval={task}/heldout.jsonl"
    forks, warm_up = f"{megafork} train recipes/quickstart/train.yaml {one}", f"{megafork} sft recipes/quickstart/sft.yaml"
    rows = f"run.folder={work} run.ranks=1 data.train={task}/sft.jsonl"
    few = f" train.steps={steps}" if dry else ""
    fp8 = f"precision.dtype=bf16 precision.train_fp8={'false' if dry else 'true'}"

    large, size = f"{work}/qwen3-0.6b", "tiny" if dry else "qwen3-0.6b"
    model = [f"{PYTHON} recipes/quickstart/countdown.py {task}", f"{here}/random_model.py {large} {size} {task}/model"]
    yield Part("attention over 200 distinct lengths", 180, [f"{here}/attention.py{flag}"])
    yield Part("sleep, refit and wake, twice, on Qwen3-0.6B", 300, [*model, f"{here}/colocated.py cycle {large}{flag}"])
    yield Part("a layer of Qwen3-32B's width, plain and fused", 240, [f"{here}/width.py {work}/width{flag}"])
    yield Part("a layer of Qwen3-30B-A3B's width, plain and fused", 300, [f"{here}/width.py {work}/experts --experts{flag}"])
    yield Part("a checkpoint with vLLM awake", 300, [*model, f"{here}/colocated.py checkpoint {large}{flag}"])
    yield Part("doctor", 60, [f"{megafork} doctor --json"])
    yield Part("numerics", 300, [f"{here}/numerics.py{flag}"])
    yield Part(
        "quickstart",
        420,
        [
            f"{PYTHON} recipes/quickstart/countdown.py {task}",
            f"{warm_up} {rows} model.path={task}/model{few}",
            f"{forks} run.name=fp32 model.path={work}/quickstart-sft/hf{few}",
            f"{here}/figures.py {work}/fp32",
        ],
    )
    yield Part("kernels", 120, [f"{PYTHON} -m benchmarks kernels --out {work}{' --quick' if dry else ''}", f"cat {work}/kernels.json"])
    tested = "tests/test_quantile.py" if dry else "tests/test_kernels.py tests/test_vocab.py tests/test_quantile.py"
    yield Part("tests", 300, [f"{PYTHON} -m pytest -o addopts= -q {tested}"])
    bf16 = f"{forks} run.name=bf16 model.path={work}/quickstart-sft/hf precision.dtype=bf16{few}"
    yield Part("quickstart in bf16", 240, [bf16, f"{here}/figures.py {work}/bf16"])
    lengths = "rollout.max_response_length=32 rollout.prompts=4" if dry else "rollout.max_response_length=4096 rollout.prompts=8"
    yield Part(
        "Qwen3-0.6B, 4,096 tokens per response",
        420,
        [
            *model,
            f"{forks} run.name=large model.path={large} precision.dtype=bf16 {lengths} rollout.dynamic_sampling=false eval.every=0 "
            f"data.eval=null train.micro_batch_tokens=null train.steps={steps or 4} model.recompute=selective",
            f"{here}/figures.py {work}/large",
        ],
    )
    curve = f"{warm_up} {rows} model.path={work}/blocks precision.dtype=bf16 train.steps={steps or 50}"
    yield Part(
        "FP8: the warm start's loss",
        240,
        [
            f"{here}/random_model.py {work}/blocks blocks {task}/model",
            f"{curve} run.name=curve-bf16",
            f"{curve} run.name=curve-fp8 {fp8}",
            f"{here}/figures.py {work}/curve-bf16 {work}/curve-fp8",
        ],
    )
    rounds = f"{forks} model.path={work}/blocks-sft/hf {fp8} precision.rollout_fp8=true"
    yield Part(
        "FP8: roll-outs, refit and update",
        420,
        [
            f"{warm_up} {rows} run.name=blocks-sft model.path={work}/blocks precision.dtype=bf16{few}",
            f"{rounds} run.name=fp8 loss.importance_cap=2{few}",
            f"{rounds} run.name=fp8-free loss.importance_cap=1e9{few}",  # in effect no cap; the recipe requires one
            f"{here}/figures.py {work}/fp8 {work}/fp8-free",
        ],
    )
    trials = f"{megafork} ablate recipes/ablation/top_20.yaml recipes/ablation/all.yaml --json --out {work}/ablation"
    sizes = f"{one.replace(f'run.folder={work} ', '')} model.path={work}/quickstart-sft/hf"
    yield Part("top 20% against all", 600, [f"{trials} --seeds {'1' if dry else '1,2,3,4'} {sizes}{few}"])


def run(part: Part, log: Path) -> dict[str, Any]:
    """Run a part. Its result reports success or failure."""
    start, result = time.monotonic(), {"commands": part.commands, "ok": False}
    with log.open("w") as output:
        for command in part.commands:
            words = [sys.executable if word == PYTHON else word for word in shlex.split(command)]
            left = part.limit_s - (time.monotonic() - start)
            try:
                code = subprocess.run(words, cwd=ROOT, env=_environment(), stdout=output, stderr=subprocess.STDOUT, timeout=left).returncode
            except subprocess.TimeoutExpired:
                return {**result, "why": f"not done after {part.limit_s:g} s: {command}"}
            if code:
                return {**result, "why": f"exit code {code}: {command}", "output": log.read_text().splitlines()[-15:]}
    last = log.read_text().rstrip()
    last = last[last.rfind("\n{") + 1 :]  # one line, or an indented file
    figures = json.loads(last) if last.startswith("{") else {"output": last.splitlines()[-1]}
    return {**result, "ok": True, "seconds": round(time.monotonic() - start, 1), "figures": figures}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), "COLUMNS": "160"}


def main(
    dry: Annotated[bool, typer.Option(help="Tiny sizes, to check that each part runs; the figures mean nothing.")] = False,
    out: Annotated[Path, typer.Option(help="File for the results, written after each part.", show_default=False)] = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder for models, runs and logs.")] = Path("runs/gpu"),
    only: Annotated[str, typer.Option(help="Run only parts whose name contains this.")] = "",
) -> None:
    """Run the parts that have no result yet."""
    if not (dry or torch.cuda.is_available()):
        raise typer.BadParameter("there is no GPU: give --dry to see whether each part runs")
    work.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT))
    from benchmarks import machine
    from megafork.files import whole

    results = json.loads(out.read_text()) if out.exists() else {"machine": machine.describe(), "versions": machine.versions(), "parts": {}}
    failed = False
    for part in parts(str(work), dry):
        done = results["parts"].get(part.name, {}).get("ok", False)
        if done or only not in part.name:
            continue
        typer.echo(f"{part.name} ...")
        result = run(part, work / f"{part.name.replace(' ', '_').replace(',', '')}.log")
        results["parts"][part.name] = result
        with whole(out) as unfinished:
            unfinished.write_text(json.dumps(results, indent=1) + "\n")
        typer.echo(f"  {json.dumps(result['figures'])[:300] if result['ok'] else result['why']}")
        failed |= not result["ok"]
    raise typer.Exit(failed)


if __name__ == "__main__":
    typer.run(main)
