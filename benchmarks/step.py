"""A whole training step, roll-out to refit: ours on two ranks, TRL's GRPOTrainer in one process with two threads, taking turns.

Both have the same model, prompts, number of responses and updates, loss (DAPO's, at the top fifth of the entropies) and precision (fp32).
TRL draws with transformers, the only engine of its that runs on a CPU.

The quickstart's model has 1.1 million parameters. Four fifths of our processor time is then vLLM's work in Python per request and token,
and every response is judged in a sandbox; TRL draws one padded batch and calls its reward in process, which is faster at that size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import free_port, on_ranks
from smollm import save_smollm

from benchmarks import peers
from benchmarks.figure import Figure, Series
from megafork.parallel.mesh import build_mesh
from megafork.recipe import Recipe
from megafork.train.inputs import read_inputs
from megafork.train.loop import Trainer
from megafork.train.run import build_learner

QUICKSTART = Path("runs/quickstart-sft")
REWARD, SCRIPT = (Path(__file__).with_name(name) for name in ("step_reward.py", "step_trl.py"))
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LD_PRELOAD")
"""Variables of our ranks' environment, which TRL would take for its own."""
LIMIT_S = 3600.0


@dataclass(frozen=True)
class Task:
    """One comparison: `prompts` x `samples` responses of at most `tokens` tokens in each step."""

    name: str
    prompts: int
    samples: int
    tokens: int
    minibatches: int
    texts: tuple[str, ...]


class Peer:
    """TRL in a process of its own, which sleeps between its steps."""

    def __init__(self, task: Task, model: str, folder: str, steps: int) -> None:
        threads = {"OMP_NUM_THREADS": "2", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(peers.FOLDER)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT), json.dumps(asdict(task)), model, folder, str(steps)],
            env={**{name: value for name, value in os.environ.items() if name not in RANKS}, **threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> tuple[float, float]:
        """Seconds and sampled tokens of its next step."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        seconds, tokens = json.loads(self._process.stdout.readline())
        return seconds, tokens

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def run(quick: bool) -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repeats = 1 if quick else 5
        task = Task("the quickstart's model", 8 if quick else 48, 8, 20, 2, _quickstart_prompts())
        figures.append(_compare(task, QUICKSTART / "hf", folder / "quickstart", repeats))
        if not quick:
            sums = tuple(f"What is {a} + {b}? Think step by step." for a in range(2, 9) for b in range(11, 20))
            figures.append(_compare(Task("SmolLM2-135M", 4, 4, 128, 1, sums), save_smollm(folder / "smollm"), folder / "smollm-run", 3))
    return figures


def _quickstart_prompts() -> tuple[str, ...]:
    if not (QUICKSTART / "hf").exists():
        subprocess.run([sys.executable, "recipes/quickstart/countdown.py", str(QUICKSTART / "task")], check=True)
        subprocess.run([sys.executable, "-m", "megafork.cli", "sft", "recipes/quickstart/sft.yaml"], check=True)
    return tuple(json.loads(line)["prompt"] for line in (QUICKSTART / "task/train.jsonl").read_text().splitlines())


def _compare(task: Task, model: Path, folder: Path, repeats: int) -> Figure:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": text, "answer": "0"}) + "\n" for text in task.texts))
    ours, theirs = on_ranks(2, _steps, task, str(model), str(folder), repeats, free_port(), timeout_s=LIMIT_S, engines=True)[0]
    return Figure(
        f"a step of {task.prompts * task.samples} responses, {task.minibatches} updates, {task.name}",
        "s",
        Series("megafork, DP 2", [seconds for seconds, _ in ours]),
        Series("TRL", [seconds for seconds, _ in theirs]),
        at_least=2,
        extra={"tokens": ours[-1][1], "tokens_trl": theirs[-1][1]},
    )


def _recipe(task: Task, model: str, folder: str) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"name": "step", "folder": folder, "ranks": 2},
            "model": {"path": model},
            "data": {"train": f"{folder}/train.jsonl", "max_prompt_length": 64},
            "rollout": {
                "prompts": task.prompts,
                "samples": task.samples,
                "max_response_length": task.tokens,
                "dynamic_sampling": False,
                "kv_cache_mb": 256,
            },
            "reward": {"verifier": f"{REWARD}:score", "overlong": "none"},
            "optimizer": {"lr": 1e-6},
            "precision": {"dtype": "fp32"},
            "train": {"steps": 1000, "minibatches": task.minibatches, "micro_batch_tokens": 4096},
        }
    )


def _steps(task: Task, model: str, folder: str, repeats: int, port: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Seconds and sampled tokens of each step after the first: ours and, on rank 0, TRL's."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    recipe = _recipe(task, model, folder)
    mesh = build_mesh(recipe.parallel, seed=1, device=torch.device("cpu"))
    peer = Peer(task, model, folder, repeats + 1) if mesh.is_rank_zero else None
    inputs = read_inputs(recipe, supervised=False)
    trainer = Trainer(recipe, mesh, inputs, build_learner(inputs, recipe, mesh, updates=1000))
    trainer.refit(0)
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    for step in range(1, repeats + 2):
        if peer is not None:
            theirs.append(peer.step())
        dist.barrier()
        start = time.perf_counter()
        metrics = trainer.step(step)
        dist.barrier()
        length, responses = metrics["response_length/mean"], metrics["sampling/responses"]
        assert length is not None and responses is not None
        ours.append((time.perf_counter() - start, length * responses))
    trainer.close()
    if peer is not None:
        peer.close()
    return ours[1:], theirs[1:]
