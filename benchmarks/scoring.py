"""Our step with the scoring pass against our step without it (`forks.entropy_from: rollout`, `loss.old_log_prob: current`), on-policy.

SmolLM2-135M in fp32, one rank on one core with its own vLLM engine: real roll-out, update of a fifth of the tokens and refit, the two steps
in turn, with the same prompts and seeds, at a learning rate that changes nothing. `rollout.mismatch_responses` is 0: by default a step also
scores 16 of its responses, whose cost is their share of the scoring pass. A forward is a quarter of forward, backward and scoring together,
so without any roll-out and with nothing else in a step the ratio would be about 4/3; what exceeds that is the machine's load.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ranks import free_port, on_ranks
from smollm import save_smollm
from task import make_task, write_recipe

from benchmarks.figure import Figure, Series
from megafork.parallel.mesh import build_mesh
from megafork.recipe import Recipe
from megafork.recipe_file import load_recipe

SCORED, WITHOUT = "with the scoring pass", "without"
SOURCES: dict[str, tuple[str, ...]] = {
    SCORED: (),
    WITHOUT: ("forks.entropy_from=rollout", "loss.old_log_prob=current", "rollout.mismatch_responses=0"),
}
PHASES = ("rollout", "score", "update", "refit")
QUESTIONS = ("What is a fork?", "Name three rivers.", "Why is the sky blue?", "Describe a good morning.")


def run(quick: bool) -> list[Figure]:
    repeats, samples, tokens = (1, 2, 4) if quick else (5, 8, 24)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if quick:
            make_task(folder)
        else:
            save_smollm(folder / "model")
            (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": q, "answer": ""}) + "\n" for q in QUESTIONS))
        (folder / "verifier.py").write_text("def score(response, row):\n    return float(len(response) % 2)\n")
        changes: dict[str, Any] = {
            "data": {"eval": None, "max_prompt_length": 16},
            "rollout": {"prompts": 4, "samples": samples, "max_response_length": tokens, "dynamic_sampling": False, "kv_cache_mb": 256},
            "reward": {"verifier": f"{folder}/verifier.py:score", "workers": 1},
            "train": {"minibatches": 1, "micro_batch_tokens": 512},
            "optimizer": {"lr": 1e-9},
        }
        file = write_recipe(folder, **changes)
        recipes = {name: load_recipe(file, list(overrides)) for name, overrides in SOURCES.items()}
        [(steps, phases)] = on_ranks(1, _steps, recipes, repeats, free_port(), timeout_s=3600, engines=True)
    what = f"a step on SmolLM2-135M, {4 * samples} responses of up to {tokens} tokens"
    means = {f"{phase}_s, {name}": value for name in (SCORED, WITHOUT) for phase, value in phases[name].items()}
    figure = Figure(what, "s", steps[WITHOUT], steps[SCORED], at_least=1.2, extra=means)
    return [replace(figure, note=f"of processor seconds, which other programs hardly affect, the ratio is {figure.cpu_ratio:.2f}")]


def _steps(recipes: dict[str, Recipe], repeats: int, port: int) -> tuple[dict[str, Series], dict[str, dict[str, float]]]:
    """Seconds of each step, in turn after an uncounted one each, and the medians of their phases."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from megafork.train.inputs import read_inputs
    from megafork.train.loop import Trainer
    from megafork.train.run import build_learner

    widest = recipes[WITHOUT]  # its engine can return entropies
    mesh = build_mesh(widest.parallel, seed=1, device=torch.device("cpu"))
    inputs = read_inputs(widest, supervised=False)
    trainer = Trainer(widest, mesh, inputs, build_learner(inputs, widest, mesh, updates=1000))
    trainer.refit(0)
    series = {name: Series(name, []) for name in recipes}
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in recipes}
    for repeat in range(repeats + 1):
        for name, spec in recipes.items():
            trainer.recipe = trainer.learner.recipe = trainer.sampler.recipe = spec
            start, cpu_start = time.perf_counter(), time.process_time()
            metrics = trainer.step(repeat + 1)
            taken, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            if repeat:
                series[name].values.append(taken)
                series[name].cpu.append(cpu)
                phases[name].append({phase: metrics.get(f"time/{phase}") or 0.0 for phase in PHASES})
    trainer.close()
    middle = {
        name: {p: sorted(row[p] for row in rows)[len(rows) // 2] for p in PHASES if any(r[p] for r in rows)}
        for name, rows in phases.items()
    }
    return series, middle
