"""Chat messages as data sets write them, read into one form: a list of {"role", "content", ...} whose content is text."""

from __future__ import annotations

import re
from typing import Any

from megafork.data.plain_json import is_unicode, parse
from megafork.recipe import RecipeError

Message = dict[str, Any]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
}
"""ShareGPT's words."""
_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
_PICTURE = re.compile(r"<(image|video|audio)>")


class RowError(RecipeError):
    """What is wrong with one row; the message continues `FILE line N ...`."""


def read_messages(value: Any, column: str) -> list[Message]:
    """A prompt's text, as one user message; messages, or JSON text of them. Raises RowError, naming the column."""
    if isinstance(value, str) and _LIKE_MESSAGES.match(value):
        value = _from_text(value, column)
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise RowError(f'has a {column} that is neither text nor a list of {{"role": ..., "content": text}} messages: make it one of them')
    messages = [_message(message, column) for message in value]
    if not any(message.get("content", "").strip() for message in messages):
        raise RowError(f"has an empty {column}: fill it in, or delete the row")
    return messages


def plain(messages: list[Message]) -> str | list[Message]:
    """A single user message as its text, so that it works with every template."""
    return messages[0]["content"] if [message["role"] for message in messages] == ["user"] else messages


def split_last_turn(messages: list[Message]) -> tuple[list[Message], Message] | None:
    """The messages before the last of the assistant, and that one; what follows it is left out. None where there is none."""
    for place in reversed(range(len(messages))):
        if messages[place]["role"] == "assistant":
            return messages[:place], messages[place]
    return None


def checked_text(text: str, column: str) -> str:
    """The text itself. Raises RowError for what no tokenizer takes or no model writes."""
    if not is_unicode(text):
        raise RowError(f"has half of a surrogate pair in its {column} (such as \\ud83d for half an emoji): write whole characters")
    if "\0" in text:
        raise RowError(f"has a NUL character in its {column}: delete it")
    return text


def _from_text(text: str, column: str) -> Any:
    """Messages that a CSV or a data frame has turned into text; text that is no such thing stays as it is."""
    try:
        return parse(text)
    except ValueError:
        if text.rstrip().endswith("]"):  # Python's own notation, or cut out of something
            raise RowError(f"has a {column} that looks like chat messages but is not JSON: write them as a list, or as JSON text") from None
        return text


def _message(message: dict[str, Any], column: str) -> Message:
    message = _without_nulls(message)
    if "from" in message and "value" in message and "role" not in message:
        message = {"role": message.pop("from"), "content": message.pop("value"), **message}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise RowError(f'has a {column} with a message without a role: each is {{"role": ..., "content": text}}')
    message["role"] = _ROLES.get(role, role)
    if isinstance(content, list):
        content = message["content"] = "".join(_text_of(part, column) for part in content)
    if content is None and message.get("tool_calls"):
        return message  # a template may print these alone
    if not isinstance(content, str):
        raise RowError(f"has a {column} with a message of the {role} whose content is neither text nor parts of text: make it text")
    checked_text(content, column)
    return message


def _text_of(part: Any, column: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        return part["text"]
    what = f"of type {kind!r}" if isinstance(kind, str) and kind != "text" else "without a text"
    raise RowError(f"has a {column} with a part {what}: megafork reads text alone, delete the part or the row")


def refuse_pictures(raw: dict[str, Any], messages: list[Message]) -> None:
    """Raise RowError where the text has a mark for a picture that lies in another column: without it there is nothing to answer."""
    marks = {match for message in messages for match in _PICTURE.findall(message.get("content", ""))}
    for mark in marks:
        if raw.get(mark) or raw.get(mark + "s"):
            raise RowError(f"has a <{mark}> in its prompt and its column {mark}: megafork reads text alone, delete the row")


def _without_nulls(value: Any) -> Any:
    """Arrow gives every message of a column the keys of all of them, null where a message has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
