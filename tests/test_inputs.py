"""A run's inputs, cross-checked: held-out prompts against training prompts, and supervised rows with their end tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from task import make_task, write_recipe
from tiny import CHAT, write_tokenizer

from megafork.commands import preflight
from megafork.data.prompts import load_prompts
from megafork.data.tokenizer import load_tokenizer
from megafork.recipe import Data, Recipe, RecipeError
from megafork.recipe_file import load_recipe
from megafork.train.inputs import Inputs
from megafork.train.sft import examples


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


def inputs(task: Path, *overrides: str) -> Inputs:
    return preflight("train", load_recipe(write_recipe(task), list(overrides)), 1)[0]


def test_held_out_prompts_that_are_trained_on_are_left_out_and_said(task: Path, tmp_path: Path) -> None:
    assert inputs(task).remarks == []
    lines = (task / "train.jsonl").read_text().splitlines(keepends=True)
    held_out = (task / "held_out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "mixed.jsonl").write_text("".join([lines[3], *held_out, lines[5], held_out[0]]))
    found = inputs(task, f"data.eval={tmp_path / 'mixed.jsonl'}")
    assert [prompt.row["prompt"] for prompt in found.held_out] == [json.loads(line)["prompt"] for line in held_out]
    assert [prompt.index for prompt in found.held_out] == list(range(len(held_out)))
    assert found.remarks == [
        "data.eval: 1 of 23 rows repeat a prompt with its answer and are not counted again",
        "data.eval: 2 of 22 prompts are training prompts too and are dropped (first: mixed.jsonl line 1 is train.jsonl line 4)",
    ]
    shutil.copy(task / "train.jsonl", tmp_path / "copy.jsonl")
    with pytest.raises(RecipeError, match=r"^data.eval is '.*copy.jsonl': all its 80 prompts are training prompts too"):
        inputs(task, f"data.eval={tmp_path / 'copy.jsonl'}")
    with pytest.raises(RecipeError, match=r"^data.eval is '.*train.jsonl', the same as data.train"):
        inputs(task, f"data.eval={task / 'runs/../train.jsonl'}")


@pytest.mark.parametrize(
    ("ends", "reason"), [(13, "its eos_token_id 13 is beyond the model's 13 tokens"), (-1, "it must be token ids"), ("2", "it must be")]
)
def test_end_tokens_are_checked_before_any_rank_starts(task: Path, tmp_path: Path, ends: Any, reason: str) -> None:
    model = Path(shutil.copytree(task / "model", tmp_path / "model"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(RecipeError, match=rf"^model.path is .*{reason}"):
        inputs(task, f"model.path={model}")


@pytest.mark.parametrize("dynamic", ["true", "false"])
def test_one_response_to_each_prompt_is_for_sft_alone(task: Path, dynamic: str) -> None:
    overrides = ["rollout.samples=1", f"rollout.dynamic_sampling={dynamic}"]
    assert preflight("sft", load_recipe(write_recipe(task), overrides), 1)[1] == 0
    with pytest.raises(RecipeError, match=r"^rollout.samples is 1: a group of one has no advantage; set rollout.samples to 2 or more"):
        inputs(task, *overrides)


def rows(tmp_path: Path, data: list[dict[str, Any]], ends: Any = None, positions: int = 64, **settings: Any) -> list[str]:
    """What each row trains, as the text of its tokens. Token 0, <|end|>, is the tokenizer's own end, 2 is <|im_end|>."""
    path = write_tokenizer(
        tmp_path, chat_template=settings.pop("chat_template", CHAT.replace("('system', 'user')", "('system', 'user', 'assistant')"))
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    file = tmp_path / "sft.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    tokenizer = load_tokenizer(path)
    recipe = Recipe.model_validate(
        {
            "model": {"path": path},
            "data": {"train": str(file), **settings},
            "rollout": {"max_response_length": 12},
            "reward": {"overlong": "none"},
        }
    )
    prompts = load_prompts(str(file), Data(train=str(file), **settings), tokenizer, needs=("response",))
    return [tokenizer.backend.decode(example.tokens.tolist()) for example in examples(prompts, tokenizer, recipe, positions=positions)]


@pytest.mark.parametrize("said", ["four", "four<|end|>", "four<|end|>\n", "four<|end|><|end|>", "four<|end|> <|end|>\n\n"])
def test_a_response_is_trained_with_one_end(tmp_path: Path, said: str) -> None:
    assert rows(tmp_path, [{"prompt": "2+2?", "response": said}]) == ["four<|end|>"]


@pytest.mark.parametrize("said", ["four", "four<|im_end|>", "four<|im_end|>\n", "four<|im_end|>\n<|end|>"])
def test_in_a_chat_the_end_is_the_templates(tmp_path: Path, said: str) -> None:
    data = [{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": said}]}]
    assert rows(tmp_path, data, ends=[2], template="chat") == ["four<|im_end|>"]


def test_the_end_that_is_written_is_the_end(tmp_path: Path) -> None:
    said = [{"prompt": f"{n}?", "response": text} for n, text in enumerate(("four<|im_end|>\n", "four", " four \n", "a<|end|>b"))]
    assert rows(tmp_path / "one", said, ends=2) == ["four<|im_end|>", "four<|end|>", " four \n<|end|>", "a<|end|>b<|end|>"]
    assert rows(tmp_path / "two", said[:1]) == ["four<|im_end|>\n<|end|>"], "at a token that ends nothing roll-outs go on"
    assert rows(tmp_path / "three", said[1:2], template="chat", chat_template="{{ messages[0].content }}", ends=2) == ["four<|end|>"]


def test_a_long_response_is_named_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^data.train: sft.jsonl line 2 has a response of 14 tokens with its end"):
        rows(tmp_path, [{"prompt": "1?", "response": "1"}, {"prompt": "2?", "response": "0123456789012"}])


def test_a_row_is_no_longer_than_the_models_positions(tmp_path: Path) -> None:
    data = [{"prompt": "012345", "response": "01234567"}]
    said = r"^data.train: sft.jsonl line 1 has \d+ tokens, .* but the model knows {} positions .*: shorten the row$"
    with pytest.raises(RecipeError, match=said.format(9)) as caught:
        rows(tmp_path, data, positions=9)
    length = int(str(caught.value).split()[5])
    assert rows(tmp_path, data, positions=length) == ["01234567<|end|>"]
    with pytest.raises(RecipeError, match=said.format(length - 1)):
        rows(tmp_path, data, positions=length - 1)
