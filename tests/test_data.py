"""Tokenizer, data sources, prompts and their order: real files, real packages, and one clear line for every wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHAT, SPECIAL, write_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models

from megafork.data import verifiers
from megafork.data.prompts import Prompt, PromptOrder, fingerprint, load_prompts, without_training_prompts
from megafork.data.tokenizer import Tokenizer, load_tokenizer
from megafork.recipe import Data, RecipeError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=CHAT))


# ---------------------------------------------------------------- tokenizer


@given(st.text())
def test_a_part_is_encoded_as_it_is_and_decode_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, first=())
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    if not any(name in text for name in SPECIAL):
        assert tokenizer.decode(ids) == text and not set(ids) & {0, 1, 2}


@given(st.text())
def test_raw_text_is_encoded_as_the_tokenizer_does_but_never_begins_twice(tokenizer: Tokenizer, text: str) -> None:
    whole, part = tokenizer.backend(text)["input_ids"], tokenizer.encode(text, first=())
    assert tokenizer.encode(text) == (part if text.startswith("<|end|>") else whole)


@given(st.lists(st.integers(0, 258), max_size=6), st.lists(st.sampled_from([0, 2]), max_size=3))
def test_only_what_ended_a_response_is_left_out_of_its_text(tokenizer: Tokenizer, inside: list[int], ends: list[int]) -> None:
    """Ids 0 and 2 end a response here, 1 is special too."""
    stops = Tokenizer(tokenizer.path, tokenizer.backend, (0, 2))
    said = [*inside, 1]
    assert stops.decode([*said, *ends]) == tokenizer.backend.decode(said, skip_special_tokens=False)


def test_tags_that_are_special_tokens_reach_the_verifier(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, additional_special_tokens=["<think>", "</think>", "<answer>", "</answer>"]))
    inside_alone = r"<think>I am \boxed{7}</think> the answer is 8"
    answered = "<think>7?</think>no: <answer>8</answer>"
    for text in (inside_alone, answered):
        assert tokenizer.decode([*tokenizer.encode(text, first=()), *tokenizer.eos_ids]) == text
    assert verifiers.math(tokenizer.decode(tokenizer.encode(inside_alone, first=())), {"answer": "7"}) == 0.0
    assert verifiers.final_answer(tokenizer.decode(tokenizer.encode(answered, first=()))) == "8"


@given(st.lists(st.integers(0, 258)))
def test_pieces_join_to_the_text_of_any_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Also ids that are no valid UTF-8, and special tokens."""
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.backend.decode(ids, skip_special_tokens=False)


def test_pieces_show_split_characters_once_and_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("1 + 😀2", first=()) + list(tokenizer.eos_ids)
    assert len(tokenizer.encode("😀", first=())) == 4
    assert tokenizer.pieces(ids)[-6:] == ["", "", "", "😀", "2", "<|end|>"]
    assert tokenizer.decode(ids) == "1 + 😀2"


@given(st.lists(st.sampled_from([3, 4, 188, 300, 100_000]), max_size=8))
def test_ids_that_only_a_padded_embedding_has_are_shown(tokenizer: Tokenizer, ids: list[int]) -> None:
    """188 is a byte that finishes no character by itself."""
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
    assert "".join(pieces).count("<id 300>") == ids.count(300) and "".join(pieces).count("<id 100000>") == ids.count(100_000)


@pytest.mark.parametrize(
    ("generation", "expected"), [(None, (0,)), ({"eos_token_id": 2}, (0, 2)), ({"eos_token_id": [2, 0]}, (0, 2)), ({"top_p": 1}, (0,))]
)
def test_eos_ids_are_the_tokenizers_and_the_generation_configs(tmp_path: Path, generation: Any, expected: tuple[int, ...]) -> None:
    path = write_tokenizer(tmp_path)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_tokenizer(path).eos_ids == expected


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [([0, 2], None, (0, 2)), (2, None, (0, 2)), (2, {"eos_token_id": 1}, (0, 1)), (2, {"top_p": 1}, (0,)), (None, None, (0,))],
)
def test_config_json_names_ends_where_there_is_no_generation_config(tmp_path: Path, config: Any, generation: Any, expected: Any) -> None:
    path = write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_tokenizer(path).eos_ids == expected


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("ends", [-1, "<|end|>", True, 2.0, [0, "2"], [[0]], {"id": 0}])
def test_ends_that_are_no_ids_are_refused(tmp_path: Path, name: str, ends: Any) -> None:
    path = write_tokenizer(tmp_path)
    (tmp_path / name).write_text(json.dumps({"model_type": "qwen3", "eos_token_id": ends}))
    with pytest.raises(RecipeError, match=f"the eos_token_id of its {name} is .*: it must be token ids"):
        load_tokenizer(path)


def test_a_tokenizer_is_checked_against_the_models_rows(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path)
    rows = max(load_tokenizer(path).backend.get_vocab().values()) + 1
    load_tokenizer(path).check(rows, "MODEL is 'm'")
    with pytest.raises(RecipeError, match=rf"^MODEL is 'm': its tokenizer has ids up to {rows - 1} but the model only {rows - 1} tokens"):
        load_tokenizer(path).check(rows - 1, "MODEL is 'm'")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": rows}))
    with pytest.raises(RecipeError, match=f"its eos_token_id {rows} is beyond the model's {rows} tokens"):
        load_tokenizer(path).check(rows, "MODEL is 'm'")
    with pytest.raises(RecipeError, match=r"neither its tokenizer nor generation_config.json or config.json names an end"):
        Tokenizer(path, load_tokenizer(path).backend, ()).check(rows, "MODEL is 'm'")


def test_the_largest_id_counts_not_how_many_there_are(tmp_path: Path) -> None:
    words = Backend(models.WordLevel({"<|end|>": 0, "a": 1, "far": 50}, unk_token="<|end|>"))
    words.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer.backend) == 3 and tokenizer.vocab_size == 51
    with pytest.raises(RecipeError, match="its tokenizer has ids up to 50 but the model only 50 tokens"):
        tokenizer.check(50, "MODEL is 'm'")


def test_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.chat("hi") == tokenizer.chat([{"role": "user", "content": "hi"}]) == text
    assert tokenizer.encode(text).count(1) == 2, "the template's special tokens are special tokens"
    with pytest.raises(RecipeError, match=r"data.template is 'chat' but .* has no chat template"):
        load("unread.jsonl", load_tokenizer(write_tokenizer(tmp_path)), template="chat")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHAT, "unknown role robot"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[5].content.x }}", "UndefinedError"),
        ("{% for x in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_whatever_goes_wrong_in_a_template_names_the_row(tmp_path: Path, template: str, reason: str) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, chat_template=template))
    rows = [{"prompt": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}], "answer": 1}]
    with pytest.raises(
        RecipeError, match=rf"^data.train: rows.jsonl line 1 has a prompt that the chat template of .* refuses.*{reason}"
    ) as caught:
        load(write(tmp_path / "rows.jsonl", rows), tokenizer, template="chat")
    assert "\n" not in str(caught.value)


def test_of_several_templates_the_default_is_taken_or_their_names_are_said(tmp_path: Path) -> None:
    named = [{"name": "math", "template": "M"}, {"name": "tool_use", "template": "T"}]
    source = write(tmp_path / "rows.jsonl", [{"prompt": "1?", "answer": 1}])
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "with", chat_template=[*named, {"name": "default", "template": "D"}]))
    assert load(source, tokenizer, template="chat")[0].text == "D"
    with pytest.raises(RecipeError, match=r"has several chat templates \(math, tool_use\) and none is named default"):
        load(source, load_tokenizer(write_tokenizer(tmp_path / "without", chat_template=named)), template="chat")


def test_chat_template_args_reach_the_template_which_must_read_them(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, chat_template=template))
    source = write(tmp_path / "rows.jsonl", [{"prompt": "1?", "answer": 1}])
    assert load(source, tokenizer, template="chat")[0].text == "1?"
    assert load(source, tokenizer, template="chat", chat_template_args={"enable_thinking": False})[0].text == "1?<think></think>"
    with pytest.raises(RecipeError, match=r"data.chat_template_args has 'enable_thinkin', which the chat template of .* does not read"):
        load(source, tokenizer, template="chat", chat_template_args={"enable_thinkin": False})
    with pytest.raises(RecipeError, match=r"data.chat_template_args has 'messages', which megafork itself sets"):
        load(source, tokenizer, template="chat", chat_template_args={"messages": []})
    with pytest.raises(ValueError, match=r"data.chat_template_args is .* but data.template is None: only data.template=chat reads them"):
        Data(train=source, chat_template_args={"enable_thinking": False})


@pytest.mark.parametrize(
    ("add_bos", "template", "begins"),
    [
        ("auto", None, [0]),
        (True, None, [0]),
        (False, None, []),
        ("auto", "<|end|>{prompt}", [0]),
        ("auto", "chat", []),
        (True, "chat", [0]),
    ],
)
def test_a_prompt_begins_once(tmp_path: Path, add_bos: Any, template: str | None, begins: list[int]) -> None:
    """This tokenizer puts token 0 before raw text, as Llama's does."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, bos_token="<|end|>", chat_template="{{ messages[0].content }}"))
    source = write(tmp_path / "rows.jsonl", [{"prompt": "1?", "answer": 1}])
    (prompt,) = load(source, tokenizer, add_bos=add_bos, template=template)
    assert list(prompt.tokens) == [*begins, *tokenizer.encode("1?", first=())]


def test_a_template_that_begins_itself_is_not_begun_again(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, bos_token="<|end|>", chat_template="{{ bos_token }}{{ messages[0].content }}"))
    source = write(tmp_path / "rows.jsonl", [{"prompt": "1?", "answer": 1}])
    for add_bos in ("auto", True, False):
        assert load(source, tokenizer, add_bos=add_bos, template="chat")[0].tokens.count(0) == 1
    with pytest.raises(RecipeError, match=r"data.add_bos is true but the tokenizer of .* names no beginning-of-sequence token"):
        load(source, load_tokenizer(write_tokenizer(tmp_path)), add_bos=True)


def broken_tokenizers(folder: Path) -> Iterable[tuple[str, str]]:
    (folder / "empty").mkdir()
    (folder / "empty" / "config.json").write_text('{"model_type": "qwen3"}')  # transformers alone makes an empty tokenizer of this
    yield "empty", "the folder has no tokenizer"
    (folder / "sentencepiece").mkdir()
    (folder / "sentencepiece" / "tokenizer.model").write_bytes(b"")
    yield "sentencepiece", "the folder has no tokenizer"
    (folder / "cut").mkdir()
    (folder / "cut" / "tokenizer.json").write_text('{"version": "1.0", ')
    yield "cut", "could not be loaded; restore its tokenizer files"
    write_tokenizer(folder / "model")
    rules = json.loads((folder / "model" / "tokenizer.json").read_text())
    (folder / "model" / "tokenizer.json").write_text(json.dumps({**rules, "model": {"type": "Nope"}}))
    yield "model", "could not be loaded; restore its tokenizer files"
    write_tokenizer(folder / "generation")
    (folder / "generation" / "generation_config.json").write_text("{")
    yield "generation", "generation_config.json is not valid JSON"
    yield "missing", "no such folder"


def test_a_folder_without_a_good_tokenizer_is_one_recipe_error(tmp_path: Path) -> None:
    for name, message in broken_tokenizers(tmp_path):
        with pytest.raises(RecipeError, match=f"^model.path is .*{message}") as caught:
            load_tokenizer(str(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_local_folder_is_read_without_network(tmp_path: Path) -> None:
    """Python's own audit hook sees every socket that any library opens."""
    script = (
        "import sys; seen = []; sys.addaudithook(lambda event, args: seen.append(event) if event.startswith('socket.') else None)\n"
        "from megafork.data.tokenizer import load_tokenizer\n"
        f"seen.clear(); load_tokenizer({write_tokenizer(tmp_path)!r}).encode('hi'); print(seen)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.stdout == "[]\n", result.stderr


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


def write(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def load(
    source: str, tokenizer: Tokenizer, needs: tuple[str, ...] = ("answer",), *, remarks: list[str] | None = None, **settings: Any
) -> list[Prompt]:
    said = [] if remarks is None else remarks
    return load_prompts(source, Data(train=source, **settings), tokenizer, needs=needs, remark=said.append)


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
