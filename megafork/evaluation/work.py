"""What an evaluation works on: the model, its tokenizer and the benchmarks, checked against each other. No ranks needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megafork.data import reward as verifiers
from megafork.data.templates import template_text
from megafork.data.tokenizer import Tokenizer
from megafork.evaluation.benchmarks import Benchmark, load_benchmarks
from megafork.evaluation.settings import Decoding, Settings
from megafork.recipe import Recipe, Reward
from megafork.recipe_file import data_of_options
from megafork.rollout.engine import Sampling
from megafork.rollout.sample import LONGEST_PROMPT, SampleJob, response_limit
from megafork.rollout.store import prompt_key
from megafork.shape import check_rollout_tp
from megafork.weights.named import NamedModel, as_options, find_model


@dataclass(frozen=True)
class Work:
    """An evaluation's inputs, checked against each other."""

    settings: Settings
    model: NamedModel
    digest: str
    tokenizer: Tokenizer
    benchmarks: list[Benchmark]
    reward: Reward
    max_tokens: int
    dtype: str
    remarks: list[str]
    """What of the benchmarks does not count, a line each."""

    @property
    def folder(self) -> Path:
        """Of the model's completions and results."""
        return Path(self.settings.out) / self.digest

    def sampling(self, decoding: Decoding) -> Sampling:
        temperature = 1.0 if decoding.forks else decoding.temperature
        return Sampling(self.max_tokens, temperature, decoding.top_p, stop=self.tokenizer.eos_ids, forks=decoding.forks)

    def job(self) -> SampleJob:
        """The completions that it needs."""
        settings = self.settings
        prompts = {prompt_key(problem.tokens): problem.tokens for benchmark in self.benchmarks for problem in benchmark.problems}
        recipe = Recipe.model_validate(
            {
                "run": {"seed": settings.seed},
                "model": {"path": str(self.model.folder)},
                "data": {"train": self.benchmarks[0].source, "max_prompt_length": max(map(len, prompts.values()))},
                "rollout": {
                    "max_response_length": self.max_tokens,
                    "tp": settings.tp,
                    "kv_cache_mb": settings.kv_cache_mb,
                    "gpu_memory_fraction": settings.gpu_memory_fraction,
                    "max_running": settings.max_running,
                },
                "reward": self.reward.model_dump(),
                "precision": {"dtype": self.dtype},
            }
        )
        return SampleJob(recipe, prompts, settings.samples, tuple(map(self.sampling, settings.decodings)), self.folder)


@as_options()
def prepare(settings: Settings) -> Work:
    """Read and check model, tokenizer, verifier and benchmarks; starts nothing. Raises RecipeError."""
    model = find_model(settings.model)
    shape = model.check()
    check_rollout_tp(shape, settings.tp)
    tokenizer = model.tokenizer()
    reward = Reward(verifier=settings.verifier, workers=settings.workers or min(os.cpu_count() or 1, 8), overlong="none")
    verifiers.check(reward)
    remarks: list[str] = []
    data = data_of_options(
        settings.benchmarks[0],
        LONGEST_PROMPT,
        template_text(settings.template, tokenizer),
        settings.columns,
        settings.chat_template_args,
        settings.add_bos,
    )
    benchmarks = load_benchmarks(settings.benchmarks, data, limit=settings.limit, reward=reward, tokenizer=tokenizer, remark=remarks.append)
    longest = max(len(problem.tokens) for benchmark in benchmarks for problem in benchmark.problems)
    return Work(
        settings=settings,
        model=model,
        digest=model.digest(),
        tokenizer=tokenizer,
        benchmarks=benchmarks,
        reward=reward,
        max_tokens=response_limit(settings.max_tokens, shape, longest),
        dtype=settings.dtype or model.dtype,
        remarks=remarks,
    )
