"""A response with a program in it, and a reward that judges it."""

from __future__ import annotations

from megafork.recipe import Reward

ADD = "a, b = map(int, input().split())\nprint(a + b)"


def fenced(source: str) -> str:
    return f"<think>\n```python\nprint(0)\n```\n</think>So:\n```python\n{source}\n```\nDone."


def reward(**keys: object) -> Reward:
    return Reward.model_validate({"verifier": "code", "test_timeout_s": 1.0, "timeout_s": 20.0, **keys})
