"""How rows are read: the meaning of columns, and answers, chat messages and supervised rows in every form found in public datasets."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megafork.data import verifiers
from megafork.data.answers import answer_text
from megafork.data.messages import RowError, read_messages
from megafork.data.plain_json import DEEPEST, parse
from megafork.data.rows import read_row
from megafork.data.sources import read_rows

USER = {"role": "user", "content": "2+2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
FOUR = {"role": "assistant", "content": "4"}


def judged(row: dict[str, Any], **columns: str) -> tuple[Any, Any]:
    """Prompt and answer, as the verifiers `exact` and `math` need them."""
    read = read_row(row, ("answer",), columns)  # type: ignore[arg-type]
    return read["prompt"], read["answer"]


def supervised(row: dict[str, Any], **columns: str) -> tuple[Any, Any]:
    read = read_row(row, ("response",), columns)  # type: ignore[arg-type]
    return read["prompt"], read["response"]


# ---------------------------------------------------------------- columns

FORMS: dict[str, dict[str, Any]] = {
    "own": {"prompt": "2+2?", "answer": "4"},
    "GSM8K": {"question": "2+2?", "answer": "Two and two make 2+2=<<2+2=4>>4.\n#### 4"},
    "AIME": {"id": 60, "problem": "2+2?", "solution": "So \\boxed{4}.", "answer": "4", "year": "2024"},
    "OpenMathInstruct": {"problem": "2+2?", "generated_solution": "...", "expected_answer": "4", "problem_source": "math"},
    "NeMo-RL": {"input": "2+2?", "output": "4"},
    "verl": {"data_source": "x", "prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"index": 0}},
    "verl as JSON text": {"prompt": json.dumps([USER]), "reward_model": '{"ground_truth": "4"}'},
    "Skywork": {"prompt": [USER], "reward_model": {"ground_truth": '["4"]'}},
    "TRL": {"prompt": [USER], "solution": "4"},
    "DAPO in TRL": {"prompt": "2+2?", "solution": "$$\\boxed{4}$$"},
    "MATH": {"problem": "2+2?", "level": "1", "solution": "We add.\nSo it is $\\boxed{4}$."},
    "OlympiadBench": {"question": "2+2?", "final_answer": ["$4$"], "solution": ["..."]},
    "chat": {"messages": [USER], "answer": 4},
    "chat with its answer": {"messages": [USER, FOUR], "answer": "4"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "ground_truth": "4"},
    "MetaMath": {"query": "2+2?", "answer": "4", "response": "The answer is: 4"},
    "open-r1": {"problem": "2+2?", "prompt": "Solve: 2+2?", "answer": "4"},
    "content parts": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}],
        "answer": "4",
    },
    "float": {"prompt": "2+2?", "answer": 4.0},
    "choices in the question": {"question": "2+2?", "options": ["2", "7"], "answer": "4"},
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "json"])
def test_public_forms_are_read_by_themselves(name: str, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([FORMS[name]]), file)
    else:
        file.write_text(json.dumps(FORMS[name] if ending == "jsonl" else [FORMS[name]], indent=None if ending == "jsonl" else 1))
    ((_, raw),) = read_rows(str(file), "data.train")
    assert judged(raw) == ("Solve: 2+2?" if name == "open-r1" else "2+2?", "4")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"question": "a?", "problem": "b?", "answer": 1},
            'has a "question" and a "problem" that differ: name the prompt\'s column in data.columns',
        ),
        ({"prompt": "a?", "question": "b?", "answer": 1}, 'has a "prompt" and a "question" that differ'),
        ({"question": "a?", "choices": ["5", "four"], "answer": 1}, "has choices that its question does not mention: write them into it"),
        ({"question": "a?", "choices": {"label": ["A"], "text": ["5"]}, "answer": 1}, "has choices that its question does not mention"),
        ({"messages": [USER], "instruction": "b?", "answer": 1}, 'has a "messages" and a "instruction" that differ'),
        ({"prompt": "a?", "answer": "1", "expected_answer": "2"}, "has a answer '1' and a expected_answer '2': name the answer's column"),
        ({"prompt": "a?", "answer": "1", "reward_model": {"ground_truth": "2"}}, r"a answer '1' and a reward_model.ground_truth '2'"),
        ({"prompt": "a?", "final_answer": ["1", "2"], "answer": "1"}, r"has a answer '1' and a final_answer '1, 2'"),
    ],
)
def test_columns_that_disagree_are_both_named(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        judged(row)


def test_data_columns_say_which_is_meant() -> None:
    row = {
        "question": "a?",
        "problem": "b?",
        "answer": "rationale",
        "expected_answer": "2",
        "meta": {"gold": 7, "deep": {"er": "9"}},
        "dot.ted": "x",
    }
    assert judged(row, prompt="problem", answer="expected_answer") == ("b?", "2")
    assert judged(row, prompt="question", answer="meta.gold") == ("a?", "7")
    assert judged(row, prompt="question", answer="meta.deep.er") == ("a?", "9")
    assert judged(row, prompt="dot.ted", answer="answer") == ("x", "rationale")
    with pytest.raises(RowError, match=r"has no column 'gold', which data.columns.answer names \(its fields: question, "):
        judged(row, prompt="question", answer="gold")
    assert read_row({"prompt": "1?", "answer": 1}, ("answer",), {"answer": "gold"}, everywhere=False)["answer"] == "1"
    assert supervised({"prompt": "1?", "reply": "one"}, answer="gold", response="reply") == ("1?", "one"), "one recipe for train and sft"


def test_a_verifier_of_ones_own_gets_the_row_as_it_is() -> None:
    row = {"question": "2+2?", "ground_truth": {"target": ["4", "four"]}, "tests": [1, 2]}
    assert read_row(row, (), {}) == {**row, "prompt": "2+2?", "answer": {"target": ["4", "four"]}}


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"), (7.0, "7"), (-0.0, "0"), (0, "0"), (0.5, "0.5"), (1e-07, "0.0000001"), (1e22, "1" + "0" * 22), (-1250.0, "-1250"),
        (Decimal("7.50"), "7.5"), (Decimal("7"), "7"), ("7.0", "7.0"), (" 7", " 7"), (["7"], "7"), ([7.0], "7"), (["$7$", None], "7"),
        ("a\n#### 1,250", "1,250"), ("#### 7\n", "7"), ("##\n####", "##\n####"), ("####  ##", "####  ##"), ("[1, 2]", "[1, 2]"),
        ("True", "True"),
    ],
)  # fmt: skip
def test_answers_are_one_text(value: Any, text: str) -> None:
    assert answer_text(value, "answer") == text


@given(st.integers(-(10**6), 10**6))
def test_whole_numbers_are_judged_alike_in_every_type(number: int) -> None:
    """pandas makes 7.0 of the 7 of a column where another answer is missing."""
    for value in (number, float(number), str(number), Decimal(number), [number]):
        _, answer = judged({"prompt": "?", "answer": value})
        assert verifiers.exact(str(number), {"answer": answer}) == 1.0


@pytest.mark.parametrize(
    "value", [True, False, {"target": ["7"]}, ["7", "seven"], [["7"], ["8"]], [{"a": 1}], float("inf"), b"7", datetime.date(2024, 1, 2)]
)
@pytest.mark.parametrize("where", ["answer", "ground_truth", "reward_model"])
def test_what_no_response_can_equal_is_refused(value: Any, where: str) -> None:
    row = {"prompt": "?", where: {"ground_truth": value} if where == "reward_model" else value}
    with pytest.raises(RowError, match=rf"has a {where}.*(no response could equal it|a verifier compares with one text)"):
        judged(row)


@pytest.mark.parametrize("text", ['["7", "seven"]', '{"target": ["7"]}', "{}"])
def test_json_text_of_verls_ground_truth_is_read_as_what_it_says(text: str) -> None:
    with pytest.raises(RowError, match=r"has (a reward_model.ground_truth|no answer)"):
        judged({"prompt": "?", "reward_model": {"ground_truth": text}})
    assert judged({"prompt": "?", "answer": text}) == ("?", text), "an answer may be JSON"


@pytest.mark.parametrize("value", [None, float("nan"), Decimal("NaN"), "", " \n", [], {}, [None], "nan"])
def test_missing_answers_are_missing_in_every_notation(value: Any) -> None:
    with pytest.raises(RowError, match=r"has no answer|has a answer of 0 parts"):
        judged({"prompt": "?", "answer": value})
    if value != [None]:
        assert judged({"prompt": "?", "answer": value, "expected_answer": "7"}) == ("?", "7")


@pytest.mark.parametrize(
    ("text", "what"), [("half \ud83d", "half of a surrogate pair"), ("\udc00", "half of a surrogate pair"), ("a\0b", "a NUL character")]
)
def test_text_that_no_model_writes_is_refused_wherever_it_is(text: str, what: str) -> None:
    for row in (
        {"prompt": text, "answer": "7"},
        {"prompt": "?", "answer": text},
        {"messages": [SYSTEM, {"role": "user", "content": text}], "answer": 1},
    ):
        with pytest.raises(RowError, match=f"has {what} in its"):
            judged(row)
    for row in ({"prompt": "?", "response": text}, {"instruction": "?", "input": text, "output": "x"}, {"prompt": text, "completion": "x"}):
        with pytest.raises(RowError, match=f"has {what} in its"):
            supervised(row)


@pytest.mark.parametrize("solution", ["First this.\nThen that.", r"It is $\boxed{2$."])
def test_a_solution_that_does_not_say_its_answer_is_refused(solution: str) -> None:
    with pytest.raises(RowError, match=r"has a solution without a \\boxed"):
        judged({"problem": "?", "solution": solution})


@pytest.mark.parametrize(("box", "answer"), [(r"\boxed 2.5", "2.5"), (r"\boxed \frac{1}{2}", r"\frac{1}{2}"), (r"\fbox{42}", "42")])
def test_the_other_boxes_of_math(box: str, answer: str) -> None:
    assert judged({"problem": "?", "solution": f"In short, it is ${box}$."}) == ("?", answer)


GENERATED = {"source_dataset": "chain_sum", "source_index": 0}


def test_metadata_of_reasoning_gym_may_be_json_text() -> None:
    read = read_row({"prompt": "?", "answer": "7", "metadata": json.dumps(GENERATED)}, ("answer", "metadata"), {})
    assert read["metadata"] == GENERATED
    assert read_row({"prompt": "?", "answer": None, "metadata": GENERATED}, ("answer", "metadata"), {})["answer"] is None
    assert read_row({"prompt": "?", "answer": "", "metadata": GENERATED}, ("answer", "metadata"), {})["answer"] == ""
    for metadata in (None, "", "{", "[]", "7", {}, {"source_dataset": 7}, '{"other": 1}'):
        with pytest.raises(RowError, match=r"has no metadata.source_dataset"):
            read_row({"prompt": "?", "answer": "7", "metadata": metadata}, ("answer", "metadata"), {})


# ---------------------------------------------------------------- messages


def test_arrows_nulls_do_not_reach_the_template(tmp_path: Path) -> None:
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    rows = [
        {"prompt": [SYSTEM, {**USER, "tool_calls": None, "name": None}], "answer": "4"},
        {
            "prompt": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "content": "4", "name": "add"},
                USER,
            ],
            "answer": "4",
        },
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second = (read_row(raw, ("answer",), {})["prompt"] for _, raw in read_rows(str(tmp_path / "rows.parquet"), "data.train"))
    assert first == [SYSTEM, USER]
    assert second == [USER, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "4", "name": "add"}, USER]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([{"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "?"}]}], "a part of type 'image'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}, "text": None}]}], "a part of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a part without text"),
        ([{"role": "user", "content": {"text": "?"}}], "whose content is neither text nor text parts"),
        ([{"role": "user", "content": None}], "whose content is neither text nor text parts"),
        ([{"content": "?"}], "a message without a role"),
        (["?"], "neither text nor a list"),
        ({"role": "user", "content": "?"}, "neither text nor a list"),
        ([USER, FOUR], "whose last turn is the assistant's"),
        ("[{'role': 'user', 'content': '2+2?'}]", "looks like chat messages but is not JSON"),
        ('[{"role": "user", "content": "2+2?"}, ]', "looks like chat messages but is not JSON"),
        ("[" * 100, None),
        ('[{"role": "admin"}] is what kind of JSON?', None),
    ],
)
def test_prompts_that_are_no_messages(prompt: Any, reason: str | None) -> None:
    if reason is None:
        assert judged({"prompt": prompt, "answer": "4"})[0] == prompt
    else:
        with pytest.raises(RowError, match=reason):
            judged({"prompt": prompt, "answer": "4"})


def test_a_picture_beside_its_mark_is_refused() -> None:
    with pytest.raises(RowError, match="has a <image> in its prompt and a column for it"):
        judged({"prompt": [{"role": "user", "content": "<image>What is it?"}], "images": [b"png"], "answer": "4"})
    assert judged({"prompt": "What does <image> mean in HTML?", "answer": "4"}) == ("What does <image> mean in HTML?", "4")


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_reading_messages_raises_nothing_but_row_errors(value: Any) -> None:
    for form in (value, [value], {"messages": value}, [{"role": "user", "content": value}], json.dumps([{"role": value}])):
        try:
            read_messages(form, "prompt")
        except RowError as error:
            assert "\n" not in str(error)


@given(st.integers(1, 3 * DEEPEST), st.sampled_from(["[", '{"a":']))
def test_json_is_refused_beyond_a_depth_that_every_process_can_read(depth: int, opening: str) -> None:
    text = opening * depth + "1" + ("]" if opening == "[" else "}") * depth
    if depth <= DEEPEST:
        assert parse(text) is not None
    else:
        with pytest.raises(ValueError, match="nested too deeply"):
            parse(text)


# ---------------------------------------------------------------- supervised rows

SUPERVISED: dict[str, dict[str, Any]] = {
    "own": {"prompt": "2+2?", "response": "4"},
    "completion": {"prompt": "2+2?", "completion": "4"},
    "TRL's messages": {"prompt": [USER], "completion": [FOUR]},
    "messages": {"messages": [USER, FOUR]},
    "messages as JSON text": {"messages": json.dumps([USER, FOUR])},
    "what follows the last turn": {"messages": [USER, FOUR, {"role": "user", "content": "Thanks."}]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "Alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
    "NeMo-RL": {"input": "2+2?", "output": "4"},
    "ultrachat": {"prompt": "2+2?", "prompt_id": "x", "messages": [USER, FOUR]},
    "OpenMath": {"problem": "2+2?", "generated_solution": "4", "expected_answer": "four"},
    "GSM8K": {"question": "2+2?", "response": "4", "answer": "#### 4"},
    "both, alike": {"prompt": "2+2?", "response": "4", "messages": [USER, FOUR]},
}


@pytest.mark.parametrize("name", SUPERVISED)
def test_public_supervised_forms(name: str) -> None:
    assert supervised(SUPERVISED[name]) == ("2+2?", "4")


def test_of_several_turns_the_last_of_the_assistant_is_trained() -> None:
    turns = [SYSTEM, USER, FOUR, {"role": "user", "content": "And 3+3?"}, {"role": "assistant", "content": "6"}]
    assert supervised({"messages": turns}) == (turns[:-1], "6")
    assert supervised({"instruction": "Add.", "input": "2 2", "output": "4"}) == ("Add.\n2 2", "4")
    said = {"system": "Be brief.", "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}
    assert supervised(said) == ([SYSTEM, USER], "4")
    assert supervised({"a": "2+2?", "b": "4", "c": "5"}, prompt="a", response="b") == ("2+2?", "4")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "?"}, r"has no response \(its fields: prompt\)"),
        ({"messages": [USER]}, "has no response"),
        ({"messages": [FOUR]}, "has no response"),
        ({"prompt": "?", "response": " "}, "has no response"),
        ({"prompt": "?", "response": 2}, "has a response that is a int"),
        ({"prompt": "?", "response": [USER, FOUR]}, "has a response of 2 messages"),
        ({"prompt": "2+2?", "response": "5", "messages": [USER, FOUR]}, 'has a "messages" and a "response" that differ'),
        ({"prompt": "2+2?", "response": "5", "completion": "4"}, 'has a "response" and a "completion" that differ'),
        ({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}]}, "has tool_calls: only its content"),
        ({"messages": [USER, {**FOUR, "reasoning_content": "hm"}]}, "has reasoning_content: only its content is trained"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "is empty"),
        ({"instruction": "?", "output": "4", "history": [["a", "b"]]}, "has history next to its instruction"),
        ({"messages": [USER, FOUR], "tools": [{"name": "add"}]}, "has tools next to its messages"),
    ],
)
def test_supervised_rows_that_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        supervised(row)
