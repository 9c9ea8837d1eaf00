"""The interface of roll-out engines: two engines that megafork does not have, a screen of code each, roll out for the real trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import import_vllm, on_ranks
from task import make_task, write_recipe
from tiny import save_model
from torch import Tensor

from megafork.model.attention import PackedSequences
from megafork.model.policy import HeadRequest, Policy
from megafork.parallel.mesh import Mesh, build_mesh
from megafork.recipe import Recipe
from megafork.recipe_file import load_recipe
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Completion, Ended, Engine, Request, Sampling
from megafork.rollout.serve import command
from megafork.rollout.vllm_arguments import engine_arguments
from megafork.shape import Shape
from megafork.train.engines import BuildEngine
from megafork.train.inputs import read_inputs
from megafork.train.loop import Trainer
from megafork.train.run import build_learner
from megafork.weights.policy_weights import export_policy
from megafork.weights.refit import Bridge

STEPS = 3
ENGINES: dict[str, EngineConfig] = {
    "plain": EngineConfig(model="m", dtype="fp32", longest_sequence=64, seed=7),
    "all else": EngineConfig(
        model="m",
        dtype="bf16",
        longest_sequence=64,
        seed=2**63 - 1,
        tp=2,
        max_running=5,
        gpu_memory_fraction=0.5,
        kv_cache_mb=16,
        fork_decoding=True,
        fp8=True,
    ),
}


class PolicyEngine(Engine):
    """Samples with the policy that trains: nothing to hand over, and log-probs that are the trainer's to the last bit."""

    rank, number, engines = 0, 0, 1

    def __init__(self, recipe: Recipe, mesh: Mesh, chunks: list[Policy], shape: Shape) -> None:
        [self.policy] = chunks
        self.vocab = shape.vocab

    def refit(self, version: int) -> None:
        self.version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling, ended: Ended | None = None) -> list[Completion]:
        assert sampling.forks is None and sampling.top_p == 1, "these engines cannot"
        with torch.no_grad():
            return [self._complete(request, sampling) for request in requests]

    def _complete(self, request: Request, sampling: Sampling) -> Completion:
        ids, start = torch.tensor(request.prompt), len(request.prompt)
        generator = torch.Generator().manual_seed(request.seed)
        while len(ids) < start + sampling.max_tokens and (len(ids) == start or int(ids[-1]) not in sampling.stop):
            last = torch.full((self.vocab,), len(ids) - 1)
            p = self._log_probs(ids, last, torch.arange(self.vocab), sampling.temperature).exp()
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)])
        written = self._log_probs(ids[:-1], torch.arange(start - 1, len(ids) - 1), ids[start:], sampling.temperature)
        tokens = ids[start:].tolist()
        return Completion(tokens, written.tolist(), tokens[-1] not in sampling.stop, [self.version] * len(tokens))

    def _log_probs(self, ids: Tensor, positions: Tensor, targets: Tensor, temperature: float) -> Tensor:
        request = HeadRequest(positions, targets, torch.full((len(targets),), temperature))
        packing = PackedSequences.of([len(ids)], ids.device)
        return self.policy(ids[None], None, None, labels=request, packed_seq_params=packing)[0]


class TransformersEngine(Engine):
    """A model of transformers in each rank, which takes its weights over by their Hugging Face names, whatever the trainer's layout."""

    rank = 0

    def __init__(self, recipe: Recipe, mesh: Mesh, chunks: list[Policy], shape: Shape) -> None:
        import transformers

        self.number, self.engines = mesh.rank, mesh.world
        self.bridge = Bridge(chunks, shape, mesh, rollout_tp=1)
        self.model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(recipe.model.path))

    def refit(self, version: int) -> None:
        self.model.load_state_dict(dict(self.bridge))
        self.version = version

    def refit_metrics(self) -> dict[str, float]:
        return self.bridge.metrics()

    def generate(self, requests: Sequence[Request], sampling: Sampling, ended: Ended | None = None) -> list[Completion]:
        assert sampling.forks is None and sampling.top_p == 1, "these engines cannot"
        with torch.no_grad():
            return [self._complete(request, sampling) for request in requests]

    def _complete(self, request: Request, sampling: Sampling) -> Completion:
        tokens: list[int] = []
        log_probs: list[float] = []
        generator = torch.Generator().manual_seed(request.seed)
        while len(tokens) < sampling.max_tokens and (not tokens or tokens[-1] not in sampling.stop):
            logits = self.model(torch.tensor([[*request.prompt, *tokens]])).logits[0, -1]
            log_prob = (logits / sampling.temperature).log_softmax(-1)
            tokens.append(int(torch.multinomial(log_prob.exp(), 1, generator=generator)))
            log_probs.append(float(log_prob[tokens[-1]]))
        return Completion(tokens, log_probs, tokens[-1] not in sampling.stop, [self.version] * len(tokens))


class BackgroundEngine(TransformersEngine):
    draws_in_background = True


def _train(build: BuildEngine, spec: Recipe) -> tuple[list[dict[str, Any]], Engine, dict[str, Tensor]]:
    """Each step's metrics, and the weights after the last."""
    mesh = build_mesh(spec.parallel, seed=spec.run.seed, device=torch.device("cpu"))
    inputs = read_inputs(spec, supervised=False)
    trainer = Trainer(spec, mesh, inputs, build_learner(inputs, spec, mesh, updates=STEPS), build)
    trainer.refit(0)
    history = [trainer.evaluate(0), *(trainer.step(step) for step in range(1, STEPS + 1))]
    trainer.close()
    return history, trainer.engine, dict(export_policy(trainer.learner.chunks, inputs.shape, mesh))


def _with_the_policy(spec: Recipe) -> list[dict[str, Any]]:
    return _train(PolicyEngine, spec)[0]


def _with_transformers(spec: Recipe) -> list[dict[str, Any]]:
    history, engine, weights = _train(TransformersEngine, spec)
    assert isinstance(engine, TransformersEngine)
    held = engine.model.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in weights.items()), "refitted after the last step"
    beside = _train(BackgroundEngine, spec)[0]
    clocks = ("time/", "throughput/", "memory/", "rollout/idle_share")
    for one, other in zip(history, beside, strict=True):
        assert all(one[name] == other[name] for name in one if not name.startswith(clocks))
    return history


@pytest.fixture
def spec(tmp_path: Path) -> Recipe:
    task = make_task(tmp_path, tie_word_embeddings=False)  # a tied one says again and again what it was told
    (task / "verifier.py").write_text("def score(response, row):\n    return float(response[:1] < '5')\n")
    rollout = {"prompts": 4, "max_response_length": 2, "dynamic_sampling": False}
    one_each = {"steps": STEPS, "micro_batch_tokens": 6}  # no two sequences fit into a micro-batch
    reward = {"verifier": f"{task}/verifier.py:score", "workers": 1}
    return load_recipe(write_recipe(task, rollout=rollout, train=one_each, reward=reward, data={"max_prompt_length": 4}))


def test_an_engine_that_is_the_policy_has_its_log_probs(spec: Recipe) -> None:
    [(before, *steps)] = on_ranks(1, _with_the_policy, spec)
    assert before["eval/errors"] == 0
    for metrics in steps:
        assert metrics["grad_norm"] > 0 and metrics["loss/policy"] != 0
        assert metrics["rollout_mismatch/max"] == 0 and metrics["staleness/max"] == 0
        assert not any(name.startswith("refit/") for name in metrics), "its engine has no such costs"


@pytest.mark.slow
def test_an_engine_of_transformers_follows_a_policy_split_over_ranks(spec: Recipe) -> None:
    spec = spec.model_copy(update={"parallel": spec.parallel.model_copy(update={"tp": 2})})
    for _, *steps in on_ranks(2, _with_transformers, spec):
        for metrics in steps:
            assert metrics["grad_norm"] > 0 and metrics["refit/received_mb"] > 0
            assert metrics["rollout_mismatch/max"] < 1e-5 and metrics["staleness/max"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("config", ENGINES.values(), ids=ENGINES)
def test_a_server_of_vllm_is_told_what_an_engine_in_the_ranks_is(config: EngineConfig, tmp_path: Path) -> None:
    """Its command line, as vLLM itself reads it."""
    import_vllm()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    config = replace(config, model=str(save_model(tmp_path / "m", "Qwen3Moe")))
    _, _, _, *words = command(config, "127.0.0.1", 8000)
    read = AsyncEngineArgs.from_cli_args(make_arg_parser(FlexibleArgumentParser()).parse_args(words))
    for name, value in engine_arguments(config, on_gpu=torch.cuda.is_available()).items():
        assert getattr(read, name) == value or (value is None and not getattr(read, name)), name
    assert 0 <= read.seed < 2**32, "numpy's limit"
