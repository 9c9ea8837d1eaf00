"""reasoning-gym: its tasks as data, and its scorers: final answers only, and no answer is evaluated."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megafork.data import verifiers
from megafork.data.reward import Verdict, Verifiers
from megafork.data.rows import read_row
from megafork.data.sources import read_rows
from megafork.recipe import Reward


@pytest.mark.slow
def test_reasoning_gym_scores_its_own_answers_fully_and_contained_answers_not_at_all() -> None:
    import reasoning_gym  # noqa: F401 - the registry fills at import
    from reasoning_gym.factory import DATASETS

    extract = {"gsm_symbolic", "kakurasu", "knights_knaves", "quantum_lock", "survo"}  # these scorers look for the answer in a text
    skipped = {"composite", "knight_swap", "sokoban", "futoshiki", "intermediate_integration"}  # no defaults; slow to make
    for task in sorted(set(DATASETS) - skipped):
        dataset = DATASETS[task][0](DATASETS[task][1](size=2, seed=1))
        for entry in (dataset[0], dataset[1]):
            row = {"prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}
            if entry["answer"] is not None:  # a few tasks have no single right answer
                assert verifiers.reasoning_gym(f"<think>hm</think> <answer> {entry['answer']}\n</answer>", row) == 1.0, task
                assert verifiers.reasoning_gym(f"I think {entry['answer']}", row) == float(task in extract), task
            for garbage in ("", "garbage", "{}", "[1,2", "[]", "7 x", "\\frac{1}{2}"):
                assert verifiers.reasoning_gym(garbage, row) in (0.0, float(garbage == entry["answer"])), (task, garbage)


@pytest.fixture(scope="module")
def gym() -> Iterator[Verifiers]:
    """Imports reasoning_gym, which takes seconds."""
    with Verifiers(Reward(verifier="reasoning_gym", workers=1)) as scorer:
        yield scorer


@pytest.mark.slow
def test_reasoning_gym_takes_the_final_answer_only(gym: Verifiers) -> None:
    rows = [row for _, row in read_rows("reasoning_gym:chain_sum:3:5", "data.train")]
    right = [str(row["answer"]) for row in rows]
    forms = ["{}", "<think>no</think>\n{} ", r"so \boxed{{{}}}", "<answer>1x</answer> <answer> {} </answer>"]
    wrong = ["the answer is {}", "{} or 5", "<think>{}</think>", "<answer>1x</answer>{}", r"<answer>1x</answer>\boxed{{{}}}"]
    for form in forms:
        assert gym.score([(form.format(a), r) for a, r in zip(right, rows, strict=True)]) == [Verdict(1.0)] * 3, form
    for form in wrong:
        assert gym.score([(form.format(a), r) for a, r in zip(right, rows, strict=True)]) == [Verdict(0.0)] * 3, form
    (foreign,) = gym.score([("7", {"prompt": "?", "answer": "7"})])
    assert foreign.accuracy == 0.0 and foreign.error is not None and "metadata.source_dataset" in foreign.error


@pytest.mark.slow
def test_reasoning_gym_scorers_that_raise_or_accept_anything_give_0(gym: Verifiers) -> None:
    """prime_factorization's raises on garbage; game_of_life_halting's takes every text for right."""
    sources = ["reasoning_gym:prime_factorization:1", "reasoning_gym:game_of_life_halting:1"]
    rows = [row for source in sources for _, row in read_rows(source, "data.train")]
    assert gym.score([("garbage", row) for row in rows]) == [Verdict(0.0)] * 2
    assert gym.score([(row["answer"], row) for row in rows]) == [Verdict(1.0)] * 2


EVALUATED = ["spiral_matrix", "binary_matrix", "n_queens", "string_insertion", "countdown", "puzzle24", "simple_integration"]


@pytest.mark.slow
def test_reasoning_gym_evaluates_no_answer(tmp_path: Path) -> None:
    """Not even those whose scorers call `eval`, or sympy's parser: the answer is a literal or a formula, or it is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megafork.data import tasks  # here: a source has an interpreter of its own
    rows = {task: row for task in EVALUATED for row in tasks.make(task, 1, 1)["rows"]}
    code = f"__import__('pathlib').Path({str(tmp_path / 'written')!r}).write_text('x')"
    attacks = [code, f"[{code}]", f"exec({code!r})", "(lambda: 24)()", f"[[{code}]]", f"24 if {code} else 24", f"Integer({code})"]
    with Verifiers(Reward(verifier="reasoning_gym", workers=1, isolation="process")) as scorer:
        for task, row in rows.items():
            assert verifiers.evaluates("reasoning_gym", row)
            items = [(f"<answer>{attack}</answer>", row) for attack in attacks]
            assert {verdict.accuracy for verdict in scorer.score(items)} == {0.0}, task
    assert not (tmp_path / "written").exists()


def test_reasoning_gym_takes_literals_and_formulas(gym: Verifiers) -> None:
    matrix = {"prompt": "?", "answer": "1 2 4 3", "metadata": {"source_dataset": "spiral_matrix"}}
    twenty_four = {"prompt": "?", "answer": None, "metadata": {"source_dataset": "puzzle24", "numbers": [2, 3, 4, 1]}}
    integral = {
        "prompt": "?",
        "answer": "",
        "metadata": {"source_dataset": "simple_integration", "variable": "x", "integrand": "2*x + cos(x)"},
    }
    verdicts = gym.score(
        [("[1, 2, 4, 3]", matrix), ("1 2 4 3", matrix), ("2*3*4*1", twenty_four), ("x**2 + sin(x) + C", integral), ("x**2", integral)]
    )
    assert [verdict.accuracy for verdict in verdicts] == [0, 1, 1, 1, 0]  # a list has a tenth of the marks


def test_every_scorer_of_reasoning_gym_that_evaluates_is_known() -> None:
    """A new version may have more of them."""
    import inspect

    import reasoning_gym  # noqa: F401 - the registry fills at import
    from reasoning_gym.factory import DATASETS

    found = {
        name
        for name, (kind, _) in DATASETS.items()
        if "score_answer" in vars(kind)
        and re.search(r"\b(eval|exec|parse_expr|sympify|verify_solution)\(", inspect.getsource(kind.score_answer))
    }
    known = {name for name in DATASETS if verifiers.evaluates("reasoning_gym", {"metadata": {"source_dataset": name}})}
    assert found - {"jugs"} == known  # its verify_solution evaluates nothing


# ---------------------------------------------------------------- its tasks as data


def test_reasoning_gym_rows() -> None:
    rows = [read_row(row, ("answer", "metadata"), {}) for _, row in read_rows("reasoning_gym:chain_sum:5:3", "data.train")]
    assert len(rows) == 5 and all(row["metadata"]["source_dataset"] == "chain_sum" for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["word_ladder", "list_functions"])
def test_reasoning_gym_rows_do_not_depend_on_the_process(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in the process that asks, the first would depend on Python's hash seed and the second on the global random state."""
    made = []
    for hash_seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        made.append(list(read_rows(f"reasoning_gym:{task}:10:3", "data.train")))
    assert made[0] == made[1]


@pytest.fixture(scope="module")
def tasks() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megafork.data import tasks
    return tasks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "alike"), [("chain_sum", 3), ("knights_knaves", 0), ("countdown", 0), ("word_ladder", 0), ("pool_matrix", 0)]
)
def test_no_two_seeds_share_items_whatever_the_sizes(task: str, alike: int, tasks: Any) -> None:
    """reasoning-gym alone draws item i from seed + i, and all of these would be shared. Of sums as short as 3 + 4 there are few."""
    trained = {row["prompt"] for row in tasks.make(task, 300, 0)["rows"]}
    for seed in (1, 7, 299):
        held_out = [row["prompt"] for row in tasks.make(task, 50, seed)["rows"]]
        assert sum(prompt in trained for prompt in held_out) <= alike, seed


@pytest.mark.slow
def test_every_tasks_own_answer_is_right_after_its_way_through_json(tasks: Any) -> None:
    """Its own scorer alone gives some texts less, or has none to give; what it gives full marks has them here too."""
    judged = 0
    for task in sorted(tasks.DATASETS):
        made = tasks.make(task, 3, 5)
        if "rows" not in made:
            assert task == "composite"
            continue
        items = list(made["rows"])
        for item, line in zip(items, tasks._lines({"rows": items}), strict=True):
            row = read_row(json.loads(line), ("answer", "metadata"), {})
            assert row["answer"] == item["answer"]
            entry = {"question": item["prompt"], "answer": item["answer"], "metadata": item["metadata"]}
            score = 0.0 if item["answer"] is None else verifiers._scorer(task)(item["answer"].strip(), entry)
            if score == 1.0 and "<answer>" not in item["answer"]:
                judged += 1
                assert verifiers.reasoning_gym(f"<answer>{item['answer']}</answer>", row) == 1.0, task
    assert judged > 250
