"""Parses the JSON of rows, refusing values that could not be passed on to tokenizers, verifiers and files."""

from __future__ import annotations

import json
from typing import Any

from megafork.repeated import repeated

DEEPEST = 64
"""Most nested levels of lists and objects. Python's own parsers fail after some hundreds, at a depth that varies between processes."""


def parse(text: str) -> Any:
    """Parse `text`. Raises ValueError with the reason: not JSON, nested too deeply, with a key twice in one object, of which Python would
    keep the last, or containing half of a surrogate pair."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > DEEPEST and _too_deep(value):
        raise ValueError("nested too deeply")
    if "\\ud" in text.lower() and not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise ValueError("half of a surrogate pair, such as \\ud83d for half an emoji")
    return value


def is_unicode(text: str) -> bool:
    """Whether text can be encoded: JSON's escapes can name halves of surrogate pairs, which no encoding can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated([name for name, _ in pairs])) is not None:
        raise ValueError(f"the key {twice!r:.60} is there twice")
    return dict(pairs)


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [part for parts in inner for part in parts]
        if not level:
            return False
    return True
