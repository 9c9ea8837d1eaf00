"""Verifiers, which judge whether a response is correct. They run in verifier processes (`worker.py`), so heavy imports are lazy.

A verifier is a function of (response text, row) that returns an accuracy in [0, 1]; an exception becomes that response's error.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

from megafork.user_code import import_file, split

Row = dict[str, Any]
Verifier = Callable[[str, Row], Any]

_ACCEPTS_ANY_TEXT = ("game_of_life_halting",)
"""Tasks whose own scorer is wrong in reasoning-gym 0.1.25: it compares bool(text), so any answer counts as right."""
_TUPLES = ("arc_agi", "rearc")
"""Tasks whose scorer compares tuples, which become lists in JSON and parquet: no answer would be right."""
_EVALUATED_AS_DATA = ("binary_matrix", "n_queens", "number_sorting", "spiral_matrix", "string_insertion")
"""Tasks whose scorers in reasoning-gym 0.1.25 call `eval` on the response's or the row's answer: here they read only Python literals."""
_EVALUATED_BY_SYMPY = ("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration")
"""Tasks whose scorers pass the answer to sympy's parser, which evaluates it: they only get answers that `_is_formula` accepts."""
_EVALUATES_THE_ROW = ("bitwise_arithmetic",)
"""Tasks whose scorers evaluate the row's own problem."""
_FORMULA_NAMES = re.compile(
    r"(a?(sin|cos|tan|cot|sec|csc)h?|exp|log|ln|sqrt|cbrt|[aA]bs|sign|erf|pi)|\w"  # or one letter: a variable, E
)
_MALFORMED = (ArithmeticError, AttributeError, LookupError, NameError, SyntaxError, TypeError, ValueError)


def exact(response: str, row: Row) -> float:
    """1 if the text after the last </think> equals the answer, both stripped."""
    return float(after_thinking(response).strip() == _answer(row))


def math(response: str, row: Row) -> float:
    r"""1 if the last \boxed{...} after the last </think> is mathematically equal to the answer; 0 if not, if there is none, or on garbage.

    math-verify alone would merge several boxes into one set. Its own alarm is off: the caller's time limit also stops C code.
    """
    from math_verify import parse, verify

    answer, found = _answer(row), last_boxed(after_thinking(response))
    if found is None:
        return 0.0
    gold, mine = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (last_boxed(answer) or answer, found))
    return float(verify(gold, mine, timeout_seconds=None))


def reasoning_gym(response: str, row: Row) -> float:
    r"""1 if the task's own scorer gives the final answer full marks: its partial credit (an answer merely contained) counts as 0.

    The final answer is the last <answer>...</answer> after the last </think>, else the last \boxed{...}, else that whole text; stripped.
    A few scorers (gsm_symbolic, kakurasu, knights_knaves, quantum_lock, survo) search that text for the answer themselves.
    No answer runs as code: an answer that a scorer evaluates must be a Python literal or a formula, or else it is wrong; see `evaluates`.
    """
    metadata = row.get("metadata")
    if not isinstance(metadata, dict) or "source_dataset" not in metadata:
        raise ValueError("the row has no metadata.source_dataset: verifier `reasoning_gym` needs data from reasoning_gym:TASK")
    task, answer = metadata["source_dataset"], final_answer(response)
    if task in _TUPLES:
        metadata = {**metadata, "output": tuple(map(tuple, metadata["output"]))}
    if task in _ACCEPTS_ANY_TEXT:
        return float(answer == row["answer"])
    if task in _EVALUATED_BY_SYMPY and not _is_formula(answer):
        return 0.0
    try:
        return float(_scorer(task)(answer, {"question": row["prompt"], "answer": row["answer"], "metadata": metadata}) == 1.0)
    except _MALFORMED:  # several scorers raise on text of an unexpected form
        return 0.0


def final_answer(response: str) -> str:
    text = after_thinking(response)
    tagged = _last_tagged(text)
    found = last_boxed(text) if tagged is None else tagged
    return (text if found is None else found).strip()


def _last_tagged(text: str) -> str | None:
    found, start, end = None, text.find("<answer>"), 0
    while start >= 0 and (end := text.find("</answer>", start)) >= 0:
        found = text[start + len("<answer>") : end]
        start = text.find("<answer>", end)
    return found


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} whose braces balance (escaped braces do not count), or None. Takes time linear in the text."""
    open_braces: list[int] = []  # for each open brace, the start of its content if it is a box, else -1
    found: tuple[int, int] | None = None
    for token in re.finditer(r"\\boxed\s*\{|\\(?!\\boxed\s*\{).|[{}]", text, flags=re.DOTALL):
        if token[0] == "{":
            open_braces.append(-1)
        elif token[0].startswith("\\boxed"):
            open_braces.append(token.end())
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start >= 0 and (found is None or start > found[0]):
                found = (start, token.start())
    return None if found is None else text[slice(*found)]


def code(response: str, row: Row) -> float:
    """Not called: tests are run by `code.Grader`, which needs its own processes."""
    raise NotImplementedError


BUILT_IN: dict[str, Verifier] = {"exact": exact, "math": math, "reasoning_gym": reasoning_gym, "code": code}


def evaluates(name: str, row: Row) -> bool:
    """Whether judging may execute text from a model or a data set. True for a user's file, which may do anything."""
    if name != "reasoning_gym":
        return ":" in name
    metadata = row.get("metadata")
    task = metadata.get("source_dataset") if isinstance(metadata, dict) else None
    return task in (*_EVALUATED_AS_DATA, *_EVALUATED_BY_SYMPY, *_EVALUATES_THE_ROW)


def load(name: str) -> Verifier:
    """The built-in verifier of that name, or FUNCTION of FILE.py for `FILE.py:FUNCTION`, imported so that the first verdict is as fast as
    later ones. Raises whatever the file raises; AttributeError or TypeError if it has no such function."""
    if name == "math":
        import math_verify  # noqa: F401

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarm is off
        math(r"\boxed{1}", {"answer": "1"})  # compiles its grammar, which happens at the first use
    elif name == "reasoning_gym":
        import reasoning_gym  # noqa: F401
    elif name == "code":
        import megafork.data.verdicts.runner  # noqa: F401 - each program starts as a copy of this process
    if name in BUILT_IN:
        return BUILT_IN[name]
    path, function_name = split(name)
    sys.path.insert(0, str(path.resolve().parent))  # like a script, it can import neighbouring files
    function = getattr(import_file(path, path.stem), function_name)
    if not callable(function):
        raise TypeError(f"{function_name} is a {type(function).__name__}, not a function")
    _check_call(function, function_name)
    return function


def _check_call(function: Verifier, name: str) -> None:
    """Raise TypeError for a function that no call could get a number from, such as other trainers' f(data_source, solution, truth)."""
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{name} is async: write it as `def {name}(response, row)`")
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C
        return
    try:
        signature.bind("", {})
    except TypeError as error:
        raise TypeError(f"{name} is called as {name}(response, row): {error}") from None


def after_thinking(response: str) -> str:
    """The text after the last </think>, up to a <think> that was cut off."""
    return response.rpartition("</think>")[2].partition("<think>")[0]


def _answer(row: Row) -> str:
    if row.get("answer") is None:
        raise ValueError("the row has no answer to compare with")
    return str(row["answer"]).strip()


@functools.cache
def _scorer(task: str) -> Callable[[str, Row], float]:
    from reasoning_gym.factory import get_score_answer_fn

    scorer: Callable[[str, Row], float] = get_score_answer_fn(task)
    if task in _EVALUATED_AS_DATA:
        sys.modules[scorer.__self__.__class__.__module__].__dict__["eval"] = ast.literal_eval  # type: ignore[attr-defined]
    return scorer


def _is_formula(text: str) -> bool:
    """Whether sympy's parser can find only numbers, variables, elementary functions and arithmetic in it: no other call, attribute,
    string or index."""
    if not re.fullmatch(r"[\w\s+\-*/^().,!]*", text) or re.search(r"\.\s*[^\W\d]", text):
        return False
    return all(_FORMULA_NAMES.fullmatch(name) for name in re.findall(r"[^\W\d]\w*", text))
