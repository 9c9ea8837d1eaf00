"""A model folder's tokenizer: text to token ids and back, its chat template, and the ids that end a response."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from transformers.utils import cached_file

from megafork.recipe import RecipeError

_VOCABULARY_FILES = ("tokenizer.json", "vocab.json")
_SENTENCE_PIECE = "tokenizer.model"
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Tokenizer:
    """Thin view of a transformers tokenizer. `path` is where it came from, for error messages."""

    path: str
    backend: Any
    eos_ids: tuple[int, ...]
    """Ids that end a response: the tokenizer's own, then those of generation_config.json. Empty if neither names one."""

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included. The model's embedding may have more rows."""
        return len(self.backend)

    def encode(self, text: str) -> list[int]:
        """Token ids of exactly this text; no special token is added."""
        return self.backend.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Display text of each token, special ones included. Joined they are the whole text.

        A character whose bytes are spread over several tokens is shown at the last of them; the others are empty.
        """
        quick = [self._piece(before, token) for before, token in itertools.pairwise([None, *ids])]
        if None not in quick:
            return [piece for piece in quick if piece is not None]
        pieces: list[str] = []
        start, shown = 0, 0  # decoding starts one piece early: some decoders drop the space that begins their input
        for end in range(1, len(ids) + 1):
            known = self._with_special(ids[start:shown])
            text = self._with_special(ids[start:end])
            if text.endswith(_UNFINISHED) and end < len(ids):
                pieces.append("")
                continue
            pieces.append(text[len(known) :])
            start, shown = shown, end
        return pieces

    @functools.lru_cache(maxsize=1 << 18)  # noqa: B019 - one tokenizer a process, and text repeats itself
    def _piece(self, before: int | None, token: int) -> str | None:
        """What `token` adds to the text after `before`; None where a character is not finished within one of them."""
        known = "" if before is None else self._with_special([before])
        text = self._with_special([token] if before is None else [before, token])
        return None if text.endswith(_UNFINISHED) or known.endswith(_UNFINISHED) else text[len(known) :]

    def chat(self, prompt: str | list[dict[str, str]]) -> str:
        """A user's prompt, or whole messages, in the chat template, up to where the assistant begins. Raises RecipeError."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.backend.chat_template is None:
            raise RecipeError(
                f"data.template is 'chat' but the tokenizer of {self.path!r} has no chat template: give a text with {{prompt}} instead"
            )
        try:
            return self.backend.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise RecipeError(f"data.template is 'chat' but the chat template of {self.path!r} refuses a prompt: {error}") from None

    def _with_special(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


class SentencePieceTokenizer(SentencePieceBackend):
    """A SentencePiece model as transformers wraps it, with SentencePiece's own encoding and decoding of what is between special tokens.

    transformers 5.19 by itself converts the file, without the leading space that SentencePiece adds, which gives other ids than the model
    was trained with.
    """

    def __init__(self, **settings: Any) -> None:
        settings["legacy"] = True  # transformers' word for: leave the leading space to SentencePiece
        super().__init__(**settings)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        known = self.added_tokens_encoder
        runs = itertools.groupby(tokens, key=lambda token: token in known)
        return "".join("".join(run) if special else self.sp_model.decode_pieces(list(run)) for special, run in runs)


def load_tokenizer(path: str) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder, or of a hub name such as `Qwen/Qwen3-8B`. A folder is read without any network.

    A folder with a SentencePiece `tokenizer.model` and no other vocabulary gives a SentencePieceTokenizer. Raises RecipeError when there
    is none.
    """
    local = Path(path).is_dir()
    # with a config.json alone transformers builds an empty tokenizer and says nothing
    if local and not any((Path(path) / name).is_file() for name in _VOCABULARY_FILES):
        if not (Path(path) / _SENTENCE_PIECE).is_file() or not (Path(path) / _SENTENCE_PIECE).stat().st_size:
            raise RecipeError(f"model.path is {path!r}: the folder has no tokenizer; put the model's tokenizer.json there")
        load: Callable[..., Any] = _load_sentence_piece
    else:
        load = AutoTokenizer.from_pretrained
    if not local and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise RecipeError(f"model.path is {path!r}: no such folder; give a Hugging Face model folder or a hub name")
    try:
        backend = load(path, local_files_only=local, trust_remote_code=False)  # unset, transformers asks whoever is at the terminal
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exception for a file it cannot read
        reason = " ".join(str(error).split())[:200]
        mend = "restore its tokenizer files" if local else "no such folder, and the hub did not give it: download the model first"
        raise RecipeError(f"model.path is {path!r}: its tokenizer could not be loaded; {mend} ({type(error).__name__}: {reason})") from None
    return Tokenizer(path, backend, _eos_ids(path, backend, local))


def _load_sentence_piece(path: str, **options: Any) -> SentencePieceTokenizer:
    """With the special tokens that the model itself names, where tokenizer_config.json names none."""
    backend = SentencePieceTokenizer.from_pretrained(path, **options)
    model = backend.sp_model
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(model, f"{name}_id")()
        if number >= 0 and getattr(backend, f"{name}_token") is None:
            backend.add_special_tokens({f"{name}_token": model.id_to_piece(number)})
    return backend


def _eos_ids(path: str, backend: Any, local: bool) -> tuple[int, ...]:
    ids = [] if backend.eos_token_id is None else [backend.eos_token_id]
    try:
        found = cached_file(path, "generation_config.json", local_files_only=local)
    except OSError:  # a model need not have one
        return tuple(ids)
    try:
        more = json.loads(Path(found).read_text()).get("eos_token_id")
    except ValueError as error:
        raise RecipeError(f"model.path is {path!r}: its generation_config.json is not valid JSON; restore or delete it ({error})") from None
    ids += [more] if isinstance(more, int) else more or []
    return tuple(dict.fromkeys(ids))
