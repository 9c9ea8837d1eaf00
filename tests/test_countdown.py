"""The quickstart's task: its verifier cannot be fooled, its files are reproducible, and its tokenizer round-trips every text."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from task import countdown

ROW = {"numbers": [4, 9, 2], "answer": "7"}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return countdown.make_rows(seed=1)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("countdown") / "model"
    countdown.write_model(folder, seed=1)
    return folder


@pytest.mark.parametrize(
    "response",
    [
        "9 - 4 = 5 left 2 5 ; 5 + 2 = 7",
        "9 - 4 = 5 left 2 5 ; 2 + 5 = 7",
        "4 - 9 = -5 left 2 -5 ; 2 - -5 = 7",
        "  9 - 4 = 5 left 2 5 ;\n5 + 2 = 7 ",
    ],
)
def test_right_chains_score_one(response: str) -> None:
    assert countdown.score(response, ROW) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        pytest.param("9 + 2 = 11 left 4 11 ; 11 - 4 = 8", id="last result wrong"),
        pytest.param("9 + 4 = 5 left 2 5 ; 5 + 2 = 7", id="first result wrong, end right"),
        pytest.param("9 + 4 = 13 left 2 13 ; 13 + 2 = 15", id="target missed"),
        pytest.param("9 - 2 = 7 left 9 7 ; 9 - 2 = 7", id="number used twice"),
        pytest.param("9 - 9 = 0 left 4 0 ; 4 + 0 = 4", id="one number as both operands"),
        pytest.param("9 - 2 = 7", id="number left over"),
        pytest.param("9 - 4 = 5 left 5 ; 5 + 2 = 7", id="number dropped from the list"),
        pytest.param("9 - 4 = 5 left 3 5 ; 5 + 2 = 7", id="number changed in the list"),
        pytest.param("5 + 2 = 7", id="number not given"),
        pytest.param("9 - 4 = 5 left 2 5 ; 5 + 2 = 7 7", id="text after the end"),
        pytest.param("9 - 4 = 5 left 2 5 ; 5 + 2 =", id="cut off"),
        pytest.param("9 - 4 = 5 ; 5 + 2 = 7", id="list left out"),
        pytest.param("9 * 4 = 36 left 2 36 ; 36 - 2 = 34", id="unknown operation"),
        pytest.param("09 - 4 = 5 left 2 5 ; 5 + 2 = 7", id="number written otherwise"),
        pytest.param("9-4=5 left 2 5 ; 5+2=7", id="not separated"),
        pytest.param("7", id="bare answer"),
        pytest.param("", id="empty"),
    ],
)
def test_anything_else_scores_zero(response: str) -> None:
    assert countdown.score(response, ROW) == 0.0


def test_an_answer_needs_no_step_only_when_one_number_is_given() -> None:
    assert countdown.score("7", {"numbers": [7, 1], "answer": "7"}) == 0.0


WORDS = st.lists(st.sampled_from([*countdown.vocabulary(), "-3", "٣", "1e9", "9" * 5000, "__import__('os')"]), max_size=20).map(" ".join)


@given(st.one_of(st.text(), WORDS))
def test_score_never_raises_and_pays_only_zero_or_one(response: str) -> None:
    assert countdown.score(response, ROW) in (0.0, 1.0)


@given(st.integers(0, 2**32), st.integers(0, 13), st.sampled_from(countdown.vocabulary()))
def test_one_changed_word_of_a_right_chain_never_pays(seed: int, position: int, word: str) -> None:
    """All words of a chain are checked: putting another word anywhere leaves a chain that is wrong, or right in its own way."""
    choose = random.Random(seed)
    numbers = [choose.randint(1, countdown.HIGHEST) for _ in range(countdown.NUMBERS)]
    chain = choose.choice(list(countdown.chains(numbers)))
    row = {"numbers": numbers, "answer": str(chain[-1].result)}
    words = countdown.response_text(numbers, chain).split()
    assert countdown.score(" ".join(words), row) == 1.0
    changed = [*words[:position], word, *words[position + 1 :]]
    assert countdown.score(" ".join(changed), row) == float(changed == words)


def test_the_stated_share_of_warm_start_chains_is_right_and_all_are_valid(rows: dict[str, list[dict[str, Any]]]) -> None:
    right = 0.0
    for row in rows["sft"]:
        left, _, target = row["prompt"].removesuffix(" :").partition(" make ")
        numbers = [int(number) for number in left.split()]
        reached = row["response"].split()[-1]
        assert countdown.score(row["response"], {"numbers": numbers, "answer": reached}) == 1.0
        paid = countdown.score(row["response"], {"numbers": numbers, "answer": target})
        assert paid == float(reached == target)
        right += paid
    assert right / len(rows["sft"]) == pytest.approx(countdown.RIGHT_SHARE, abs=0.02)


def test_held_out_problems_occur_nowhere_else(rows: dict[str, list[dict[str, Any]]]) -> None:
    def problem(row: dict[str, Any]) -> tuple[tuple[str, ...], str]:
        numbers, _, target = row["prompt"].removesuffix(" :").partition(" make ")
        return tuple(sorted(numbers.split())), target

    heldout = {problem(row) for row in rows["heldout"]}
    assert len(heldout) == len(rows["heldout"]) == countdown.HELDOUT_ROWS
    assert heldout.isdisjoint(problem(row) for row in rows["train"])
    assert heldout.isdisjoint(problem(row) for row in rows["sft"])
    assert len({row["prompt"] for row in rows["train"]}) == len(rows["train"])


def test_every_problem_can_be_solved(rows: dict[str, list[dict[str, Any]]]) -> None:
    for row in rows["train"] + rows["heldout"]:
        texts = [countdown.response_text(row["numbers"], chain) for chain in countdown.chains(row["numbers"])]
        assert max(countdown.score(text, row) for text in texts) == 1.0


def test_a_seed_gives_the_same_rows_and_another_seed_others(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert countdown.make_rows(seed=1) == rows
    assert countdown.make_rows(seed=2)["heldout"] != rows["heldout"]


def test_a_seed_gives_the_same_weights(model_folder: Path, tmp_path: Path) -> None:
    countdown.write_model(tmp_path / "again", seed=1)
    countdown.write_model(tmp_path / "other", seed=2)
    weights = (model_folder / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights


def test_the_tokenizer_gives_every_text_back(model_folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer.eos_token == "<eos>"
    for row in rows["sft"][:500]:
        prompt, response = tokenizer(row["prompt"])["input_ids"], tokenizer(row["response"])["input_ids"]
        assert len(prompt) == len(row["prompt"].split()) and tokenizer.unk_token_id not in prompt + response
        assert tokenizer.decode([*response, tokenizer.eos_token_id], skip_special_tokens=True).split() == row["response"].split()


def test_the_model_fits_tp_2_and_its_tokenizer(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["tie_word_embeddings"]
    assert config["num_attention_heads"] % 2 == config["num_key_value_heads"] % 2 == config["vocab_size"] % 2 == 0
    words = json.loads((model_folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert config["eos_token_id"] == words["<eos>"] and max(words.values()) < config["vocab_size"]


def test_the_sizes_of_the_model(tmp_path: Path) -> None:
    for width, millions in ((96, 0.3), (192, 1.1), (384, 4.4)):
        countdown.write_model(tmp_path / str(width), seed=1, width=width)
        with safe_open(tmp_path / str(width) / "model.safetensors", "pt") as weights:
            count = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118 - it has no other
        assert round(count / 1e6, 1) == millions
