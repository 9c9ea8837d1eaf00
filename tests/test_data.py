"""Tokenizer, data sources, prompts and their order: real files, real packages, and every wrong input by one clear line."""

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
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megafork.data.prompts import Prompt, PromptOrder, fingerprint, load_prompts
from megafork.data.sources import read_rows
from megafork.data.tokenizer import Tokenizer, load_tokenizer
from megafork.recipe import Data, RecipeError

SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}{% if m.role not in ('system', 'user') %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, **config: Any) -> str:
    """A byte-level BPE as Qwen's, small."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = ["Solve the problem: what is 1 + 2? A: 3, für €5"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )  # as Llama's, a first token
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=CHAT))


# ---------------------------------------------------------------- tokenizer


@given(st.text())
def test_encode_adds_nothing_and_decode_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    if not any(name in text for name in SPECIAL):
        assert tokenizer.decode(ids) == text and not set(ids) & {0, 1, 2}


@given(st.lists(st.integers(0, 258)))
def test_pieces_join_to_the_text_of_any_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Also ids that are no valid UTF-8, and special tokens."""
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.backend.decode(ids, skip_special_tokens=False)


def test_pieces_show_split_characters_once_and_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("1 + 😀2") + list(tokenizer.eos_ids)
    assert len(tokenizer.encode("😀")) == 4
    assert tokenizer.pieces(ids)[-6:] == ["", "", "", "😀", "2", "<|end|>"]
    assert tokenizer.decode(ids) == "1 + 😀2"


@pytest.mark.parametrize(
    ("generation", "expected"), [(None, (0,)), ({"eos_token_id": 2}, (0, 2)), ({"eos_token_id": [2, 0]}, (0, 2)), ({"top_p": 1}, (0,))]
)
def test_eos_ids_are_the_tokenizers_and_the_generation_configs(tmp_path: Path, generation: Any, expected: tuple[int, ...]) -> None:
    path = write_tokenizer(tmp_path)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_tokenizer(path).eos_ids == expected


def test_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.chat("hi") == tokenizer.chat([{"role": "user", "content": "hi"}]) == text
    assert tokenizer.encode(text).count(1) == 2, "the template's special tokens are special tokens"
    with pytest.raises(RecipeError, match="refuses a prompt: unknown role robot"):
        tokenizer.chat([{"role": "robot", "content": "hi"}])
    with pytest.raises(RecipeError, match=r"data.template is 'chat' but .* has no chat template"):
        load_tokenizer(write_tokenizer(tmp_path)).chat("hi")


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


def load(source: str, tokenizer: Tokenizer, needs: tuple[str, ...] = ("answer",), **settings: Any) -> list[Prompt]:
    return load_prompts(source, Data(train=source, **settings), tokenizer, needs=needs)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_plain_rows(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    prompts = load(write(tmp_path / name, PLAIN), tokenizer)
    assert [(p.index, p.text, p.row["prompt"], p.row["answer"]) for p in prompts] == [
        (0, "1 + 2?", "1 + 2?", 3),
        (1, "what is 0?", "what is 0?", 0),  # 0 is an answer
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
    source = write(tmp_path / "rows.jsonl", rows)
    assert [(p.index, p.row["answer"]) for p in load(source, tokenizer)] == [(0, 1), (1, 2)]
    assert [(p.index, p.row["answer"]) for p in load(source, tokenizer, deduplicate=False)] == [(0, 1), (1, 9), (2, 2)]


@given(st.text(alphabet="ab{}\\ \n0:"), st.text(alphabet="ab{}\\ \n0:"), st.sampled_from(["x", "{prompt}", "{0} {", "}} \\boxed{7}"]))
def test_a_template_changes_nothing_but_its_mark(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, before: str, after: str, prompt: str
) -> None:
    source = write(tmp_path_factory.getbasetemp() / "template.jsonl", [{"prompt": prompt, "answer": 1}])
    assert load(source, tokenizer, template=before + "{prompt}" + after)[0].text == before + prompt + after


def test_hub_dataset_by_split(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` loads a local folder by the same call as a hub name."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", [{"prompt": f"{i}?", "answer": i} for i in range(3)])
    write(folder / "test.jsonl", [{"prompt": "7?", "answer": 7}])
    assert [p.row["answer"] for p in load(f"hub:{folder}", tokenizer)] == [0, 1, 2]
    assert [p.row["answer"] for p in load(f"hub:{folder}:test", tokenizer)] == [7]
    assert [p.row["answer"] for p in load(f"hub:{folder}:train[:2]", tokenizer)] == [0, 1]
    files = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    assert [p.row["answer"] for p in load(f"hub:{folder}@test:train", tokenizer)] == [7], "a subset's only split is called train"
    for wrong in (f"hub:{folder}:train", f"hub:{folder}@nope", f"hub:{folder}@test:nope", f"hub:{tmp_path / 'missing'}"):
        with pytest.raises(
            RecipeError, match=r"^data.train is 'hub:.*: the dataset could not be loaded; check its name, subset, split and the network"
        ):
            load(wrong, tokenizer)


def test_hub_without_the_package_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['datasets'] = None; from megafork.data.sources import read_rows; next(read_rows('hub:a/b', 'data.eval'))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "RecipeError: data.eval is 'hub:a/b': the package `datasets` is missing; pip install 'megafork[hub]'" in result.stderr


def test_reasoning_gym_rows(tokenizer: Tokenizer) -> None:
    prompts = load("reasoning_gym:chain_sum:5:3", tokenizer, ("answer", "metadata"))
    assert len(prompts) == 5 and all(p.row["metadata"]["source_dataset"] == "chain_sum" for p in prompts)
    (cube,) = load("reasoning_gym:rubiks_cube:1", tokenizer)
    assert cube.row["answer"] is None, "tasks with many right answers pass without one"


@pytest.mark.parametrize("task", ["word_ladder", "list_functions"])
def test_reasoning_gym_rows_do_not_depend_on_the_process(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in the process that asks, the first would depend on Python's hash seed and the second on the global random state."""
    made = []
    for hash_seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        made.append(list(read_rows(f"reasoning_gym:{task}:10:3", "data.train")))
    assert made[0] == made[1]


# ---------------------------------------------------------------- wrong data


GOOD = '{"prompt": "1?", "answer": 1}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + '{"prompt": "2?", ', "rows.jsonl line 2 is not valid JSON"),
        (GOOD + "\n\n[1, 2]\n", "rows.jsonl line 4 is a list: each line must be one JSON object"),
        (GOOD + '{"answer": 2}', r'rows.jsonl line 2 has no prompt \(its fields: answer\): give it a "prompt"'),
        (GOOD + '{"prompt": null, "answer": 2}', "rows.jsonl line 2 has no prompt"),
        (GOOD + '{"question": "a", "problem": "b", "answer": 2}', 'line 2 has a "question" and a "problem": rename'),
        (GOOD + '{"prompt": " ", "answer": 2}', "rows.jsonl line 2 has an empty prompt"),
        (GOOD + '{"prompt": [], "answer": 2}', "rows.jsonl line 2 has an empty prompt"),
        (GOOD + '{"prompt": 7, "answer": 2}', "rows.jsonl line 2 has a prompt that is neither text nor a list"),
        (GOOD + '{"prompt": [{"role": "user", "content": ["x"]}], "answer": 2}', "line 2 has a prompt that is neither text nor a list"),
        (GOOD + '{"prompt": "2?"}', r"rows.jsonl line 2 has no answer \(answer is None\)"),
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
        load(str(path), tokenizer, max_prompt_length=9)
    assert "\n" not in str(caught.value)


def test_the_length_limit_counts_the_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "12", "answer": 1}])
    assert len(load(source, tokenizer, template="34{prompt}", max_prompt_length=4)[0].tokens) == 4
    with pytest.raises(RecipeError, match=r"prompt of 5 tokens, over data.max_prompt_length=4"):
        load(source, tokenizer, template="345{prompt}", max_prompt_length=4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("rows.csv", "unknown form of data; give a .jsonl or .parquet file, hub:NAME[@SUBSET]"),
        ("gsm8k", "unknown form of data"),
        ("hub:", "unknown form of data"),
        ("torn.parquet", "not a readable parquet file after row 0"),
        ("empty.parquet", "it has no rows"),
        ("reasoning_gym:chain_sun", "reasoning_gym has no task 'chain_sun': did you mean 'chain_sum'?"),
        ("reasoning_gym:chain_sum:many", "SIZE must be a whole number above 0"),
        ("reasoning_gym:chain_sum:0", "SIZE must be a whole number above 0"),
        ("reasoning_gym:chain_sum:5:-1", "SEED one of at least 0"),
        ("reasoning_gym:chain_sum:5:1:2", "SIZE must be a whole number above 0"),
        ("reasoning_gym:composite:5", "cannot be made with its default settings"),
    ],
)
def test_a_wrong_source_is_one_recipe_error(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("prompt,answer\n")
    Path("torn.parquet").write_bytes(Path(write(tmp_path / "whole.parquet", DAPO)).read_bytes()[:-20])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), "empty.parquet")
    with pytest.raises(RecipeError) as caught:
        load(source, tokenizer)
    assert str(caught.value).startswith(f"data.train is {source!r}: ") and message in str(caught.value) and "\n" not in str(caught.value)


def test_parquet_rows_count_on_over_batches(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.parquet", [{"prompt": str(i)} for i in range(5000)])
    places = [(place, row["prompt"]) for place, row in read_rows(source, "data.train")]
    assert places == [(f"rows.parquet row {i + 1}", str(i)) for i in range(5000)]


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
        prompts[:2],
        prompts[::-1],
        [*prompts[:2], Prompt(2, "x", (2,), prompts[2].row)],
        [*prompts[:2], Prompt(2, "2", (3,), prompts[2].row)],
        [*prompts[:2], Prompt(2, "2", (2,), {"prompt": "2", "answer": "2"})],
        [*prompts[:2], Prompt(2, "2", (2,), {"prompt": "2", "answer": 2, "response": "r"})],
    ]
    assert len({fingerprint(p) for p in [prompts, *changed]}) == 7
    assert fingerprint(numbered(3)) == fingerprint(prompts)
