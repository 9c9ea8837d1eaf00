"""`reward.verifier: code`: rows of public datasets, which outputs count as equal, and programs that try to evade judgement."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import ADD, fenced, reward

from megafork.data.reward import Verdict, Verifiers, check_row, needs
from megafork.data.verdicts import code_tests, plain
from megafork.data.verdicts.code import last_block, same_output
from megafork.data.verdicts.code_tests import Call, Equal, Output, Script
from megafork.recipe import Reward

PAIRS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
SQUARE = "def f(x):\n    return x * x"
ADDS = "class Solution:\n    def add(self, x: List[int], y: int) -> List[int]:\n        return [a + y for a in x]"
CALLS = {"inputs": [[[1, 2], 3], [[], 1]], "outputs": [[4, 5], []], "fn_name": "add"}
HUMAN_EVAL = {
    "prompt": "from typing import List\n\ndef twice(x):\n    return 2 * x\n\ndef f(xs: List[int]) -> int:\n    'The sum of doubles'\n",
    "entry_point": "f",
    "test": """
METADATA = {}

def check(candidate):
    assert candidate([1, 2]) == twice(3), 'wrong'
    assert True
    assert 0 == candidate([])
""",
}
LCB_PRIVATE = base64.b64encode(zlib.compress(pickle.dumps(json.dumps([{"input": "3 4", "output": "7", "testtype": "stdin"}])))).decode()


ROWS: list[tuple[str, str, dict[str, Any]]] = [  # name, a right program, the row
    ("apps, text", ADD, {"input_output": json.dumps(PAIRS)}),
    ("apps, lists of lines", ADD, {"input_output": {"inputs": [["1 2"]], "outputs": [["3"]]}}),
    ("taco, function", ADDS, {"input_output": json.dumps(CALLS)}),
    ("taco, function, results wrapped", ADDS, {"input_output": json.dumps({**CALLS, "outputs": [[[4, 5]], [[]]]})}),
    ("apps, keys", "def add(x):\n    return {x: 2}", {"input_output": '{"fn_name": "add", "inputs": [[1]], "outputs": [{"1": 2}]}'}),
    ("lcb", ADD, {"public_test_cases": '[{"input": "1 2", "output": "3", "testtype": "stdin"}]', "private_test_cases": LCB_PRIVATE}),
    (
        "lcb, function",
        ADDS,
        {
            "public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]),
            "metadata": '{"func_name": "add"}',
        },
    ),
    ("mbpp", SQUARE, {"test_list": ["assert f(2) == 4", "assert set(map(f, [1, 2])) == set((1, 4))"], "test_setup_code": ""}),
    ("mbpp, imports", SQUARE, {"test_list": ["assert math.isclose(f(0.1), 0.01)"], "test_imports": ["import math"]}),
    ("mbpp, statements", SQUARE, {"test_list": ["x = 3\nassert f(x) == 9"]}),
    ("humaneval", "def f(xs):\n    return twice(sum(xs))", HUMAN_EVAL),
    (
        "humaneval, a loop",
        SQUARE,
        {"entry_point": "f", "test": "def check(candidate):\n    for n in range(3):\n        assert candidate(n) == n ** 2"},
    ),
    ("verl", ADD, {"reward_model": {"ground_truth": json.dumps(PAIRS), "style": "rule"}}),
    ("verl, function", ADDS, {"reward_model": {"ground_truth": json.dumps(CALLS)}}),
    ("verl, asserts", SQUARE, {"reward_model": {"ground_truth": json.dumps({"functional": "import math\nassert f(3) == math.pow(3, 2)"})}}),
    ("verl, list", ADD, {"answer": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}])}),
    ("prime, calls", SQUARE, {"answer": json.dumps([{"type": "function_call", "fn_name": "f", "input": [2], "output": [4]}])}),
    ("prime, texts", ADD, {"answer": json.dumps([{"type": "stdin_stdout", "input": "1 2", "output": "3"}])}),
    ("acecode", SQUARE, {"test_cases": ["assert f(2) == 4"]}),
    ("the program's own classes", "class P:\n    def __eq__(self, o):\n        return True", {"test_list": ["assert P() == P()"]}),
]


# ---------------------------------------------------------------- rows


def test_rows_of_the_public_sets() -> None:
    wrong = fenced("f = add = lambda *_: None\nclass Solution: pass\nclass P:\n    def __eq__(self, o): return False\nprint('?')")
    with Verifiers(reward()) as scorer:
        for name, source, row in ROWS:
            assert scorer.score([(fenced(source), row), (wrong, row), ("no program", row)]) == [Verdict(1.0), Verdict(0.0), Verdict(0.0)], (
                name
            )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": None}, "has no tests: give it input_output"),
        ({"input_output": ""}, "has no tests"),
        ({"input_output": "{"}, "has input_output that is not JSON"),
        ({"input_output": '{"inputs": ["1"], "outputs": []}'}, "has 1 inputs and 0 outputs"),
        ({"input_output": "[]"}, "has tests in an unknown form"),
        ({"test_list": "assert True"}, "has test_list that is not a list of strings"),
        ({"test_list": ["assert f("]}, "has tests in an unknown form .SyntaxError"),
        ({"public_test_cases": '[{"input": "1", "output": "2", "testtype": "functional"}]'}, "no metadata.func_name"),
        ({"answer": "7"}, "has no tests"),
        ({"answer": "seven"}, "is not JSON"),
        ({"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(os.system))).decode()}, "it names posix.system"),
        ({"private_test_cases": "!"}, "cannot be unpacked"),
    ],
)
def test_a_row_that_cannot_be_judged_by_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_row(reward())(row)


def test_needs_nothing_by_name() -> None:
    assert needs(reward()) == ()
    check_row(Reward(verifier="math"))({})


def test_asserts_are_taken_apart() -> None:
    assert code_tests.tests_of({"test_list": ["assert f(1) == [2]", "assert 3 == f(2)", "assert f(1)", "assert f(1) != 2"]}).tests == [
        Equal("f(1)", "[2]"),
        Equal("f(2)", "3"),
        Script("assert f(1)"),
        Script("assert f(1) != 2"),
    ]
    assert code_tests.tests_of(HUMAN_EVAL).tests == [
        Equal("f([1, 2])", "twice(3)"),
        Equal("f([])", "0"),
    ]
    assert code_tests.tests_of({"input_output": PAIRS}).tests == [Output("1 2\n", "3\n"), Output("3 4\n", "7\n")]
    assert isinstance(code_tests.tests_of({"input_output": CALLS}).tests[0], Call)


# ---------------------------------------------------------------- what is right


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("3\n", "3", True),
        (" 3 \n\n", "3\n", True),
        ("1  2", "1 2", True),  # as numbers
        ("1.0", "1", True),
        ("1.50 2", "1.5 2.0", True),
        ("0.30000000000000004", "0.3", False),
        ("a  b", "a b", False),
        ("1\n\n2", "1\n2", False),
        ("yes", "YES", False),
        ("", "", True),
        ("nan", "nan", True),
        ("NaN 1", "nan 1", False),
        ("1e3", "1000", True),
    ],
)
def test_the_same_output(output: str, expected: str, same: bool) -> None:
    assert same_output(output, expected) is same


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```py\na\n```\n```Python3\nb\n```", "b\n"),
        ("```python\na\n```\n```text\nb\n```", "a\n"),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("~~~python\n```\n~~~", "```\n"),
        ("````python\n```\n````", "```\n"),
        ("1. So:\n   ```python\n   if a:\n       b\n  c\n   ```", "if a:\n    b\nc\n"),
        ("```python\na\n```\nOutput:\n```\n7\n```", "a\n"),
        ("a `x` b", None),
        ("```python a```", None),
        ("", None),
        ("```python\n" * 20_000, None),
    ],
)
def test_the_last_closed_block(text: str, found: str | None) -> None:
    assert last_block(text) == found


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner)
        | st.sets(st.integers())
        | st.frozensets(st.text())
    ),
    max_leaves=10,
)


@given(values)
def test_plain_values_cross_unchanged(value: Any) -> None:
    crossed = plain.loads(plain.dumps(value).encode())
    assert crossed == value and type(crossed) is type(value)


def test_numbers_of_numpy_cross_as_pythons() -> None:
    assert plain.dumps([numpy.int64(3), numpy.bool_(True), numpy.float32(0.5)]) == "[3, true, 0.5]"


def test_results(tool: str) -> None:
    """(program, row, its accuracy): what the runtime around a program must give."""
    stdin = {"input_output": {"inputs": ["5\n"], "outputs": ["ok"]}}
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("import sys\nsys.stdin.readline()\nsys.stdout.write('ok')", stdin, 1),
        ("open(0).read(); print('ok')", stdin, 1),
        ("import sys, threading\nthreading.stack_size(1 << 26)\ndef main(): print('ok')\nthreading.Thread(target=main).start()", stdin, 1),
        ("def f(n): return n and 1 + f(n - 1)\nprint('ok' if f(20000) == 20000 else '')", stdin, 1),
        ("import atexit\natexit.register(lambda: print('ok'))", stdin, 1),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint('ok' if A(1) == A(1) else '')", stdin, 1),
        ("if __name__ == '__main__':\n    print('ok')\n    exit()", stdin, 1),
        ("print('ok')\nraise SystemExit(3)", stdin, 1),
        ("print('ok')\n1 / 0", stdin, 0),
        ("print('ok'", stdin, 0),
        ("print(heapq.nsmallest(1, deque([3]))[0] and 'ok', pow(2, 3, 5) and '')", stdin, 1),
        ("def f(x): return x\nif __name__ == '__main__':\n    print(f(int(input())))", {"test_list": ["assert f(1) == 1"]}, 1),
        ("def f(x): return (x, x)", {"input_output": {"inputs": [[1]], "outputs": [[1, 1]], "fn_name": "f"}}, 1),
        ("def f(x): return (x, x)", {"test_list": ["assert f(1) == (1, 1)"]}, 1),
        ("print(int(input()) + 1)", {"input_output": {"inputs": ["9" * 9000], "outputs": ["1" + "0" * 9000]}}, 1),
        ("def f(x): return x + 1", {"input_output": f'{{"fn_name": "f", "inputs": [[{"9" * 9000}]], "outputs": [1{"0" * 9000}]}}'}, 1),
        ("print('snan')", stdin, 0),
        ("def f(x): return [x, x]", {"test_list": ["assert f(1) == (1, 1)"]}, 0),
        ("def f(x): return {'a': {1, 2}, 2: None}", {"test_list": ["assert f(1) == {2: None, 'a': {2, 1}}"]}, 1),
    ]
    with Verifiers(reward()) as scorer:
        for source, row, accuracy in cases:
            assert scorer.score([(fenced(source), row)]) == [Verdict(float(accuracy))], source


@pytest.mark.slow
def test_partial_and_all_or_nothing() -> None:
    row = {"input_output": {"inputs": ["1", "2", "3", "4"], "outputs": ["1", "2", "0", "0"]}}
    slow = fenced("n = input()\nwhile n == '2': pass\nprint(n)")
    for partial, expected in ((False, 0.0), (True, 0.25)):
        with Verifiers(reward(partial=partial)) as scorer:
            assert scorer.score([(slow, row)]) == [Verdict(expected)]
    with Verifiers(reward(partial=True, timeout_s=4.0)) as scorer:
        assert scorer.score([(fenced("while 1: pass"), row), (fenced("print(input())"), row)]) == [Verdict(0.0), Verdict(0.5)]
