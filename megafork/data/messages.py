"""Converts chat messages from the forms used by data sets to a list of {"role", "content", ...} whose content is text."""

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
"""ShareGPT's role names."""
_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
_PICTURE = re.compile(r"<(image|video|audio)>")


class RowError(RecipeError):
    """An invalid row; the message continues `FILE line N ...`."""


def read_messages(value: Any, column: str) -> list[Message]:
    """Read plain text (as one user message), messages, or JSON text of messages. Raises RowError, naming the column."""
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
    """Reduce a single user message to its text, so that it works with every template."""
    return messages[0]["content"] if [message["role"] for message in messages] == ["user"] else messages


def split_last_turn(messages: list[Message]) -> tuple[list[Message], Message] | None:
    """The messages before the assistant's last message, and that message; later ones are dropped. None if there is none."""
    for place in reversed(range(len(messages))):
        if messages[place]["role"] == "assistant":
            return messages[:place], messages[place]
    return None


def checked_text(text: str, column: str) -> str:
    """Return the text. Raises RowError for characters that no tokenizer accepts or no model writes."""
    if not is_unicode(text):
        raise RowError(f"has half of a surrogate pair in its {column} (such as \\ud83d for half an emoji): write whole characters")
    if "\0" in text:
        raise RowError(f"has a NUL character in its {column}: delete it")
    return text


def _from_text(text: str, column: str) -> Any:
    """Decode messages that a CSV or a data frame has turned into text; other text is returned as it is."""
    try:
        return parse(text)
    except ValueError:
        if text.rstrip().endswith("]"):  # Python's notation, or truncated JSON
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
        return message  # a template may render the calls without content
    if not isinstance(content, str):
        raise RowError(f"has a {column} with a {role} message whose content is neither text nor text parts: make it text")
    checked_text(content, column)
    return message


def _text_of(part: Any, column: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        return part["text"]
    what = f"of type {kind!r}" if isinstance(kind, str) and kind != "text" else "without text"
    raise RowError(f"has a {column} with a part {what}: megafork reads only text, delete the part or the row")


def refuse_pictures(raw: dict[str, Any], messages: list[Message]) -> None:
    """Raise RowError if the text has a placeholder for a picture in another column: without it the prompt can't be answered."""
    marks = {match for message in messages for match in _PICTURE.findall(message.get("content", ""))}
    for mark in marks:
        if raw.get(mark) or raw.get(mark + "s"):
            raise RowError(f"has a <{mark}> in its prompt and a column for it: megafork reads only text, delete the row")


def _without_nulls(value: Any) -> Any:
    """Remove null values: Arrow gives every message of a column the keys of all messages, null where it had none."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
