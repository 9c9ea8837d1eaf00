"""The data of a run: its prompts, and how responses to them are judged."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from megafork.recipe.kinds import Key, Megabytes, RecipeError, Seconds, Section, Tokens

Source = str | list[str]
Meaning = Literal["prompt", "answer", "response"]


def listed(source: Source | None) -> list[str]:
    """The sources as a list; a single source may be given without one."""
    return [source] if isinstance(source, str) else source or []


class Data(Section):
    train: Source
    """Prompts to train on: a .jsonl, .json or .parquet file, a folder or a glob of them, `hub:NAME[@SUBSET][:SPLIT]` for a Hugging Face
    dataset (`hub:openai/gsm8k@main:test`), `reasoning_gym:TASK[:SIZE[:SEED]]` for generated tasks, or a list of these."""
    eval: Source | None = None
    """Held-out prompts, in the same formats as `train`. Prompts that are also training prompts are left out, and repeats count once. Unset:
    no evaluation."""
    columns: dict[Meaning, str] = Field(default={})
    """Column of each field, as `{prompt: problem, answer: reward_model.ground_truth}`, for columns not recognised by name (docs/data.md).
    Held-out rows that lack the column are read by the usual names."""
    template: str | None = None
    """Text with `{prompt}` in which each prompt is inserted. `chat` applies the tokenizer's chat template. Unset: the prompt as it is."""
    chat_template_args: dict[str, JsonValue] = Field(default={})
    """Variables for the chat template, as `{enable_thinking: false}`. Only with `template: chat`, and only those that it reads."""
    add_bos: Literal["auto"] | bool = "auto"
    """Begin each prompt with the beginning-of-sequence token, never twice. `auto`: as the tokenizer begins raw text, or, with
    `template: chat`, as the chat template does."""
    max_prompt_length: Tokens = 2048
    """Maximum tokens in a prompt, template included."""
    overlong_prompts: Literal["refuse", "drop"] = "refuse"
    """A longer prompt stops the run before it starts (`refuse`), or is dropped and counted."""
    deduplicate: bool = True
    """Drop training rows that repeat a prompt; in sft, a prompt with its response (DAPO-Math's public file repeats rows)."""

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if self.eval is not None and _paths(self.eval) == _paths(self.train):
            raise ValueError(f"data.eval is {self.eval!r}, the same as data.train: hold out other prompts, or leave data.eval unset")
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
    """Reward of a wrong and of a right response."""
    timeout_s: Seconds = 10.0
    """Time limit of one verdict in seconds. Beyond it: scored 0, counted and reported."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Verifier processes per rank."""
    isolation: Literal["full", "process"] | None = None
    """`full`: verifiers run in a sandbox without network, and each evaluated response in a separate process. `process`: no sandbox; your
    own `FILE.py:FUNCTION` is then trusted: one process judges many items, with network and files, as an LLM judge needs. Unset: full if
    this machine supports it (`megafork doctor` reports this), otherwise no sandbox (docs/verifiers.md)."""
    memory_mb: Megabytes = 2048
    """Memory limit for judging one item, in MB. Beyond it: scored 0, counted and reported."""
    test_timeout_s: Seconds = 4.0
    """Limit of one test under `verifier: code`, in seconds of processor time; four times that in wall time. Beyond it the test fails."""
    partial: bool = False
    """Under `verifier: code`, accuracy is the share of passed tests. If false: 1 if all passed, else 0."""
    overlong: Literal["shaping", "filter", "none"] = "shaping"
    """Long responses: a penalty growing over the last `overlong_buffer` tokens, no loss on truncated ones, or no change."""
    overlong_buffer: Tokens = 4096
    """Number of tokens before max_response_length over which the penalty grows from 0 to -1."""

    @model_validator(mode="after")
    def _partial_has_tests(self) -> Reward:
        if self.partial and self.verifier != "code":
            raise ValueError(f"reward.partial is true but reward.verifier is {self.verifier!r}: only `code` has tests; leave it out")
        return self


def _paths(source: Source) -> list[str]:
    return [os.path.abspath(os.path.expanduser(one)) for one in listed(source)]
