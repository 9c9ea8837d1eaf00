"""Tokenizer: encoding and its ends, chat templates, how a prompt begins, and folders without a good tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_rows import load, write
from tiny import CHAT, SPECIAL, write_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models

from megafork.data import verifiers
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


@pytest.mark.parametrize("role", ["system", "prompter", "User"])
def test_a_message_that_the_template_leaves_out_is_refused(tmp_path: Path, role: str) -> None:
    """Qwen's template renders no role that it does not know, and Phi-3's first one no system text."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content | trim | replace('/think', '') }}{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, chat_template=template))
    rows = [{"prompt": [{"role": name, "content": f" by {name}/think\n"} for name in (role, "user")], "answer": 1}]
    with pytest.raises(RecipeError, match=rf"rows.jsonl line 1 has a {role} message that the chat template of .* leaves out"):
        load(write(tmp_path / "rows.jsonl", rows), tokenizer, template="chat")
    assert tokenizer.chat(" by user/think\n") == "<|im_start|>by user"


def test_of_several_templates_the_default_is_taken_or_their_names_are_said(tmp_path: Path) -> None:
    named = [{"name": name, "template": name[0] + "{{ messages[0].content }}"} for name in ("math", "tool_use")]
    source = write(tmp_path / "rows.jsonl", [{"prompt": "1?", "answer": 1}])
    tokenizer = load_tokenizer(
        write_tokenizer(tmp_path / "with", chat_template=[*named, {"name": "default", "template": "D{{ messages[0].content }}"}])
    )
    assert load(source, tokenizer, template="chat")[0].text == "D1?"
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
