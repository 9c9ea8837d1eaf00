"""Folders whose vocabulary is a SentencePiece model: ids and text are SentencePiece's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megafork.data.tokenizer import Tokenizer, load_tokenizer
from megafork.recipe import RecipeError

TEXT = "the cat sat on a mat and ate 12 of 34 fish while it rained in the old town by the sea"
WORDS = TEXT.split()


def write_model(folder: Path, kind: str, **options: Any) -> Any:
    """Train a small model into folder/tokenizer.model; returns SentencePiece's processor of it."""
    text = [" ".join(WORDS[(3 * n + m) % len(WORDS)] for m in range(9)) for n in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    model = write_model(folder, request.param)
    return load_tokenizer(str(folder)), model


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=20) | st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join))
def test_ids_and_text_are_sentencepieces(text: str, pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, model = pair
    if any(model.id_to_piece(n) in text for n in range(3)):  # the special tokens' own text
        return
    ids = tokenizer.encode(text)
    assert ids == model.encode(text)
    assert tokenizer.decode(ids) == model.decode(ids)


def test_the_leading_space_is_there(pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, model = pair
    assert model.id_to_piece(tokenizer.encode("cat")[0]).startswith("▁")
    assert tokenizer.vocab_size == model.get_piece_size()
    assert tokenizer.eos_ids == (model.eos_id(),)
    ids = tokenizer.encode("the cat é </s>")
    assert ids[-1] == model.eos_id(), "special tokens are known in the text"
    assert tokenizer.decode(ids).rstrip() == "the cat é"
    assert "".join(tokenizer.pieces(ids)).strip() == "the cat é</s>", "SentencePiece drops a space at the end of a text"


def test_the_folders_settings_count(tmp_path: Path) -> None:
    model = write_model(tmp_path, "bpe", user_defined_symbols=["<|end|>"])
    template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "legacy": False, "chat_template": template}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [model.eos_id()]}))
    tokenizer = load_tokenizer(str(tmp_path))
    end = model.piece_to_id("<|end|>")
    assert tokenizer.eos_ids == (end, model.eos_id())
    assert tokenizer.chat("the cat") == "the cat<|end|>"
    assert tokenizer.encode("the cat<|end|>") == [*model.encode("the cat"), end]


def test_a_damaged_model_is_one_recipe_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(RecipeError, match="could not be loaded; restore its tokenizer files"):
        load_tokenizer(str(tmp_path))
