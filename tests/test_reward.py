"""Verifiers: what counts as right, and that nothing a verifier does harms another item or outlives the run. Real processes throughout."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megafork.data import verifiers
from megafork.data.reward import Verdict, Verifiers, check_verifier, needs
from megafork.recipe import RecipeError, Reward

BAD_VERIFIER = r"""
import ctypes, os, signal, subprocess, sys, time

def score(response, row):
    if response == "raise":
        raise KeyError("no such\nkey")
    if response == "exit":
        sys.exit("leaving")
    if response == "sleep":
        time.sleep(600)
    if response == "busy":  # one C call that never returns to Python, with every polite signal ignored
        for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        9 ** 9 ** 9
    if response == "segfault":
        ctypes.string_at(0)
    if response == "die":
        os._exit(3)
    if response == "print":
        print("noise " * 1000, flush=True)
        os.write(1, b"more noise")
        os.write(2, b"")
    if response == "grandchild":
        child = subprocess.Popen(["sleep", "600"])
        open(row["file"], "w").write(str(child.pid))
        time.sleep(600)
    return row["value"]

def pid(response, row):
    open(row["file"], "a").write(f"{os.getpid()}\n")
    return True

not_a_function = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # FILE.py is relative to the working directory
    (tmp_path / "bad.py").write_text(BAD_VERIFIER)
    return tmp_path


def reward(verifier: str, *, timeout_s: float = 10.0, workers: int = 1, isolation: Literal["full", "process"] | None = None) -> Reward:
    return Reward(verifier=verifier, timeout_s=timeout_s, workers=workers, isolation=isolation)


# ---------------------------------------------------------------- a verifier that misbehaves


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("raise", "KeyError: 'no such\\nkey'"),
        ("exit", "SystemExit: leaving"),
        ("sleep", "timeout: no verdict within 2 s"),
        ("busy", "timeout: no verdict within 2 s"),
        ("segfault", "the verifier process died of SIGSEGV"),
        ("die", "the verifier process ended with exit code 3"),
        ("print", None),
    ],
)
def test_one_bad_item_harms_no_other(folder: Path, response: str, expected: str | None) -> None:
    good = [(f"fine {i}", {"value": i / 8}) for i in range(8)]
    with Verifiers(reward("bad.py:score", timeout_s=2.0)) as scorer:
        verdicts = scorer.score([*good[:4], (response, {"value": 1.0}), *good[4:]])
        again = scorer.score(good)
    bad = verdicts.pop(4)
    assert bad == (Verdict(1.0) if expected is None else Verdict(0.0, expected))
    assert verdicts == again == [Verdict(i / 8) for i in range(8)]


@pytest.mark.slow
def test_every_misbehaviour_at_once_over_several_workers_keeps_the_order(folder: Path) -> None:
    kinds = ["fine", "sleep", "raise", "segfault", "fine", "print", "die", "busy", "fine"] * 2
    with Verifiers(reward("bad.py:score", timeout_s=2.0, workers=3)) as scorer:
        verdicts = scorer.score([(kind, {"value": 1}) for kind in kinds])
    assert [verdict.accuracy for verdict in verdicts] == [float(kind in ("fine", "print")) for kind in kinds]
    assert [verdict.error is None for verdict in verdicts] == [kind in ("fine", "print") for kind in kinds]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, Verdict(1.0)),
        (0.25, Verdict(0.25)),
        (float("nan"), Verdict(0.0, "the verifier returned nan: an accuracy is between 0 and 1")),
        (float("inf"), Verdict(0.0, "the verifier returned inf: an accuracy is between 0 and 1")),
        (-0.1, Verdict(0.0, "the verifier returned -0.1: an accuracy is between 0 and 1")),
        (1.5, Verdict(0.0, "the verifier returned 1.5: an accuracy is between 0 and 1")),
        (None, Verdict(0.0, "TypeError: the verifier returned None: it must be a number or a bool")),
        ("1", Verdict(0.0, "TypeError: the verifier returned '1': it must be a number or a bool")),
    ],
)
def test_values_that_are_no_accuracy_are_errors(folder: Path, value: Any, expected: Verdict) -> None:
    with Verifiers(reward("bad.py:score")) as scorer:
        assert scorer.score([("fine", {"value": value})]) == [expected]


def test_a_worker_that_died_while_idle_costs_no_item(folder: Path) -> None:
    item = ("fine", {"file": "pids"})
    with Verifiers(reward("bad.py:pid", isolation="process")) as scorer:
        scorer.score([item])
        os.kill(int(Path("pids").read_text()), signal.SIGKILL)
        time.sleep(0.1)
        assert scorer.score([item, item]) == [Verdict(1.0), Verdict(1.0)]


def test_what_a_killed_verifier_started_dies_too(folder: Path) -> None:
    with Verifiers(reward("bad.py:score", timeout_s=0.5, isolation="process")) as scorer:
        scorer.score([("grandchild", {"file": "child"})])
    assert gone([int(Path("child").read_text())])


def test_an_empty_batch_and_closing(folder: Path) -> None:
    with Verifiers(reward("bad.py:pid", workers=2, isolation="process")) as scorer:
        assert scorer.score([]) == []
        scorer.score([("fine", {"file": "pids"})] * 20)
    assert gone([int(line) for line in Path("pids").read_text().split()])


@pytest.mark.parametrize("response", ["fine", "busy"])
def test_kill_9_of_the_parent_leaves_no_worker(folder: Path, response: str) -> None:
    """Idle or stuck in C code with signals ignored: the workers die with the process that started them."""
    script = (
        "from megafork.data.reward import Verifiers; from megafork.recipe import Reward; import time\n"
        "scorer = Verifiers(Reward(verifier='bad.py:score', workers=2, timeout_s=600))\n"
        f"print('up', flush=True); scorer.score([({response!r}, {{'value': 1}})] * 2); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
    time.sleep(0.2)
    started = psutil.Process(parent.pid).children(recursive=True)
    workers = [child.pid for child in started if "megafork.data.verdicts.worker" in child.cmdline()]
    assert len(workers) >= 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(workers)


def gone(pids: list[int], within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
            return True
        time.sleep(0.02)
    return False


def test_a_worker_imports_neither_torch_nor_the_recipe() -> None:
    script = (
        "import sys, megafork.data.verdicts.worker; print([name for name in ('torch', 'pydantic', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---------------------------------------------------------------- refused before the run


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ("maths", "did you mean 'math'?"),
        ("zzz", "known are exact, math, reasoning_gym, code, or give FILE.py:FUNCTION"),
        ("bad.py", "or give FILE.py:FUNCTION"),
        ("bad.py:", "or give FILE.py:FUNCTION"),
        ("missing.py:score", "no such file"),
    ],
)
def test_check_needs_no_process(folder: Path, verifier: str, message: str) -> None:
    with pytest.raises(RecipeError, match="^reward.verifier is .*" + message.replace("?", r"\?")):
        check_verifier(reward(verifier))


def workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.ZombieProcess):  # of another test, ended and not yet waited for
            found += [child] if "megafork.data.verdicts.worker" in child.cmdline() else []
    return found


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ("bad.py:missing", "AttributeError: .*missing"),
        ("bad.py:not_a_function", "TypeError: not_a_function is a int, not a function"),
        ("syntax.py:f", "SyntaxError"),
        ("imports.py:f", "ModuleNotFoundError: No module named 'nowhere'"),
        ("exits.py:f", "SystemExit: 4"),
        ("dies.py:f", "the verifier process ended with exit code 5"),
        ("others.py:verl", r"TypeError: verl is called as verl\(response, row\): missing a required argument: 'ground_truth'"),
        ("others.py:late", "TypeError: late is async"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_one_recipe_error(folder: Path, verifier: str, message: str) -> None:
    (folder / "syntax.py").write_text("def f(:")
    (folder / "imports.py").write_text("import nowhere")
    (folder / "exits.py").write_text("raise SystemExit(4)")
    (folder / "dies.py").write_text("import os; os._exit(5)")
    (folder / "others.py").write_text("def verl(source, solution, ground_truth, extra=None): ...\nasync def late(response, row): ...")
    with pytest.raises(RecipeError, match=f"^reward.verifier is '{verifier}': it cannot be loaded.*{message}") as caught:
        Verifiers(reward(verifier, workers=2))
    assert "\n" not in str(caught.value)
    assert not workers(), "a failed start leaves no process"


def test_a_verifier_file_may_import_its_neighbours(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "mine.py").write_text("from rule import right\ndef f(response, row): return right(response, row)")
    (folder / "sub" / "rule.py").write_text("def right(response, row): return response == row['answer']")
    with Verifiers(reward("sub/mine.py:f")) as scorer:
        assert scorer.score([("a", {"answer": "a"}), ("b", {"answer": "a"})]) == [Verdict(1.0), Verdict(0.0)]


def test_needs_names_what_a_row_must_have() -> None:
    assert [needs(reward(name)) for name in ("exact", "math", "reasoning_gym", "mine.py:f")] == [
        ("answer",),
        ("answer",),
        ("answer", "metadata"),
        (),
    ]


# ---------------------------------------------------------------- what is right


@pytest.mark.parametrize(
    ("response", "answer", "accuracy"),
    [("7", 7, 1), (" 7\n", "7", 1), ("<think>8</think> 7", 7, 1), ("<think>7</think> 8", 7, 0), ("7.0", 7, 0), ("", 0, 0), ("0", 0, 1)],
)
def test_exact(response: str, answer: Any, accuracy: float) -> None:
    assert verifiers.exact(response, {"answer": answer}) == accuracy


MATH = [
    (r"\boxed{1/2}", "0.5", 1),
    (r"\boxed{0.5}", r"\frac{1}{2}", 1),
    (r"so \boxed{\dfrac{1}{2}}.", "$1/2$", 1),
    (r"\boxed{34}", 34, 1),
    (r"\boxed{34}", r"the answer is \boxed{34}", 1),
    (r"\boxed{1} and then \boxed{2}", 2, 1),  # the last box wins, and boxes are not merged to {1, 2}
    (r"\boxed{2} and then \boxed{1}", 2, 0),
    (r"\boxed{1} and \boxed{2}", "1,2", 0),
    (r"<think>\boxed{7}</think> done", 7, 0),
    (r"<think>\boxed{8}</think> \boxed{7}", 7, 1),
    (r"\boxed{7} </think> a </think> \boxed{8}", 7, 0),
    (r"<think>it may be \boxed{7}, but", 7, 0),  # cut off
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\sqrt{3}/2", 1),
    (r"\boxed{\left\{ 1, 2 \right.}", 7, 0),
    (r"\boxed{\boxed{5}}", 5, 1),
    (r"\boxed{3} then cut off \boxed{4", 3, 1),
    (r"7", 7, 0),
    ("", 7, 0),
    (r"\boxed{}", 7, 0),
    (r"\boxed{@@ %$ garbage \frac{}{{}", 7, 0),
    (r"\boxed{" * 50, 7, 0),
]


def test_math() -> None:
    with Verifiers(reward("math")) as scorer:
        verdicts = scorer.score([(response, {"answer": answer}) for response, answer, _ in MATH])
        assert verdicts == [Verdict(float(accuracy)) for _, _, accuracy in MATH]
        (missing,) = scorer.score([(r"\boxed{7}", {"answer": None})])
    assert missing == Verdict(0.0, "ValueError: the row has no answer to compare with")


@pytest.mark.slow
def test_math_is_stopped_where_its_own_alarm_cannot() -> None:
    """A tower of powers keeps sympy in one power of huge integers, where no Python signal handler runs."""
    items = [(r"\boxed{7}", {"answer": 7}), (r"\boxed{9^{9^{9}}}", {"answer": 7}), (r"\boxed{7}", {"answer": 7})]
    with Verifiers(reward("math", timeout_s=5.0)) as scorer:
        verdicts = scorer.score(items)
    assert verdicts == [Verdict(1.0), Verdict(0.0, "timeout: no verdict within 5 s"), Verdict(1.0)]


def last_boxed_quadratic(text: str) -> str | None:
    """Each start by itself: what `last_boxed` finds in one pass."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for token in re.finditer(r"\\.|[{}]", text[start:], flags=re.DOTALL):
            depth += {"{": 1, "}": -1}.get(token[0], 0)
            if depth == 0:
                return text[start : start + token.start()]
    return None


@given(st.lists(st.sampled_from(["\\boxed{", "\\boxed {", "\\", "{", "}", "a", " "]), max_size=14).map("".join))
def test_last_boxed_equals_its_definition(text: str) -> None:
    assert verifiers.last_boxed(text) == last_boxed_quadratic(text)


@pytest.mark.parametrize("text", [r"\boxed{" * 200_000, "{" * 10**6 + r"\boxed{7" + "}" * 10, "<answer>" * 10**6, "\\boxed" + " " * 10**6])
def test_finding_the_answer_takes_linear_time(text: str) -> None:
    begin = time.process_time()
    verifiers.final_answer(text)
    assert time.process_time() - begin < 5


@given(st.text(alphabet="ab{}\\ \n", max_size=30), st.text(alphabet="ab \n", max_size=10), st.text(alphabet="ab}\\ ", max_size=10))
def test_last_boxed_finds_the_balanced_content(before: str, content: str, after: str) -> None:
    assert verifiers.last_boxed(f"{before} \\boxed{{{content}{{{content}}}\\}}}}{after}") == f"{content}{{{content}}}\\}}"
