"""Verifiers: how right a response is. Runs in worker processes (`worker.py`), so it imports nothing heavy before it is needed.

A verifier is a function of (response text, row) that returns an accuracy in [0, 1]; what it raises is that response's error.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Verifier = Callable[[str, Row], Any]

_ACCEPTS_ANY_TEXT = ("game_of_life_halting",)
"""Tasks whose own scorer is wrong in reasoning-gym 0.1.25: it compares bool(text), so that every answer is right."""
_TUPLES = ("arc_agi", "rearc")
"""Tasks whose scorer compares tuples, which in JSON and parquet are lists: no answer would be right."""
_MALFORMED = (ArithmeticError, AttributeError, LookupError, NameError, SyntaxError, TypeError, ValueError)


def exact(response: str, row: Row) -> float:
    """1 if the text after the last </think> equals the answer, both stripped."""
    return float(_final(response).strip() == _answer(row))


def math(response: str, row: Row) -> float:
    r"""1 if the last \boxed{...} after the last </think> is mathematically equal to the answer; 0 if not, if there is none, or on garbage.

    math-verify alone would merge several boxes into one set. Its own alarm is off: the caller's time limit also ends what an alarm cannot.
    """
    from math_verify import parse, verify

    answer, found = _answer(row), last_boxed(_final(response))
    if found is None:
        return 0.0
    gold, mine = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (last_boxed(answer) or answer, found))
    return float(verify(gold, mine, timeout_seconds=None))


def reasoning_gym(response: str, row: Row) -> float:
    r"""1 if the task's own scorer gives the final answer full marks: its partial credit (an answer merely contained) counts as 0.

    The final answer is the last <answer>...</answer> after the last </think>, else the last \boxed{...}, else that whole text; stripped.
    A few scorers (gsm_symbolic, kakurasu, knights_knaves, quantum_lock, survo) themselves look for the answer in that text.
    Four scorers (string_insertion, spiral_matrix, binary_matrix, n_queens) call `eval` on it: the response runs as code in the worker.
    """
    metadata = row.get("metadata")
    if not isinstance(metadata, dict) or "source_dataset" not in metadata:
        raise ValueError("the row has no metadata.source_dataset: verifier `reasoning_gym` needs data from reasoning_gym:TASK")
    task, answer = metadata["source_dataset"], final_answer(response)
    if task in _TUPLES:
        metadata = {**metadata, "output": tuple(map(tuple, metadata["output"]))}
    if task in _ACCEPTS_ANY_TEXT:
        return float(answer == row["answer"])
    try:
        return float(_scorer(task)(answer, {"question": row["prompt"], "answer": row["answer"], "metadata": metadata}) == 1.0)
    except _MALFORMED:  # several scorers raise on text that is not of the form they expect
        return 0.0


def final_answer(response: str) -> str:
    text = _final(response)
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    boxed = last_boxed(text)
    return (tagged[-1] if tagged else text if boxed is None else boxed).strip()


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} whose braces balance (escaped braces do not count), or None."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for token in re.finditer(r"\\.|[{}]", text[start:], flags=re.DOTALL):
            depth += {"{": 1, "}": -1}.get(token[0], 0)
            if depth == 0:
                return text[start : start + token.start()]
    return None


BUILT_IN: dict[str, Verifier] = {"exact": exact, "math": math, "reasoning_gym": reasoning_gym}


def load(name: str) -> Verifier:
    """The built-in verifier of that name, or FUNCTION of FILE.py for `FILE.py:FUNCTION`. Imports what it needs, so that the first verdict
    is as quick as the next. Raises whatever the file raises; AttributeError or TypeError if it has no such function."""
    if name == "math":
        import math_verify  # noqa: F401

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarm is off
        math(r"\boxed{1}", {"answer": "1"})  # its grammar is compiled at the first use
    elif name == "reasoning_gym":
        import reasoning_gym  # noqa: F401
    if name in BUILT_IN:
        return BUILT_IN[name]
    path, _, function_name = name.rpartition(":")
    function = getattr(_import(Path(path)), function_name)
    if not callable(function):
        raise TypeError(f"{function_name} is a {type(function).__name__}, not a function")
    return function


def _import(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look their module up
    sys.path.insert(0, str(path.resolve().parent))  # as for a script, its neighbours can be imported
    spec.loader.exec_module(module)
    return module


def _final(response: str) -> str:
    return response.rpartition("</think>")[2]


def _answer(row: Row) -> str:
    if row.get("answer") is None:
        raise ValueError("the row has no answer to compare with")
    return str(row["answer"]).strip()


@functools.cache
def _scorer(task: str) -> Callable[[str, Row], float]:
    from reasoning_gym.factory import get_score_answer_fn

    return get_score_answer_fn(task)
