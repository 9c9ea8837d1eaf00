"""JSON that rows are made of: parsed, and refused where its values could not travel on to tokenizers, verifiers and files."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 64
"""Levels of lists and objects inside each other. Python's own parsers give up at some hundreds, at another depth in every process."""


def parse(text: str) -> Any:
    """The value that `text` says. Raises ValueError with the reason: not JSON, nested too deeply, or half of a surrogate pair in it."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > DEEPEST and _too_deep(value):
        raise ValueError("nested too deeply")
    if "\\ud" in text.lower() and not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise ValueError("half of a surrogate pair, such as \\ud83d for half an emoji")
    return value


def is_unicode(text: str) -> bool:
    """Whether it can be written at all: JSON's escapes can name halves of characters, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [part for parts in inner for part in parts]
        if not level:
            return False
    return True
