"""A model folder's tokenizer: text to token ids and back, its chat template, and the ids that end a response."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from transformers.utils import cached_file

from megafork.data.messages import Message, RowError
from megafork.recipe import Key, RecipeError

_VOCABULARY_FILES = ("tokenizer.json", "vocab.json")
_SENTENCE_PIECE = "tokenizer.model"
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Tokenizer:
    """A thin wrapper around a transformers tokenizer. `path` is its origin, for error messages."""

    path: str
    backend: Any
    eos_ids: tuple[int, ...]
    """Ids that end a response: the tokenizer's own, then the model's. Empty if neither names one."""
    first_ids: tuple[int, ...] = ()
    """Tokens that the tokenizer puts before raw text: its beginning-of-sequence token, or none."""

    @functools.cached_property
    def _known(self) -> frozenset[int]:
        return frozenset([*self.backend.get_vocab().values(), *getattr(self.backend, "added_tokens_decoder", ())])

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, including added tokens. The model's embedding may have more rows."""
        return max(self._known) + 1

    def check(self, vocab: int, *named: str) -> None:
        """Raise RecipeError, beginning with `named`, unless a model with `vocab` embedding rows covers all of this tokenizer's ids and has
        an end token."""
        if self.vocab_size > vocab:
            raise RecipeError(
                *named,
                f": its tokenizer has ids up to {self.vocab_size - 1} but the model only {vocab} tokens: give a folder whose "
                "tokenizer matches the model",
            )
        if not self.eos_ids:
            raise RecipeError(*named, ": neither its tokenizer nor generation_config.json or config.json names an end-of-sequence token")
        if max(self.eos_ids) >= vocab:
            raise RecipeError(
                *named,
                f": its eos_token_id {max(self.eos_ids)} is beyond the model's {vocab} tokens: correct it in "
                "generation_config.json, or in config.json where there is none",
            )

    def encode(self, text: str, *, first: tuple[int, ...] | None = None) -> list[int]:
        """Token ids of raw text, beginning with `first_ids` exactly once, whether or not the text spells them out.

        `first` replaces them: () for a part of a sequence, such as a response, or for the output of a chat template.
        """
        first = self.first_ids if first is None else first
        ids = self.backend.encode(text, add_special_tokens=False, verbose=False)
        return ids if tuple(ids[: len(first)]) == first else [*first, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without trailing end tokens. Special tokens inside, such as </think>, are kept: verifiers look for them."""
        ends = {*self.eos_ids, self.backend.pad_token_id}
        length = len(ids)
        while length and ids[length - 1] in ends:
            length -= 1
        return self._with_special(ids[:length])

    def without_end(self, text: str) -> tuple[str, int | None]:
        """A response's text without the end tokens spelled out at its end and the white space after them; and the first of these tokens,
        at which a roll-out would have stopped, or None."""
        ends = {self._text([token]): token for token in self.eos_ids}
        found = None
        while end := next((end for end in ends if end and text.rstrip().endswith(end)), None):
            text, found = text.rstrip().removesuffix(end), ends[end]
        return text, found

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Display text of each token, including special ones. Joined, the pieces are the whole text.

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

    @functools.lru_cache(maxsize=1 << 18)  # noqa: B019 - one tokenizer per process, and text repeats itself
    def _piece(self, before: int | None, token: int) -> str | None:
        """The text that `token` adds after `before`; None if a character is incomplete within either."""
        known = "" if before is None else self._with_special([before])
        text = self._with_special([token] if before is None else [before, token])
        return None if text.endswith(_UNFINISHED) or known.endswith(_UNFINISHED) else text[len(known) :]

    def chat(self, prompt: str | list[Message], arguments: Mapping[str, Any] | None = None, *, answer_follows: bool = True) -> str:
        """A user's prompt, or whole messages, rendered by the chat template, up to the start of the assistant's turn if `answer_follows`.

        `arguments`: variables of the template. Raises RowError for any error in the template.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = self._rendered(messages, arguments, answer_follows)
        for place, message in enumerate(messages):
            said = message.get("content") or ""
            if said.strip() and said.strip() not in text:  # changed by the template, or left out: then nothing depends on it
                others = [*messages[:place], {**message, "content": f"{said}?"}, *messages[place + 1 :]]
                if self._rendered(others, arguments, answer_follows) == text:
                    raise RowError(
                        f"has a {message['role']} message that the chat template of {self.path!r} leaves out: move its text "
                        "into a user message, or delete it"
                    )
        return text

    def _rendered(self, messages: list[Message], arguments: Mapping[str, Any] | None, answer_follows: bool) -> str:
        try:
            return self.backend.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_follows, **(arguments or {}))
        except Exception as error:  # noqa: BLE001 - the template is a program from the model's folder and may raise anything
            reason = " ".join(str(error).split())[:200]
            raise RowError(f"has a prompt that the chat template of {self.path!r} refuses ({type(error).__name__}: {reason})") from None

    def _with_special(self, ids: Sequence[int]) -> str:
        """The whole text; ids that exist only in the model's padded embedding appear as `<id 27>`, so that they are not overlooked."""
        runs = itertools.groupby(ids, key=self._known.__contains__)
        return "".join(self._text(list(run)) if known else "".join(f"<id {token}>" for token in run) for known, run in runs)

    def _text(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class SentencePieceTokenizer(SentencePieceBackend):
    """A SentencePiece model wrapped by transformers, with SentencePiece's own encoding and decoding of the text between special tokens.

    By default transformers 5.19 converts the file and omits the leading space that SentencePiece adds, which gives other ids than those
    the model was trained with.
    """

    def __init__(self, **settings: Any) -> None:
        settings["legacy"] = True  # transformers' flag that leaves the leading space to SentencePiece
        super().__init__(**settings)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        known = self.added_tokens_encoder
        runs = itertools.groupby(tokens, key=lambda token: token in known)
        return "".join("".join(run) if special else self.sp_model.decode_pieces(list(run)) for special, run in runs)


def load_tokenizer(path: str) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder, or of a hub name such as `Qwen/Qwen3-8B`. A folder is read without network access.

    A folder with a SentencePiece `tokenizer.model` and no other vocabulary gives a SentencePieceTokenizer. Raises RecipeError if there is
    no tokenizer.
    """
    local = Path(path).is_dir()
    # given only a config.json, transformers silently builds an empty tokenizer
    if local and not any((Path(path) / name).is_file() for name in _VOCABULARY_FILES):
        if not (Path(path) / _SENTENCE_PIECE).is_file() or not (Path(path) / _SENTENCE_PIECE).stat().st_size:
            raise RecipeError(Key("model.path"), f" is {path!r}: the folder has no tokenizer; put the model's tokenizer.json there")
        load: Callable[..., Any] = _load_sentence_piece
    else:
        load = AutoTokenizer.from_pretrained
    if not local and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise RecipeError(Key("model.path"), f" is {path!r}: no such folder; give a Hugging Face model folder or a hub name")
    ends = _ends_of_model(path, local)  # before loading, as transformers would blame the tokenizer
    try:
        backend = load(path, local_files_only=local, trust_remote_code=False)  # unset, transformers prompts at the terminal
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exception for a file it cannot read
        reason = " ".join(str(error).split())[:200]
        fix = "restore its tokenizer files" if local else "no such folder, and the hub did not give it: download the model first"
        raise RecipeError(
            Key("model.path"), f" is {path!r}: its tokenizer could not be loaded; {fix} ({type(error).__name__}: {reason})"
        ) from None
    own = () if backend.eos_token_id is None else (backend.eos_token_id,)
    return Tokenizer(path, backend, tuple(dict.fromkeys((*own, *ends))), _first_ids(backend))


def _load_sentence_piece(path: str, **options: Any) -> SentencePieceTokenizer:
    """Load it with the special tokens that the model itself names if tokenizer_config.json names none."""
    backend = SentencePieceTokenizer.from_pretrained(path, **options)
    model = backend.sp_model
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(model, f"{name}_id")()
        if number >= 0 and getattr(backend, f"{name}_token") is None:
            backend.add_special_tokens({f"{name}_token": model.id_to_piece(number)})
    return backend


def _first_ids(backend: Any) -> tuple[int, ...]:
    plain, whole = (backend.encode("a", add_special_tokens=special, verbose=False) for special in (False, True))
    starts = range(len(whole) - len(plain) + 1)
    return tuple(whole[: next((start for start in starts if whole[start : start + len(plain)] == plain), 0)])


def _ends_of_model(path: str, local: bool) -> list[int]:
    """The end tokens in generation_config.json or, without that file, in config.json, as transformers and vLLM read them."""
    for name in ("generation_config.json", "config.json"):
        config = _config(path, name, local)
        if config is not None:
            return _listed(config.get("eos_token_id"), Key("model.path"), f" is {path!r}: the eos_token_id of its {name}")
    return []


def _config(path: str, name: str, local: bool) -> dict[str, Any] | None:
    try:
        found = cached_file(path, name, local_files_only=local)
    except OSError:  # a model need not have one
        return None
    if found is None:
        return None
    try:
        config = json.loads(Path(found).read_text())
    except (ValueError, RecursionError) as error:
        raise RecipeError(Key("model.path"), f" is {path!r}: its {name} is not valid JSON; restore or delete it ({error})") from None
    if not isinstance(config, dict):
        raise RecipeError(
            Key("model.path"), f" is {path!r}: its {name} holds a {type(config).__name__}, not an object; restore or delete it"
        )
    return config


def _listed(value: Any, *named: str) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for one in ids:
        if type(one) is not int or one < 0:  # true is an int to Python
            raise RecipeError(*named, f" is {value!r}: it must be token ids, integers from 0")
    return ids
