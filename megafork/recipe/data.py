"""What a run learns from: prompts, and what judges the responses to them."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from megafork.recipe.kinds import Key, Megabytes, RecipeError, Seconds, Section, Tokens

Source = str | list[str]
Meaning = Literal["prompt", "answer", "response"]


def listed(source: Source | None) -> list[str]:
    """Each of the sources; one alone needs no list."""
    return [source] if isinstance(source, str) else source or []


class Data(Section):
    train: Source
    """Prompts to train on: a .jsonl, .json or .parquet file, a folder or a glob of them, `hub:NAME[@SUBSET][:SPLIT]` for a Hugging Face
    one (`hub:openai/gsm8k@main:test`), `reasoning_gym:TASK[:SIZE[:SEED]]` for generated tasks, or a list of these."""
    eval: Source | None = None
    """Held-out prompts, same forms as `train`. Those that are training prompts too are left out, and repeats count once. Empty: no
    evaluation."""
    columns: dict[Meaning, str] = Field(default={})
    """Which column holds what, as `{prompt: problem, answer: reward_model.ground_truth}`, where their names do not tell (docs/data.md).
    Held-out rows that lack the column are read by the usual names."""
    template: str | None = None
    """Text with `{prompt}` that each prompt is put into. `chat` applies the tokenizer's chat template. Empty: the prompt as it is."""
    chat_template_args: dict[str, JsonValue] = Field(default={})
    """Variables for the chat template, as `{enable_thinking: false}`. Only with `template: chat`, and only those that it reads."""
    add_bos: Literal["auto"] | bool = "auto"
    """Begin each prompt with the beginning-of-sequence token, never twice. `auto`: as the tokenizer begins raw text, and with
    `template: chat` as the chat template says."""
    max_prompt_length: Tokens = 2048
    """Tokens of a prompt at most, template included."""
    overlong_prompts: Literal["refuse", "drop"] = "refuse"
    """A longer prompt stops the run before it starts, or is left out and counted."""
    deduplicate: bool = True
    """Drop training rows whose prompt occurred before, for sft whose prompt and response did (DAPO-Math's public file repeats rows)."""

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if self.eval is not None and _paths(self.eval) == _paths(self.train):
            raise ValueError(f"data.eval is {self.eval!r}, the same as data.train: hold other prompts out, or leave data.eval empty")
        for name, source in (("train", self.train), ("eval", self.eval)):
            if source in ("", []):
                raise ValueError(f"data.{name} is {source!r}: name a file, a folder, a hub: or a reasoning_gym: source")
        if self.chat_template_args and self.template != "chat":
            raise RecipeError(
                Key("data.chat_template_args"),
                f" is {self.chat_template_args} but ",
                Key("data.template"),
                f" is {self.template!r}: only ",
                Key("data.template"),
                "=chat reads them",
            )
        return self


class Reward(Section):
    verifier: str = "math"
    r"""`exact` (stripped text equal), `math` (math-verify on the last \boxed{} after </think>), `reasoning_gym` (the task's own
    scorer), `code` (the last fenced block, run against the row's tests; docs/verifiers.md), or `FILE.py:FUNCTION` called as
    f(response_text, row) -> accuracy in [0, 1]."""
    scale: Literal["0/1", "+-1"] = "0/1"
    """Reward of a wrong and a right response."""
    timeout_s: Seconds = 10.0
    """Seconds one verdict may take. Over it: scored 0, counted and reported."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Verifier processes a rank."""
    isolation: Literal["full", "process"] | None = None
    """`full`: verifiers run in a sandbox without network, and what a model wrote in a process for that item alone. `process`: without a
    sandbox; a `FILE.py:FUNCTION` of your own is then trusted: one process for many items, with network and files, as a judge that is a
    language model needs it. Unset: full where this machine can (`megafork doctor` says), else without a sandbox (docs/verifiers.md)."""
    memory_mb: Megabytes = 2048
    """Memory that judging one item may take, in MB. Over it: scored 0, counted and reported."""
    test_timeout_s: Seconds = 4.0
    """Processor seconds that one test may take under `verifier: code`, and four times as many by the clock. Over it the test has failed."""
    partial: bool = False
    """Under `verifier: code`: the share of the tests that passed. Otherwise 1 if all passed, and 0."""
    overlong: Literal["shaping", "filter", "none"] = "shaping"
    """Long responses: a penalty growing over the last `overlong_buffer` tokens, no loss on truncated ones, or nothing."""
    overlong_buffer: Tokens = 4096
    """Tokens before max_response_length over which the penalty grows from 0 to -1."""

    @model_validator(mode="after")
    def _partial_has_tests(self) -> Reward:
        if self.partial and self.verifier != "code":
            raise ValueError(f"reward.partial is true but reward.verifier is {self.verifier!r}: only `code` has tests; leave it out")
        return self


def _paths(source: Source) -> list[str]:
    return [os.path.abspath(os.path.expanduser(one)) for one in listed(source)]
