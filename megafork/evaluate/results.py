"""Judges completions and summarises them into an evaluation's results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from megafork.data.reward import Verifiers
from megafork.data.tokenizer import Tokenizer
from megafork.evaluate.inputs import EvaluationInputs
from megafork.evaluate.judge import Answered, Judged, judge
from megafork.evaluate.metrics import estimate, majority_at, pass_at
from megafork.files import whole
from megafork.rollout.engine import Sampling
from megafork.rollout.sample import SampleJob
from megafork.rollout.store import prompt_key

Results = dict[str, Any]


def judge_responses(inputs: EvaluationInputs) -> Results:
    """Judge and summarise the stored completions, all of `inputs.job()`, and write `results-*.json` next to them.

    {"model", "digest", ..., "file", "results": [one object per decoding and benchmark: "decoding", "benchmark", "problems", "samples",
    "avg@N", "pass@k", "maj@k", "length" (tokens), "truncated", "unanswered" each {"mean", "low", "high"}, "errors", "first_error",
    "by_problem" (each problem's avg@N)]}.
    """
    options, job = inputs.options, inputs.job()
    rows = []
    with Verifiers(inputs.reward) as verifiers:
        for decoding in options.decodings:
            responses = _responses(job, inputs.sampling(decoding), inputs.tokenizer)
            for benchmark in inputs.benchmarks:
                given = [responses[prompt_key(problem.tokens)] for problem in benchmark.problems]
                judged = judge(benchmark.problems, given, verifiers, options.verifier)
                rows.append({"decoding": str(decoding), "benchmark": benchmark.name, **summary(judged, options.counts)})
    settings = dataclasses.asdict(options) | {"max_tokens": inputs.max_tokens, "dtype": inputs.dtype, "digest": inputs.digest}
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    file = inputs.folder / f"results-{name}.json"
    results = {**settings, "file": str(file), "results": rows}
    with whole(file) as unfinished:
        unfinished.write_text(json.dumps(results, indent=1) + "\n")
    return results


def failure(results: Results) -> str | None:
    """One line where the verifier failed on every response to a benchmark, so that its numbers mean nothing; None otherwise."""
    for row in results["results"]:
        if row["errors"] == row["problems"] * row["samples"]:
            return (
                f"the verifier failed on all {row['errors']} responses to {row['benchmark']} "
                f"({row['first_error']}): fix --verifier, or the "
                "rows that it reads; the responses are kept"
            )
    return None


def _responses(job: SampleJob, sampling: Sampling, tokenizer: Tokenizer) -> dict[str, list[Answered]]:
    """Each prompt's responses, in the order of the samples; there may be more than requested. Texts are decoded from the tokens, as those
    stored by an older version lacked special tokens."""
    samples = range(job.samples)
    stored = {
        (row["prompt"], row["sample"]): Answered(tokenizer.decode(row["tokens"]), len(row["tokens"]), row["truncated"])
        for row in job.store(sampling).rows()
        if row["prompt"] in job.prompts and row["sample"] in samples
    }
    return {prompt: [stored[prompt, sample] for sample in samples] for prompt in job.prompts}


def summary(judged: Sequence[Judged], counts: Iterable[int]) -> dict[str, Any]:
    """A benchmark's metrics, each a mean over problems with the interval of `metrics.estimate`."""
    samples = len(judged[0].accuracies)
    values = {f"avg@{samples}": [_mean(one.accuracies) for one in judged]}
    for k in counts:
        values[f"pass@{k}"] = [pass_at(one.accuracies, k) for one in judged]
        values[f"maj@{k}"] = [majority_at(one.accuracies, one.votes, k) for one in judged]
    values["length"] = [_mean(one.lengths) for one in judged]
    values["truncated"] = [_mean(one.truncated) for one in judged]
    values["unanswered"] = [_mean([vote is None for vote in one.votes]) for one in judged]
    errors = [error for one in judged for error in one.errors]
    return {
        "problems": len(judged),
        "samples": samples,
        **{name: dataclasses.asdict(estimate(each)) for name, each in values.items()},
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "by_problem": values[f"avg@{samples}"],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
