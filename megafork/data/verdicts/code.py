"""`reward.verifier: code`: runs the program in a response against the tests of its row.

The judged process decides nothing: its output or return value is compared here. Only asserts that are not plain equalities run inside it;
they have passed if it then returns a token that it receives only after the program has run.
"""

from __future__ import annotations

import ast
import re
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from megafork.data.verdicts import wire
from megafork.data.verdicts.code_tests import Call, Equal, Output, Script, Test, tests_of
from megafork.data.verdicts.runner import Limits, Nursery, Outcome, Program
from megafork.data.verifiers import after_thinking

_LANGUAGES = ("py", "python", "python3")
_DIGITS = 50_000
"""Most digits of an integer that a program can read or print, as in LiveCodeBench; Python's own limit is 4,300."""
_CLOCK_SHARE = 4
"""Wall-clock seconds per CPU second of a test's limit, so that a busy machine does not fail a program."""
_SHARE_OF_TIME = 0.8
"""Share of a verdict's time limit given to the tests: a program that takes too long is wrong rather than a failed verdict."""


class Grader:
    """Gives verdicts on (response, row). Create it before the first item is read."""

    def __init__(self, timeout_s: float, limits: Limits, channel: Sequence[socket.socket], *, partial: bool) -> None:
        """`channel`: sockets that the programs must not inherit."""
        self._timeout_s = timeout_s * _SHARE_OF_TIME
        self._limits = limits
        self._partial = partial
        sys.set_int_max_str_digits(_DIGITS)  # inherited by the programs
        self._nursery = Nursery(limits, channel)

    def __call__(self, response: str, row: dict[str, Any]) -> wire.Plain:
        end = time.monotonic() + self._timeout_s
        try:
            tests = tests_of(row)
        except ValueError as error:
            return wire.Plain(0.0, f"the row {error}")
        source = last_block(after_thinking(response))
        if source is None:
            return wire.Plain(0.0)
        passed = 0
        for test in tests.tests:
            if self._passes(test, source, tests.setup, end):
                passed += 1
            elif not self._partial:
                return wire.Plain(0.0)
        return wire.Plain(passed / len(tests.tests))

    def _passes(self, test: Test, source: str, setup: str, end: float) -> bool:
        if isinstance(test, Output):
            outcome = self._run(Program(source, setup, stdin=test.stdin), end)
            return outcome.ended and same_output(outcome.output.decode(errors="replace"), test.expected)
        if isinstance(test, Call):
            outcome = self._run(Program(source, setup, function=test.function, arguments=test.arguments), end)
            return _is_one_of(outcome, test.accepted)
        if isinstance(test, Equal):
            expected = self._value_of(test.right, setup, end)
            if expected is not None:
                outcome = self._run(Program(source, setup, expression=test.left), end)
                return outcome.ended and outcome.value is not None and _equal(outcome.value[0], expected[0])
            test = Script(f"assert {test.left} == {test.right}")
        token = secrets.token_hex()
        return self._run(Program(source, setup, script=test.code, token=token), end).value == (token,)

    def _value_of(self, expression: str, setup: str, end: float) -> tuple[Any] | None:
        """Value of a row's expression, evaluated without the response; None if it needs the program's names or is not plain data."""
        try:
            return (ast.literal_eval(expression),)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return self._run(Program("", setup, expression=expression), end).value

    def _run(self, program: Program, end: float) -> Outcome:
        left = min(_CLOCK_SHARE * self._limits.test_timeout_s, end - time.monotonic())
        return self._nursery.run(program, left) if left > 0 else Outcome(False, b"", None)


def last_block(text: str) -> str | None:
    """The last closed fenced block marked as Python, or else the last unmarked one (after a program an unmarked one shows its output), or
    None. As in Markdown, its lines lose the fence's indentation. Takes time linear in the text."""
    marked: str | None = None
    unmarked: str | None = None
    fence, lines, language, indent = "", list[str](), "", 0
    for line in text.splitlines(keepends=True):
        mark = re.match(r"( {0,3})(`{3,}|~{3,})[ \t]*([^`\n]*)$", line.rstrip())
        if not fence and mark:
            fence, language, lines, indent = mark[2], mark[3].strip().lower().partition(" ")[0], [], len(mark[1])
        elif fence and mark and not mark[3] and mark[2].startswith(fence):
            marked = "".join(lines) if language in _LANGUAGES else marked
            unmarked = "".join(lines) if not language else unmarked
            fence = ""
        elif fence:
            lines.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])
    return unmarked if marked is None else marked


def same_output(output: str, expected: str) -> bool:
    """Whether outputs are equal by LiveCodeBench's rule: both stripped, then compared line by line, each stripped; lines that differ as
    text are equal if their words are the same decimal numbers. No tolerance."""
    ours, theirs = (text.strip().split("\n") for text in (output, expected))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(one: str, other: str) -> bool:
    if one.strip() == other.strip():
        return True
    ours, theirs = _decimals(one), _decimals(other)
    return ours is not None and ours == theirs


def _decimals(line: str) -> list[Decimal] | None:
    try:
        numbers = [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None
    return None if any(number.is_snan() for number in numbers) else numbers  # comparing one raises


def _is_one_of(outcome: Outcome, accepted: Sequence[Any]) -> bool:
    if not outcome.ended or outcome.value is None:
        return False
    value = _with_lists(outcome.value[0])
    return any(_equal(value, expected) for expected in accepted)


def _with_lists(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_with_lists(element) for element in value]
    return {key: _with_lists(element) for key, element in value.items()} if isinstance(value, dict) else value


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except RecursionError:
        return False
