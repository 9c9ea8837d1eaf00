"""What a run learns from: prompts, and what judges the responses to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megafork.recipe.kinds import Seconds, Section, Tokens


class Data(Section):
    train: str
    """Prompts to train on: a .jsonl or .parquet file, `hub:NAME[@SUBSET][:SPLIT]` for a Hugging Face one (`hub:openai/gsm8k@main:test`),
    or `reasoning_gym:TASK[:SIZE[:SEED]]` for generated tasks."""
    eval: str | None = None
    """Held-out prompts, same forms as `train`. Empty: no evaluation."""
    template: str | None = None
    """Text with `{prompt}` that each prompt is put into. `chat` applies the tokenizer's chat template. Empty: the prompt as it is."""
    max_prompt_length: Tokens = 2048
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
    scorer), or `FILE.py:FUNCTION` called as f(response_text, row) -> accuracy in [0, 1]."""
    scale: Literal["0/1", "+-1"] = "0/1"
    """Reward of a wrong and a right response."""
    timeout_s: Seconds = 10.0
    """Seconds one verdict may take. Over it: scored 0, counted and reported."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Verifier processes a rank."""
    overlong: Literal["shaping", "filter", "none"] = "shaping"
    """Long responses: a penalty growing over the last `overlong_buffer` tokens, no loss on truncated ones, or nothing."""
    overlong_buffer: Tokens = 4096
    """Tokens before max_response_length over which the penalty grows from 0 to -1."""
