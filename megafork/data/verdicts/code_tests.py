"""The tests of a row for `reward.verifier: code`, in the forms used by public data sets.

- `input_output` (APPS, TACO): JSON of {"inputs": [...], "outputs": [...]}, with "fn_name" if a function is called.
- `public_test_cases`, `private_test_cases` (LiveCodeBench): JSON of [{"input", "output", "testtype": "stdin" | "functional"}, ...], the
  private ones possibly compressed; the function's name is metadata.func_name.
- `test` and `entry_point` (HumanEval): code that defines `check(candidate)`.
- `test_list`, `test_cases` (MBPP, AceCode): asserts, after `test_imports` and `test_setup_code`.
- `reward_model.ground_truth`, or `answer` (verl, PRIME): JSON of any of these, or of {"functional": asserts}, or a list of them, or of
  {"input", "output", "type": "stdin_stdout" | "function_call", "fn_name"} (PRIME, DeepCoder).

Every assert of the form LEFT == RIGHT is split, so that RIGHT never reaches the judged program.
"""

from __future__ import annotations

import ast
import base64
import binascii
import io
import json
import pickle
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

_LARGEST = 1 << 30  # bytes of unpacked tests


@dataclass(frozen=True)
class Output:
    """The expected output of the program for the input `stdin`."""

    stdin: str
    expected: str


@dataclass(frozen=True)
class Call:
    """The return value of `function` for `arguments` must equal one of `accepted`. All are JSON values, so tuples are lists."""

    function: str
    arguments: Sequence[Any]
    accepted: Sequence[Any]


@dataclass(frozen=True)
class Equal:
    """`left == right`, two Python expressions: `left` uses the program's names, `right` those of the setup."""

    left: str
    right: str


@dataclass(frozen=True)
class Script:
    """Statements that raise if the program is wrong."""

    code: str


Test = Output | Call | Equal | Script


@dataclass(frozen=True)
class Tests:
    """At least one test. `setup` runs before the program."""

    tests: Sequence[Test]
    setup: str = ""


def tests_of(row: dict[str, Any]) -> Tests:
    """The tests of a row. Raises ValueError, whose text continues `the row ...`, if there are none or they are malformed."""
    try:
        found = _tests_of(row)
    except (AttributeError, KeyError, TypeError, RecursionError, MemoryError, SyntaxError) as error:
        raise ValueError(f"has tests in an unknown form ({type(error).__name__}: {error}): see docs/verifiers.md") from None
    if found is None or not found.tests:
        raise ValueError(
            "has no tests: give it input_output, public_test_cases, test and entry_point, test_list, or reward_model.ground_truth "
            "(docs/verifiers.md)"
        )
    return found


def _tests_of(row: dict[str, Any]) -> Tests | None:
    if row.get("input_output"):
        return Tests(_pairs(_json(row["input_output"], "input_output")))
    if row.get("public_test_cases") or row.get("private_test_cases"):
        return Tests(_cases(row))
    if row.get("test") and row.get("entry_point"):
        return _human_eval(row["test"], row["entry_point"], _as_code(row.get("prompt"), row["entry_point"]))
    for name in ("test_list", "test_cases"):
        if row.get(name):
            asserts = [*_texts(row[name], name), *_texts(row.get("challenge_test_list") or [], "challenge_test_list")]
            imports = _texts(row.get("test_imports") or [], "test_imports")
            return _asserts(asserts, "\n".join([*imports, str(row.get("test_setup_code") or "")]))
    reward_model = row.get("reward_model")
    truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    return _ground_truth(row.get("answer") if truth is None else truth)


def _ground_truth(truth: Any) -> Tests | None:
    if not truth:
        return None
    found = _json(truth, "reward_model.ground_truth")
    if isinstance(found, list):
        if all(isinstance(case, dict) for case in found):
            return Tests([_case(case, {}) for case in found])
        return _asserts(_texts(found, "reward_model.ground_truth"), "")
    if not isinstance(found, dict):
        return None
    setup = str(found.get("import_prefix") or "")
    if found.get("inputs"):
        return Tests(_pairs(found), setup)
    if found.get("test_code") and found.get("entry_point"):
        return _human_eval(found["test_code"], found["entry_point"], setup)
    for name in ("functional", "assert_case", "test_list", "test_cases"):
        if found.get(name):
            return _asserts([found[name]] if isinstance(found[name], str) else _texts(found[name], name), setup)
    nested = {
        name: found[name] for name in ("input_output", "public_test_cases", "private_test_cases", "test", "entry_point") if name in found
    }
    return _tests_of(nested) if nested else None


# ---------------------------------------------------------------- pairs of input and output


def _pairs(found: dict[str, Any]) -> list[Test]:
    inputs, outputs, function = found["inputs"], found["outputs"], found.get("fn_name")
    if len(inputs) != len(outputs):
        raise ValueError(f"has {len(inputs)} inputs and {len(outputs)} outputs: give equally many")
    if function:
        return [Call(function, _arguments(given), _accepted(expected)) for given, expected in zip(inputs, outputs, strict=True)]
    return [Output(_lines(given), _lines(expected)) for given, expected in zip(inputs, outputs, strict=True)]


def _cases(row: dict[str, Any]) -> list[Test]:
    metadata = _json(row["metadata"], "metadata") if row.get("metadata") else {}
    cases = [*_json(row.get("public_test_cases") or "[]", "public_test_cases"), *_private(row.get("private_test_cases") or "[]")]
    return [_case(case, metadata) for case in cases]


def _case(case: dict[str, Any], metadata: dict[str, Any]) -> Test:
    kind = case.get("testtype", case.get("type"))
    if kind not in ("functional", "function_call"):
        return Output(_lines(case["input"]), _lines(case["output"]))
    metadata = {**metadata, **(case.get("metadata") or {})}
    function = metadata.get("func_name") or case.get("fn_name")
    if not function:
        raise ValueError("has functional tests and no metadata.func_name: name the function that they call")
    accepted = (_value(case["output"]),) if kind == "functional" else _accepted(case["output"])
    return Call(function, _arguments(case["input"]), accepted)


def _private(cases: Any) -> Any:
    """Unpack LiveCodeBench's private tests: base64 of zlib of a pickled string. Only a string is unpickled."""
    if not isinstance(cases, str) or cases.lstrip().startswith("["):
        return _json(cases, "private_test_cases")
    try:
        packed = zlib.decompressobj()
        data = packed.decompress(base64.b64decode(cases, validate=True), _LARGEST)
        return json.loads(data if data.lstrip().startswith(b"[") else _TextUnpickler(io.BytesIO(data)).load())
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"has private_test_cases that cannot be unpacked ({error}): take them from LiveCodeBench's own file") from None


class _TextUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _arguments(given: Any) -> list[Any]:
    """Arguments given as a list, or as one JSON value per line."""
    if isinstance(given, str):
        return [_value(line) for line in given.split("\n") if line.strip()]
    if not isinstance(given, list):
        raise TypeError("the input of a function must be a list of arguments")
    return given


def _value(text: Any) -> Any:
    return _json(text, "a test's value") if isinstance(text, str) else text


def _accepted(expected: Any) -> list[Any]:
    """Accepted return values: APPS and TACO wrap many results in a list of one, and have no keys but text."""
    value = expected
    if isinstance(expected, str):
        try:
            value = _loads(expected)
        except ValueError:  # plain text
            value = expected
    accepted = [value, expected, *(value if isinstance(value, list) and len(value) == 1 else [])]
    return [*accepted, *(_with_integer_keys(one) for one in accepted if isinstance(one, dict))]


def _with_integer_keys(value: dict[str, Any]) -> dict[Any, Any]:
    """JSON has only text as keys: {1: 2} became {"1": 2}."""
    return {int(key) if re.fullmatch("-?[0-9]{1,18}", key) else key: inner for key, inner in value.items()}


def _lines(text: Any) -> str:
    return "\n".join(map(str, text)) if isinstance(text, list) else str(text)


def _json(value: Any, field: str) -> Any:
    if not isinstance(value, str | bytes):
        return value
    try:
        return _loads(value)
    except ValueError as error:
        raise ValueError(f"has {field} that is not JSON ({error}): correct it") from None


def _loads(text: str | bytes) -> Any:
    """Decode JSON with integers of any length: some tests of APPS have more digits than `int` reads."""
    try:
        return json.loads(text)
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        return json.loads(text, parse_int=lambda digits: int(Decimal(digits)))


def _texts(value: Any, field: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"has {field} that is not a list of strings: make it one")
    return value


# ---------------------------------------------------------------- asserts


def _asserts(texts: Iterable[str], setup: str) -> Tests:
    """Make each assert a separate test, unless there are statements other than asserts and imports."""
    ast.parse(setup)
    tests: list[Test] = []
    imports: list[str] = []
    for text in texts:
        statements = ast.parse(text).body
        if all(isinstance(statement, ast.Assert | ast.Import | ast.ImportFrom) for statement in statements):
            tests += [_test(statement) for statement in statements if isinstance(statement, ast.Assert)]
            imports += [ast.unparse(statement) for statement in statements if not isinstance(statement, ast.Assert)]
        else:
            tests.append(Script(text))
    return Tests(tests, "\n".join([setup, *imports]))


def _human_eval(code: str, entry_point: str, setup: str) -> Tests:
    """Split `check` into its asserts if it does nothing else; otherwise it is called as a whole."""
    module = ast.parse(code)
    checks = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "check" and len(node.args.args) == 1]
    whole = Tests([Script(f"{code}\n\ncheck({entry_point})" if checks else code)], setup)
    if len(checks) != 1:
        return whole
    statements = [node for node in checks[0].body if not _is_no_op(node)]
    if not statements or not all(isinstance(node, ast.Assert) for node in statements):
        return whole
    name = checks[0].args.args[0].arg
    others = [ast.unparse(node) for node in module.body if node is not checks[0]]
    renamed = [_Rename(name, entry_point).visit(node) for node in statements]
    return Tests([_test(node) for node in renamed], "\n".join([setup, *others]))


def _test(node: ast.Assert) -> Test:
    test = node.test
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        left, right = test.left, test.comparators[0]
        if _is_literal(left) and not _is_literal(right):
            left, right = right, left
        return Equal(ast.unparse(left), ast.unparse(right))
    return Script(ast.unparse(node))


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError):
        return False
    return True


def _is_no_op(node: ast.stmt) -> bool:
    """Whether the statement is a docstring or `assert True`."""
    value = node.test if isinstance(node, ast.Assert) else node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and bool(value.value)


class _Rename(ast.NodeTransformer):
    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self._new, node.ctx) if node.id == self._old else node


def _as_code(prompt: Any, entry_point: str) -> str:
    """HumanEval's prompt, which is a module whose imports and other functions the tests use; "" for other prompts."""
    if not isinstance(prompt, str) or f"def {entry_point}" not in prompt:
        return ""
    try:
        ast.parse(prompt)
    except (SyntaxError, ValueError):
        return ""
    return prompt
