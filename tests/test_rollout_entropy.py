"""Entropies and log-probs from real vLLM engines against transformers: preempted, in chunks, from a cache, several tokens at a time."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from entropies import check_entropies
from ranks import free_port, on_ranks
from task import make_task, write_recipe
from tiny import FolderWeights, recipe, save_model

from megafork.parallel.mesh import build_mesh
from megafork.recipe import Recipe
from megafork.recipe_file import load_recipe
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Completion, Request, Sampling, request_seed
from megafork.weights.policy_weights import export_policy

pytestmark = pytest.mark.slow
STEPS = 3

PROMPTS = [[(7 * i + n * i * i) % 99 for i in range(length)] for n, length in enumerate((100, 126, 3, 150, 126))]
REQUESTS = [Request(prompt, request_seed(3, n, sample)) for n, prompt in enumerate(PROMPTS) for sample in range(3)]
SAMPLING = Sampling(max_tokens=40, temperature=0.25, stop=(7,), entropies=True)
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
ENGINES: dict[str, dict[str, Any]] = {
    "a cache for four blocks": {},
    "prompts in chunks": {"max_num_batched_tokens": 48, "enable_prefix_caching": True},
    "speculation": {"speculative_config": NGRAM},
}


def _generate(spec: Recipe, folder: Path, port: int) -> list[tuple[list[Completion], int, int]]:
    """Of each engine: the completions, how often a request was preempted, and how many tokens of drafts were accepted."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    mesh = build_mesh(spec.parallel, seed=1, device=torch.device("cpu"))
    from vllm.v1.core.sched.scheduler import Scheduler

    from megafork.rollout.colocated import ColocatedEngine

    counts = {"preempted": 0, "accepted": 0}
    preempt, update = Scheduler._preempt_request, Scheduler.update_from_output

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        counts["preempted"] += 1
        preempt(self, *args, **kwargs)

    def watched(self: Any, scheduled: Any, output: Any) -> Any:
        counts["accepted"] += sum(max(len(tokens) - 1, 0) for tokens in output.sampled_token_ids)
        return update(self, scheduled, output)

    Scheduler._preempt_request, Scheduler.update_from_output = counted, watched
    results = []
    for engine_arguments in ENGINES.values():
        counts |= {"preempted": 0, "accepted": 0}
        engine = ColocatedEngine(replace(EngineConfig.of(spec), engine=engine_arguments), mesh, FolderWeights(folder))
        engine.refit(0)
        answers = engine.generate(REQUESTS, SAMPLING)
        counted_so_far = counts["preempted"], counts["accepted"]
        plain = engine.generate(REQUESTS[4:6], replace(SAMPLING, entropies=False))
        assert not plain[0].entropies and len(plain[0].log_probs) == len(plain[0].tokens)
        if "speculative_config" not in engine_arguments:  # what is drawn then depends on how far drafts reach
            assert [c.tokens for c in plain] == [c.tokens for c in answers[4:6]]
            for one, other in zip(plain, answers[4:6], strict=True):
                assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
        results.append((answers, *counted_so_far))
        engine.close()
    return results


def test_each_token_has_its_entropy_and_log_prob(tmp_path: Path) -> None:
    """On both ranks of an engine of TP 2."""
    folder = save_model(tmp_path / "model")
    spec = recipe(
        folder,
        data={"max_prompt_length": 150},
        rollout={"tp": 2, "max_response_length": 40, "kv_cache_mb": 1, "max_running": 8},
        parallel={"tp": 2},
        forks={"entropy_from": "rollout"},
    )
    ranks = on_ranks(2, _generate, spec, folder, free_port(), engines=True)
    assert all(rank == ranks[0] for rank in ranks)
    for (answers, preempted, accepted), what in zip(ranks[0], ENGINES, strict=True):
        assert preempted, "choose a smaller cache"
        assert (accepted > 20) == (what == "speculation")
        check_entropies(folder, REQUESTS, answers, SAMPLING.temperature)
        for completion in answers:
            assert completion.truncated == (completion.tokens[-1] != 7) and 7 not in completion.tokens[:-1]


def train(specs: list[Recipe], port: int) -> list[tuple[list[dict[str, Any]], dict[str, torch.Tensor], list[dict[str, Any]]]]:
    """By each recipe: every step's metrics, the weights after the last, and the rows of its last roll-out file."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from megafork.train.inputs import read_inputs
    from megafork.train.loop import Trainer
    from megafork.train.run import build_learner

    mesh = build_mesh(specs[0].parallel, seed=7, device=torch.device("cpu"))
    results = []
    for spec in specs:
        inputs = read_inputs(spec, supervised=False)
        trainer = Trainer(spec, mesh, inputs, build_learner(inputs, spec, mesh, updates=2 * STEPS))
        trainer.refit(0)
        history = [trainer.step(step) for step in range(1, STEPS + 1)]
        rows = pq.read_table(spec.run_folder / "rollouts" / f"step_{STEPS:06d}.parquet").to_pylist() if mesh.is_rank_zero else []
        weights = dict(export_policy(trainer.learner.chunks, inputs.shape, mesh))
        trainer.close()
        results.append((history, weights, rows))
    return results


def test_whole_steps_without_a_scoring_pass(tmp_path: Path) -> None:
    """Under TP 2 (one engine of TP 2) the numbers of the run that scores, under CP 2 (two engines) the same, to 1e-4."""
    task = make_task(tmp_path, tie_word_embeddings=False)
    (task / "verifier.py").write_text("def score(response, row):\n    return float(response[:1] < '5')\n")
    sections: dict[str, dict[str, Any]] = {
        "rollout": {"prompts": 4, "max_response_length": 6, "dynamic_sampling": False, "temperature": 0.8},
        "reward": {"verifier": f"{task}/verifier.py:score", "workers": 1},
        "log": {"tensorboard": False, "rollouts_every": 1},
    }
    scored = ["parallel.tp=2", "rollout.tp=2", "run.name=scored"]
    sources = ["forks.entropy_from=rollout", "loss.old_log_prob=rollout"]
    file = write_recipe(task, **sections)
    pair = [load_recipe(file, scored), load_recipe(file, [*scored, *sources, "run.name=tp", "rollout.mismatch_responses=4"])]
    split = load_recipe(file, ["parallel.cp=2", *sources, "run.name=cp", "rollout.mismatch_responses=0"])
    (with_pass, wanted, rows), tensor = on_ranks(2, train, pair, free_port(), engines=True)[0]
    [context] = on_ranks(2, train, [split], free_port(), engines=True)[0]
    numbers = ("loss/policy", "grad_norm", "forks/tau", "forks/fraction", "entropy/mean", "entropy/forks", "entropy/p80", "accuracy/mean")
    for history, weights, found in (tensor, context):
        for metrics, theirs in zip(history, with_pass, strict=True):
            assert "time/score" not in metrics and theirs["time/score"] > 0
            assert {name: metrics[name] for name in numbers} == pytest.approx({name: theirs[name] for name in numbers}, rel=1e-4, abs=1e-4)
        for name, tensor_ in weights.items():
            torch.testing.assert_close(tensor_, wanted[name], atol=1e-4, rtol=0)
        for row, other in zip(found, rows, strict=True):
            assert (row["tokens"], row["mask"]) == (other["tokens"], other["mask"])
            assert row["entropies"] == pytest.approx(other["entropies"], abs=1e-4)
            assert row["log_probs"] == pytest.approx(other["log_probs"], abs=1e-4)
    assert with_pass[-1]["grad_norm"] > 0 and any(any(row["mask"]) for row in rows)
    compared = [["time/compare" in metrics for metrics in history] for history, *_ in (tensor, context)]
    assert compared == [[True] * STEPS, [True] + [False] * (STEPS - 1)], "the first step always compares"
    assert not any(name.startswith("rollout_mismatch") for metrics in context[0] for name in metrics)
    assert all(metrics["rollout_mismatch/mask"] == 0 and metrics["time/compare"] > 0 for metrics in tensor[0])
