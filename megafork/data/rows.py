"""Reads rows for train, sft, eval and analyze alike: finds the columns of the prompt, the answer and the response, and their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megafork.data.answers import answer_text, is_absent, solution_text
from megafork.data.messages import (
    Message,
    RowError,
    checked_text,
    plain,
    read_messages,
    refuse_pictures,
    split_last_turn,
)
from megafork.data.plain_json import parse
from megafork.recipe import Key
from megafork.recipe.data import Meaning

Row = dict[str, Any]
Columns = Mapping[Meaning, str]

_COLUMNS = Key("data.columns")
_CHATS = ("messages", "conversations")
_PROMPTS = ("prompt", "question", "problem", "query", *_CHATS, "instruction")
_ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth", "reward_model.ground_truth")
_RESPONSES = ("response", "completion", "generated_solution")
_PAIRS = ("instruction", "input")
"""Prompt columns that go with an `output` column for the answer or the response."""


def read_row(raw: Row, needs: Sequence[str], columns: Columns, *, everywhere: bool = True) -> Row:
    """The row with its `prompt` (text, or messages that only a chat template can join) and the fields in `needs`.

    "answer": text for the built-in verifiers (`answer_text`); "response": the text to train on; "metadata": reasoning-gym's. Without
    "answer" in `needs`, `answer` is the row's own value unchanged. `columns`: the recipe's `data.columns`; unless `everywhere`, a row
    without one of them is read by the usual names. Raises RowError, also if two columns that qualify disagree.
    """
    other = "answer" if "response" in needs else "response"  # not used here
    columns = _named(raw, {meaning: name for meaning, name in columns.items() if meaning != other}, everywhere)
    if "response" in needs:
        prompt, response = _supervised(raw, columns)
        return {**raw, "prompt": prompt, "response": response}
    column, messages = _prompt(raw, columns)
    row = {**raw, "prompt": plain(messages)}
    if "metadata" in needs:
        row["metadata"] = _metadata(raw)
        row["answer"] = _generated_answer(raw.get("answer"))
    elif "answer" in needs:
        row["answer"] = _answer(raw, columns, column)
    else:
        row["answer"] = next((value for _, value in _answers(raw, columns, column)), None)
    return row


def _named(raw: Row, columns: Columns, everywhere: bool) -> dict[Meaning, str]:
    """The entries of `columns` that this row has."""
    present = {meaning: name for meaning, name in columns.items() if _find(raw, name) is not _NOTHING}
    for meaning, name in columns.items():
        if meaning not in present and everywhere:
            raise RowError(f"has no column {name!r}, which ", _COLUMNS, f".{meaning} names ({_fields(raw)}): name one that it has")
    return present


# ---------------------------------------------------------------- prompts


def _prompt(raw: Row, columns: Columns) -> tuple[str, list[Message]]:
    """The column of the prompt, and its messages, without a last turn of the assistant."""
    found = {name: _asked(raw, name) for name in _prompt_columns(raw, columns)}
    (column, messages), *others = found.items()
    text = _text(messages)
    _refuse_unasked(raw, column, text)
    for other, its in others:
        if _text(its).strip() not in text:  # `prompt` may wrap the text of `problem`
            raise RowError(
                f'has a "{column}" and a "{other}" that differ: name the prompt\'s column in ',
                _COLUMNS,
                ', or rename it to "prompt" and delete the other',
            )
    return column, messages


def _refuse_unasked(raw: Row, column: str, text: str) -> None:
    """Raise RowError for a multiple-choice question whose choices are only in a column of their own, as MMLU's."""
    for name in ("choices", "options"):
        choices = raw.get(name)
        choices = choices.get("text") if isinstance(choices, dict) else choices
        if isinstance(choices, list) and choices and all(isinstance(one, str) and one.strip() not in text for one in choices):
            raise RowError(f"has {name} that its {column} does not mention: write them into it, or delete them")


def _prompt_columns(raw: Row, columns: Columns) -> list[str]:
    """Columns that may hold the prompt, most likely first. Raises RowError if there are none."""
    if "prompt" in columns:
        return [columns["prompt"]]
    present = [name for name in _PROMPTS if isinstance(raw.get(name), str | list) and not is_absent(raw[name])]
    present = present or [name for name in ("input",) if isinstance(raw.get(name), str) and raw[name].strip()]
    if present:
        return present
    named = [name for name in (*_PROMPTS, "input") if raw.get(name) is not None]
    if named:
        return named[:1]  # reading it raises the specific error
    raise RowError(f'has no prompt ({_fields(raw)}): give it a "prompt", or name the prompt\'s column in ', _COLUMNS)


def _asked(raw: Row, column: str) -> list[Message]:
    """The messages up to the point where the assistant answers."""
    messages = _chat(raw, column)
    if messages[-1]["role"] == "assistant":
        if column not in _CHATS or len(messages) == 1:
            raise RowError(f"has a {column} whose last turn is the assistant's: end it with the turn that is to be answered")
        messages = messages[:-1]
    return messages


def _chat(raw: Row, column: str) -> list[Message]:
    """All messages of a column, joined with related columns: Alpaca's input, a system text."""
    value = _find(raw, column)
    messages = read_messages(value, column)
    if column == "instruction" and not is_absent(raw.get("input")):
        messages = read_messages(f"{value}\n{checked_text(str(raw['input']), 'input')}", column)
    for extra in ("history", "tools"):
        if (column == "instruction" or isinstance(value, list)) and not is_absent(raw.get(extra)) and raw[extra] != "[]":
            raise RowError(f"has {extra} next to its {column}, which megafork does not read: write all turns as messages, or delete it")
    if column in (*_CHATS, "instruction") and isinstance(raw.get("system"), str) and raw["system"].strip():
        messages = [{"role": "system", "content": checked_text(raw["system"], "system")}, *messages]
    refuse_pictures(raw, messages)
    return messages


def _text(messages: list[Message]) -> str:
    return "\n".join(message.get("content", "") for message in messages)


# ---------------------------------------------------------------- answers


def _answer(raw: Row, columns: Columns, prompt: str) -> str:
    found = {name: answer_text(value, name) for name, value in _answers(raw, columns, prompt)}
    if not found and "answer" not in columns and isinstance(raw.get("solution"), str) and raw["solution"].strip():
        solved = solution_text(raw["solution"], "solution")
        if solved is None:
            raise RowError(r'has a solution without a \boxed{} or a last line with ####, and no "answer": give it one')
        return solved
    if not found:
        name = next((name for name in (columns.get("answer"), *_ANSWERS) if name and _find(raw, name) is not _NOTHING), None)
        shown = f"{name} is {_find(raw, name)!r:.60}" if name else _fields(raw)
        raise RowError(f'has no answer ({shown}): give it an "answer", name the answer\'s column in ', _COLUMNS, ", or delete the row")
    (column, text), *others = found.items()
    for other, its in others:
        if its.strip() != text.strip():
            raise RowError(f"has a {column} {text!r:.60} and a {other} {its!r:.60}: name the answer's column in ", _COLUMNS)
    return text


def _answers(raw: Row, columns: Columns, prompt: str) -> Iterator[tuple[str, Any]]:
    """Columns that may hold the answer and their values, most likely first."""
    names = (columns["answer"],) if "answer" in columns else (*_ANSWERS, *(("output",) if prompt in _PAIRS else ()))
    for name in names:
        value = _find(raw, name)
        if value is not _NOTHING and not is_absent(value):
            yield name, value


def _metadata(raw: Row) -> Row:
    """reasoning-gym's metadata, which a data frame may have turned into JSON text."""
    metadata = raw.get("metadata")
    if isinstance(metadata, str):
        metadata = _object(metadata)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("source_dataset"), str):
        raise RowError(
            f"has no metadata.source_dataset (metadata is {raw.get('metadata')!r:.60}), from which the verifier reasoning_gym finds the "
            "task's scorer: give rows of reasoning-gym, or choose another verifier"
        )
    return metadata


def _generated_answer(value: Any) -> str | None:
    """The answer for the task's own scorer: text, even if empty, stays as it is; None for tasks with many right answers that name none."""
    return value if isinstance(value, str) else None if is_absent(value) else answer_text(value, "answer")


# ---------------------------------------------------------------- supervised rows


def _supervised(raw: Row, columns: Columns) -> tuple[str | list[Message], str]:
    """The prompt, and the response to train on: the assistant's last turn, or the response column."""
    found = dict(_pairs(raw, columns))
    if not found:
        raise RowError(
            f'has no response ({_fields(raw)}): give it a "response" or "messages" with a turn of the assistant, or name the response\'s '
            "column in ",
            _COLUMNS,
        )
    (column, pair), *others = found.items()
    for other, its in others:
        if its != pair:
            raise RowError(f'has a "{column}" and a "{other}" that differ: name the response\'s column in ', _COLUMNS, ", or delete one")
    return pair


def _pairs(raw: Row, columns: Columns) -> Iterator[tuple[str, tuple[str | list[Message], str]]]:
    """(Response column, (prompt, response)) for each form that the row has."""
    if "response" not in columns:
        for name in [columns["prompt"]] if "prompt" in columns else _CHATS:
            if isinstance(_find(raw, name), list | str) and (pair := _last_turn(raw, name)):
                yield name, pair
    names = (columns["response"],) if "response" in columns else (*_RESPONSES, "output")
    for name in names:
        value = _find(raw, name)
        if value is _NOTHING or value is None or (name == "output" and "instruction" not in raw and "input" not in raw):
            continue
        yield name, (plain(_prompt(raw, columns)[1]), _response(value, name))


def _last_turn(raw: Row, column: str) -> tuple[str | list[Message], str] | None:
    split = split_last_turn(_chat(raw, column))
    if split is None or not split[0]:
        return None
    before, turn = split
    return plain(before), _content(turn, column)


def _response(value: Any, column: str) -> str:
    if isinstance(value, list):
        turns = read_messages(value, column)
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise RowError(f"has a {column} of {len(turns)} messages: it must be text, or one message of the assistant")
        return _content(turns[0], column)
    if not isinstance(value, str):
        raise RowError(f"has a {column} that is a {type(value).__name__}: it must be text")
    if not value.strip():
        raise RowError(f"has no response ({column} is {value!r}): fill it in, or delete the row")
    return checked_text(value, column)


def _content(turn: Message, column: str) -> str:
    """The part of the assistant's turn to train on."""
    for key in ("tool_calls", "function_call", "reasoning_content", "thinking"):
        if turn.get(key):
            raise RowError(f"has a {column} whose last turn of the assistant has {key}: only its content is trained on, write it there")
    if not turn.get("content", "").strip():
        raise RowError(f"has a {column} whose last turn of the assistant is empty: fill it in, or delete the row")
    return turn["content"]


# ---------------------------------------------------------------- columns

_NOTHING = object()


def _find(raw: Row, name: str) -> Any:
    """The column of that name, or a field inside one such as reward_model.ground_truth; `_NOTHING` if there is none."""
    if name in raw:
        return raw[name]
    column, dot, inner = name.partition(".")
    if not dot or column not in raw:
        return _NOTHING
    value = raw[column]
    if isinstance(value, str):
        value = _object(value)
    return _find(value, inner) if isinstance(value, dict) else _NOTHING


def _object(text: str) -> Any:
    """The decoded JSON text; other text as it is."""
    try:
        return parse(text)
    except ValueError:
        return text


def _fields(raw: Row) -> str:
    return f"its fields: {', '.join(map(str, raw)) or 'none'}"[:300]
