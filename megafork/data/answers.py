"""Converts answers from the forms used by data sets to the text that the built-in verifiers compare with, or refuses unjudgeable ones."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from megafork.data.messages import RowError, checked_text
from megafork.data.plain_json import parse
from megafork.data.verifiers import last_boxed
from megafork.recipe import Key

_LAST_LINE = re.compile(r"(?:^|\n)####[ \t]+([^\n#]*[^\s#])\s*\Z")
"""GSM8K's final-answer line; strict, as a maze may also end with hashes."""
_OTHER_BOX = re.compile(r"\\fbox\s*\{([^{}]+)\}|\\(?:boxed|fbox)\s+([^\s$]+)")
r"""The few answers of MATH in \fbox{2} or \boxed 2."""


def is_absent(value: Any) -> bool:
    """Whether a value means "missing" in JSON, Arrow or pandas, which also writes `nan` as text."""
    if isinstance(value, float | Decimal):
        return math.isnan(value)
    return value is None or value in ([], {}) or (isinstance(value, str) and (not value.strip() or value == "nan"))


def answer_text(value: Any, column: str) -> str:
    """The text of the correct answer. 7.0 becomes 7, GSM8K's rationale the part after `####`, and a list of one its item.

    Raises RowError, naming the column, for a value that no verifier can judge.
    """
    if isinstance(value, str) and column.endswith("ground_truth"):
        value = _from_json(value)
    if isinstance(value, list):
        value = _one_of(value, column)
    if isinstance(value, str):
        return _final(checked_text(value, column))
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        shown = str(value).lower() if isinstance(value, bool) else f"a {type(value).__name__}"
        raise RowError(f"has a {column} that is {shown} ({value!r:.60}): no response could equal it, write the text of a correct answer")
    return _number(value, column)


def solution_text(value: str, column: str) -> str | None:
    r"""Final answer of a worked solution: its last \boxed{}, the text after `####`, or a single line as it is. None if there is none."""
    boxed = last_boxed(value)
    if boxed is None and (others := _OTHER_BOX.findall(value)):
        boxed = "".join(others[-1]).rstrip(".,")
    if boxed is not None and boxed.strip():
        return checked_text(boxed.strip(), column)
    if _LAST_LINE.search(value):
        return _final(checked_text(value, column))
    return None if "\n" in value.strip() or "\\boxed" in value else checked_text(value.strip(), column)


def _final(text: str) -> str:
    found = _LAST_LINE.search(text)
    return found[1].strip() if found else text


def _number(value: float | Decimal, column: str) -> str:
    if not math.isfinite(value):
        raise RowError(f"has a {column} that is {value}: no response could equal it, write the text of a correct answer")
    text = str(value) if isinstance(value, int) else format(Decimal(str(value)), "f")  # writes out 1e-07
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _one_of(values: list[Any], column: str) -> Any:
    parts = [part for part in values if not is_absent(part)]
    texts = [answer_text(part, column).strip().strip("$") for part in parts]
    if len(texts) == 1:
        return texts[0]
    if column == "final_answer":  # OlympiadBench: a response must give all of them
        return ", ".join(texts)
    raise RowError(
        f"has a {column} of {len(texts)} parts ({values!r:.60}): a verifier compares with one text, join them into one or "
        "name another column in ",
        Key("data.columns"),
    )


def _from_json(text: str) -> Any:
    """Decode verl's ground_truth if it is JSON text of a list of strings or of an object; anything else is an answer as it is."""
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        value = parse(text)
    except ValueError:
        return text
    is_list_of_texts = isinstance(value, list) and value and all(isinstance(part, str) for part in value)
    return value if is_list_of_texts or isinstance(value, dict) else text
