"""Inputs of an evaluation: the model, its tokenizer and the benchmarks, checked against each other. No ranks needed."""

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
from megafork.recipe import Reward, calling
from megafork.recipe_file import data_of_options
from megafork.rollout.config import EngineConfig
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
    """Lines about benchmark rows that are not counted."""

    @property
    def folder(self) -> Path:
        """Folder of the model's completions and results."""
        return Path(self.options.out) / self.digest

    def sampling(self, decoding: Decoding) -> Sampling:
        temperature = 1.0 if decoding.forks else decoding.temperature
        return Sampling(self.max_tokens, temperature, decoding.top_p, stop=self.tokenizer.eos_ids, forks=decoding.forks)

    def job(self) -> SampleJob:
        """The completions that the evaluation needs."""
        options = self.options
        prompts = {prompt_key(problem.tokens): problem.tokens for benchmark in self.benchmarks for problem in benchmark.problems}
        engine = EngineConfig(
            model=str(self.model.folder),
            dtype=self.dtype,
            longest_sequence=max(map(len, prompts.values())) + self.max_tokens,
            seed=options.seed,
            tp=options.tp,
            max_running=options.max_running,
            gpu_memory_fraction=options.gpu_memory_fraction,
            kv_cache_mb=options.kv_cache_mb,
            fork_decoding=any(decoding.forks for decoding in options.decodings),
        )
        return SampleJob(engine, prompts, options.samples, tuple(map(self.sampling, options.decodings)), self.folder)


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
    data = data_of_options(options.benchmarks[0], LONGEST_PROMPT, template_text(options.template, tokenizer), options)
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
