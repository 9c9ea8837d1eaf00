"""What a run learns from: prompts, and what judges the responses to them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from megafork.recipe.kinds import Count, Positive, Section


class Data(Section):
    train: str
    """Prompts to train on: a .jsonl or .parquet file, `hub:NAME[@SUBSET][:SPLIT]` for a Hugging Face one (`hub:openai/gsm8k@main:test`),
    or `reasoning_gym:TASK[:SIZE[:SEED]]` for generated tasks."""
    eval: str | None = None
    """Held-out prompts, same forms as `train`. Empty: no evaluation."""
    template: str | None = None
    """Text with `{prompt}` that each prompt is put into. `chat` applies the tokenizer's chat template. Empty: the prompt as it is."""
    max_prompt_length: Count = 2048
    """Tokens. A longer prompt stops the run before it starts."""
    deduplicate: bool = True
    """Drop rows whose prompt occurred before (DAPO-Math's public file repeats rows)."""

    @model_validator(mode="after")
    def _held_out(self) -> Data:
        if self.eval is not None and Path(self.eval).resolve() == Path(self.train).resolve():
            raise ValueError(f"data.eval is {self.eval!r}, the same as data.train: hold other prompts out, or leave data.eval empty")
        return self


class Reward(Section):
    verifier: str = "math"
    r"""`exact` (stripped text equal), `math` (math-verify on the last \boxed{} after </think>), `reasoning_gym` (the task's own
    scorer), `code` (the last fenced block, run against the row's tests; docs/verifiers.md), or `FILE.py:FUNCTION` called as
    f(response_text, row) -> accuracy in [0, 1]."""
    scale: Literal["0/1", "+-1"] = "0/1"
    """Reward of a wrong and a right response."""
    timeout_s: Positive = 10.0
    """Seconds one verdict may take. Over it: scored 0, counted and reported."""
    workers: Count = 1
    """Verifier processes a rank."""
    isolation: Literal["full", "process"] | None = None
    """`full`: verifiers run in a sandbox without network, and what a model wrote in a process for that item alone. `process`: without a
    sandbox; a `FILE.py:FUNCTION` of your own is then trusted: one process for many items, with network and files, as a judge that is a
    language model needs it. Unset: full where this machine can (`megafork doctor` says), else without a sandbox (docs/verifiers.md)."""
    memory_mb: Count = 2048
    """Memory that judging one item may take, in MB. Over it: scored 0, counted and reported."""
    test_timeout_s: Positive = 4.0
    """Processor seconds that one test may take under `verifier: code`, and four times as many by the clock. Over it the test has failed."""
    partial: bool = False
    """Under `verifier: code`: the share of the tests that passed. Otherwise 1 if all passed, and 0."""
    overlong: Literal["shaping", "filter", "none"] = "shaping"
    """Long responses: a penalty growing over the last `overlong_buffer` tokens, no loss on truncated ones, or nothing."""
    overlong_buffer: Count = 4096
    """Tokens before max_response_length over which the penalty grows from 0 to -1."""

    @model_validator(mode="after")
    def _partial_has_tests(self) -> Reward:
        if self.partial and self.verifier != "code":
            raise ValueError(f"reward.partial is true but reward.verifier is {self.verifier!r}: only `code` has tests; leave it out")
        return self
