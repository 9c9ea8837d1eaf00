"""What an evaluation works on: the model, its tokenizer and the benchmarks, checked against each other. No ranks needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megafork.convert.named import AS_OPTIONS, NamedModel, find_model
from megafork.data import reward as verifiers
from megafork.data.templates import template_text
from megafork.data.tokenizer import Tokenizer
from megafork.evaluate.benchmarks import Benchmark, load_benchmarks
from megafork.evaluate.options import Decoding, EvaluationOptions
from megafork.recipe import Recipe, Reward, calling
from megafork.recipe_file import data_of_options
from megafork.rollout.engine import Sampling
from megafork.rollout.sample import LONGEST_PROMPT, SampleJob, response_limit
from megafork.rollout.store import prompt_key
from megafork.shape import check_rollout_tp


@dataclass(frozen=True)
class EvaluationInputs:
    """An evaluation's inputs, checked against each other."""

    options: EvaluationOptions
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
        return Path(self.options.out) / self.digest

    def sampling(self, decoding: Decoding) -> Sampling:
        temperature = 1.0 if decoding.forks else decoding.temperature
        return Sampling(self.max_tokens, temperature, decoding.top_p, stop=self.tokenizer.eos_ids, forks=decoding.forks)

    def job(self) -> SampleJob:
        """The completions that it needs."""
        options = self.options
        prompts = {prompt_key(problem.tokens): problem.tokens for benchmark in self.benchmarks for problem in benchmark.problems}
        recipe = Recipe.model_validate(
            {
                "run": {"seed": options.seed},
                "model": {"path": str(self.model.folder)},
                "data": {"train": self.benchmarks[0].source, "max_prompt_length": max(map(len, prompts.values()))},
                "rollout": {
                    "max_response_length": self.max_tokens,
                    "tp": options.tp,
                    "kv_cache_mb": options.kv_cache_mb,
                    "gpu_memory_fraction": options.gpu_memory_fraction,
                    "max_running": options.max_running,
                },
                "reward": self.reward.model_dump(),
                "precision": {"dtype": self.dtype},
            }
        )
        return SampleJob(recipe, prompts, options.samples, tuple(map(self.sampling, options.decodings)), self.folder)


@calling(AS_OPTIONS)
def read_inputs(options: EvaluationOptions) -> EvaluationInputs:
    """Read and check model, tokenizer, verifier and benchmarks; starts nothing. Raises RecipeError."""
    model = find_model(options.model)
    shape = model.check()
    check_rollout_tp(shape, options.tp)
    tokenizer = model.tokenizer()
    reward = Reward(verifier=options.verifier, workers=options.workers or min(os.cpu_count() or 1, 8), overlong="none")
    verifiers.check_verifier(reward)
    remarks: list[str] = []
    data = data_of_options(
        options.benchmarks[0],
        LONGEST_PROMPT,
        template_text(options.template, tokenizer),
        options.columns,
        options.chat_template_args,
        options.add_bos,
    )
    benchmarks = load_benchmarks(options.benchmarks, data, limit=options.limit, reward=reward, tokenizer=tokenizer, remark=remarks.append)
    longest = max(len(problem.tokens) for benchmark in benchmarks for problem in benchmark.problems)
    return EvaluationInputs(
        options=options,
        model=model,
        digest=model.digest(),
        tokenizer=tokenizer,
        benchmarks=benchmarks,
        reward=reward,
        max_tokens=response_limit(options.max_tokens, shape, longest),
        dtype=options.dtype or model.dtype,
        remarks=remarks,
    )
