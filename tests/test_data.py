"""Data sources, prompts and their order: real files, real packages, and one clear line for every wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_rows import load, write
from tiny import CHAT, write_tokenizer

from megafork.data.prompts import Prompt, PromptOrder, fingerprint, load_prompts, without_training_prompts
from megafork.data.tokenizer import Tokenizer, load_tokenizer
from megafork.recipe import Data, RecipeError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=CHAT))


# ---------------------------------------------------------------- good data


PLAIN = [{"prompt": "1 + 2?", "answer": 3}, {"question": "what is 0?", "answer": 0}, {"problem": "2?", "answer": "2", "solution": "..."}]
DAPO = [
    {
        "data_source": "math_dapo",
        "prompt": [{"content": f"Solve the problem: {i} + 2", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(i + 2), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"uuid-{i}"},
    }
    for i in range(3)
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_plain_rows(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    prompts = load(write(tmp_path / name, PLAIN), tokenizer)
    assert [(p.index, p.text, p.row["prompt"], p.row["answer"]) for p in prompts] == [
        (0, "1 + 2?", "1 + 2?", "3"),
        (1, "what is 0?", "what is 0?", "0"),  # 0 is an answer
        (2, "2?", "2?", "2"),
    ]
    assert all(p.tokens == tuple(tokenizer.encode(p.text)) for p in prompts)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("template", ["chat", "User:\n{prompt}\nin \\boxed{}.\n"])
def test_dapo_math_rows(tokenizer: Tokenizer, tmp_path: Path, name: str, template: str) -> None:
    prompts = load(write(tmp_path / name, DAPO * 2), tokenizer, template=template)
    texts = [f"Solve the problem: {i} + 2" for i in range(3)]
    assert [p.text for p in prompts] == [tokenizer.chat(t) if template == "chat" else f"User:\n{t}\nin \\boxed{{}}.\n" for t in texts]
    assert [p.row["answer"] for p in prompts] == ["2", "3", "4"]
    assert prompts[1].row["extra_info"] == {"index": "uuid-1"}


def test_whole_messages_go_into_the_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1?"}]
    source = write(tmp_path / "rows.jsonl", [{"prompt": messages, "answer": 1}])
    assert load(source, tokenizer, template="chat")[0].text == tokenizer.chat(messages)
    with pytest.raises(RecipeError, match=r"rows.jsonl line 1 has 2 chat messages: only data.template=chat can join them"):
        load(source, tokenizer)


def test_supervised_rows_need_a_response_and_no_answer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "1?", "response": "one"}, {"prompt": "2?", "response": 2}])
    assert [
        p.row["response"] for p in load(write(tmp_path / "good.jsonl", [{"prompt": "1?", "response": "one"}]), tokenizer, ("response",))
    ]
    with pytest.raises(RecipeError, match=r"rows.jsonl line 2 has a response that is a int"):
        load(source, tokenizer, ("response",))


def test_duplicates_go_by_the_final_text_and_the_first_stays(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "1?", "answer": 1}, {"prompt": [{"role": "user", "content": "1?"}], "answer": 9}, {"prompt": "2?", "answer": 2}]
    source = write(tmp_path / "rows.jsonl", [*rows, rows[0]])
    remarks: list[str] = []
    assert [(p.index, p.row["answer"]) for p in load(source, tokenizer, remarks=remarks)] == [(0, "1"), (1, "2")]
    assert remarks == [
        "data.train: 2 of 4 rows repeat a prompt and are dropped, 1 of them with a different answer (first: rows.jsonl line 2)"
    ]
    assert [p.row["answer"] for p in load(source, tokenizer, deduplicate=False, remarks=remarks)] == ["1", "9", "2", "1"]
    assert len(remarks) == 1


def test_a_supervised_row_repeats_another_only_with_its_response(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "1?", "response": text} for text in ("a", "b", "a")])
    remarks: list[str] = []
    assert [p.row["response"] for p in load(source, tokenizer, ("response",), remarks=remarks)] == ["a", "b"]
    assert remarks == ["data.train: 1 of 3 rows repeat a prompt with its response and are dropped"]


def test_held_out_prompts_count_once_and_not_if_they_are_trained_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [{"prompt": f"{n}?", "answer": n} for n in range(3)])
    held_out = write(tmp_path / "held.jsonl", [{"prompt": f"{n}?", "answer": n} for n in (2, 3, 3, 4, 0)])
    data = Data(train=train, eval=held_out, deduplicate=False)
    remarks: list[str] = []
    trained = load_prompts(train, data, tokenizer)
    held = load_prompts(held_out, data, tokenizer, field="data.eval", remark=remarks.append)
    left = without_training_prompts(held, trained, held_out, remarks.append)
    assert [(p.index, p.text) for p in left] == [(0, "3?"), (1, "4?")]
    assert remarks == [
        "data.eval: 1 of 5 rows repeat a prompt with its answer and are not counted again",
        "data.eval: 2 of 4 prompts are training prompts too and are dropped (first: held.jsonl line 1 is train.jsonl line 3)",
    ]
    assert without_training_prompts(left, trained, held_out, remarks.append) == left and len(remarks) == 2
    with pytest.raises(RecipeError, match=r"^data.eval is 'copy.jsonl': all its 3 prompts are training prompts too"):
        without_training_prompts(trained, trained, "copy.jsonl", remarks.append)


def test_long_prompts_are_left_out_when_asked_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": text, "answer": 1} for text in ("1?", "0123456789", "2?", "01234567890")])
    settings: dict[str, Any] = {"add_bos": False, "max_prompt_length": 9, "overlong_prompts": "drop"}
    remarks: list[str] = []
    assert [(p.index, p.text) for p in load(source, tokenizer, remarks=remarks, **settings)] == [(0, "1?"), (1, "2?")]
    assert remarks == ["data.train: 2 of 4 rows have prompts over data.max_prompt_length=9 and are dropped (longest: 11 tokens)"]
    with pytest.raises(
        RecipeError, match=r"rows.jsonl line 2 has a prompt of 10 tokens, over data.max_prompt_length=9: raise the limit, set"
    ):
        load(source, tokenizer, **{**settings, "overlong_prompts": "refuse"})
    with pytest.raises(RecipeError, match="it has no rows that are short enough"):
        load(source, tokenizer, **{**settings, "max_prompt_length": 1})


@given(st.text(alphabet="ab{}\\ \n0:"), st.text(alphabet="ab{}\\ \n0:"), st.sampled_from(["x", "{prompt}", "{0} {", "}} \\boxed{7}"]))
def test_a_template_changes_nothing_but_its_mark(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, before: str, after: str, prompt: str
) -> None:
    source = write(tmp_path_factory.getbasetemp() / "template.jsonl", [{"prompt": prompt, "answer": 1}])
    assert load(source, tokenizer, template=before + "{prompt}" + after)[0].text == before + prompt + after


# ---------------------------------------------------------------- wrong data


GOOD = '{"prompt": "1?", "answer": 1}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + '{"prompt": "2?", ', "rows.jsonl line 2 is not valid JSON"),
        (GOOD + '{"prompt": "2?", "answer": 2, "answer": 3}', "line 2 is not valid JSON: .*the key 'answer' is there twice"),
        (GOOD + "\n\n[1, 2]\n", "rows.jsonl line 4 is a list: it must be one JSON object"),
        (GOOD + '{"answer": 2}', r'rows.jsonl line 2 has no prompt \(its fields: answer\): give it a "prompt"'),
        (GOOD + '{"prompt": null, "answer": 2}', "rows.jsonl line 2 has no prompt"),
        (GOOD + '{"question": "a", "problem": "b", "answer": 2}', 'line 2 has a "question" and a "problem" that differ: name the'),
        (GOOD + '{"prompt": " ", "answer": 2}', "rows.jsonl line 2 has an empty prompt"),
        (GOOD + '{"prompt": [], "answer": 2}', "rows.jsonl line 2 has an empty prompt"),
        (GOOD + '{"prompt": 7, "answer": 2}', "rows.jsonl line 2 has a prompt that is neither text nor a list"),
        (GOOD + '{"prompt": [{"role": "user", "content": ["x"]}], "answer": 2}', "line 2 has a prompt with a part without text"),
        (GOOD + '{"prompt": "2?"}', r"rows.jsonl line 2 has no answer \(its fields: prompt\)"),
        (GOOD + '{"prompt": "2?", "answer": ""}', r"rows.jsonl line 2 has no answer \(answer is ''\)"),
        (GOOD + '{"prompt": "2?", "reward_model": {"style": "rule"}}', "rows.jsonl line 2 has no answer"),
        (
            GOOD + '{"prompt": "1234567890", "answer": 2}',
            "line 2 has a prompt of 10 tokens, over data.max_prompt_length=9: raise the limit",
        ),
        ("\n", "it has no rows"),
        (b"\xff\xfe\n", "rows.jsonl line 1 is not valid JSON"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tokenizer: Tokenizer, tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match="^data.train.*" + message) as caught:
        load(str(path), tokenizer, add_bos=False, max_prompt_length=9)
    assert "\n" not in str(caught.value)


def test_the_length_limit_counts_the_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "12", "answer": 1}])
    assert len(load(source, tokenizer, template="34{prompt}", max_prompt_length=5)[0].tokens) == 5, "it begins with a token of its own"
    with pytest.raises(RecipeError, match=r"prompt of 6 tokens, over data.max_prompt_length=5"):
        load(source, tokenizer, template="345{prompt}", max_prompt_length=5)


def test_a_template_without_its_mark_is_refused_before_the_data_is_read(tokenizer: Tokenizer) -> None:
    with pytest.raises(RecipeError, match=r"data.template is 'Q: {}': write {prompt} where the prompt goes"):
        load("missing.jsonl", tokenizer, template="Q: {}")


# ---------------------------------------------------------------- order and fingerprint


def numbered(count: int) -> list[Prompt]:
    return [Prompt(i, str(i), (i,), {"prompt": str(i), "answer": i}) for i in range(count)]


@given(st.integers(1, 20), st.integers(0, 3), st.lists(st.integers(0, 45), max_size=5), st.integers(0, 45))
def test_a_restored_order_continues_exactly(count: int, seed: int, before: list[int], after: int) -> None:
    prompts = numbered(count)
    unbroken, broken = PromptOrder(prompts, seed), PromptOrder(prompts, seed)
    for n in before:
        assert unbroken.take(n) == broken.take(n)
    resumed = PromptOrder(prompts, seed)
    resumed.restore(json.loads(json.dumps(broken.state())))
    assert resumed.take(after) == unbroken.take(after)
    assert resumed.state() == unbroken.state()


@given(st.integers(1, 20), st.integers(0, 3))
def test_every_epoch_has_every_prompt_once(count: int, seed: int) -> None:
    order = PromptOrder(numbered(count), seed)
    for _ in range(3):
        assert sorted(p.index for p in order.take(count)) == list(range(count))


def test_epochs_and_seeds_are_shuffled_apart() -> None:
    order, other = PromptOrder(numbered(50), 1), PromptOrder(numbered(50), 2)
    epochs = [tuple(p.index for p in o.take(50)) for o in (order, order, other)]
    assert len({*epochs, tuple(range(50))}) == 4
    assert epochs[0][:4] == (5, 23, 41, 33), "by `sha256sum` of 1/0/INDEX: the same on any machine and Python"


def test_restore_refuses_a_position_beyond_the_data() -> None:
    with pytest.raises(RecipeError, match=r"data.train has 3 prompts but the checkpoint is at prompt 3"):
        PromptOrder(numbered(3), 0).restore({"epoch": 0, "position": 3})


def test_fingerprint_sees_every_change(tokenizer: Tokenizer) -> None:
    prompts = numbered(3)
    changed = [
        [*prompts[:2], Prompt(2, "2", (2,), {**prompts[2].row, "test_list": ["assert f(1) == 2"]})],
        prompts[:2],
        prompts[::-1],
        [*prompts[:2], Prompt(2, "x", (2,), prompts[2].row)],
        [*prompts[:2], Prompt(2, "2", (3,), prompts[2].row)],
        [*prompts[:2], Prompt(2, "2", (2,), {"prompt": "2", "answer": "2"})],
        [*prompts[:2], Prompt(2, "2", (2,), {"prompt": "2", "answer": 2, "response": "r"})],
    ]
    assert len({fingerprint(p) for p in [prompts, *changed]}) == 8
    assert fingerprint(numbered(3)) == fingerprint(prompts)
