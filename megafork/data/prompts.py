"""Prompts of a run: rows checked, put into the template, de-duplicated, tokenised; and the order in which a run takes them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megafork import recipe
from megafork.data.sources import read_rows
from megafork.data.tokenizer import Tokenizer
from megafork.recipe import RecipeError


@dataclass(frozen=True)
class Prompt:
    """One prompt: `text` is what the model reads (template applied), `tokens` its ids, `row` the data's row with `prompt` and `answer`."""

    index: int
    """Position in the list that `load_prompts` returned."""
    text: str
    tokens: tuple[int, ...]
    row: dict[str, Any]


def load_prompts(
    source: str,
    data: recipe.Data,
    tokenizer: Tokenizer,
    *,
    needs: tuple[str, ...] = ("answer",),
    check_row: Callable[[dict[str, Any]], None] | None = None,
    field: str = "data.train",
) -> list[Prompt]:
    """Read `source` (forms: see `recipe.Data.train`); the same list on every rank and in every run.

    Rows are {"prompt", "answer"} (the prompt may be called `question` or `problem`), {"prompt", "response"} for supervised training, or
    DAPO-Math's (`prompt` a list of chat messages, `reward_model.ground_truth` the answer). `needs` names the fields that no row may lack;
    `check_row` raises ValueError, whose text continues `FILE line N ...`, for a row that the verifier cannot judge by; `field` is the
    recipe key that holds `source`. Raises RecipeError for the first wrong row, and for an empty dataset.
    """
    render = _template(data.template, tokenizer)
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for place, raw in read_rows(source, field):
        try:
            row = _normalise(raw, needs)
            _check_row(row, check_row)
            text = render(row["prompt"])
            if data.deduplicate and text in seen:
                continue
            seen.add(text)
            tokens = tuple(tokenizer.encode(text))
            _check_length(tokens, data.max_prompt_length)
        except _RowError as error:
            raise RecipeError(f"{field}: {place} {error}") from None
        prompts.append(Prompt(len(prompts), text, tokens, row))
    if not prompts:
        raise RecipeError(f"{field} is {source!r}: it has no rows; give a dataset with at least one prompt")
    return prompts


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """16 hex digits that change when any prompt, answer, response, token or the order changes."""
    digest = hashlib.sha256()
    for prompt in prompts:
        said = [prompt.text, prompt.tokens, prompt.row.get("answer"), prompt.row.get("response")]
        digest.update(json.dumps(said, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


class PromptOrder:
    """An endless shuffle: every prompt once an epoch, each epoch in another order that depends on the seed and the epoch only."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts = prompts
        self._seed = seed
        self._start(epoch=0)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts. Over the edge of an epoch a prompt may come twice."""
        taken: list[Prompt] = []
        while len(taken) < count:
            chunk = self._order[self._position : self._position + count - len(taken)]
            taken += [self._prompts[index] for index in chunk]
            self._position += len(chunk)
            if self._position == len(self._order):
                self._start(self._epoch + 1)
        return taken

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: with it, the same prompts and the same seed, `restore` continues exactly."""
        return {"epoch": self._epoch, "position": self._position}

    def restore(self, state: dict[str, int]) -> None:
        if not 0 <= state["position"] < len(self._prompts):
            raise RecipeError(
                f"data.train has {len(self._prompts)} prompts but the checkpoint is at prompt {state['position']} of an epoch: "
                "resume with the data that the run started with"
            )
        self._start(state["epoch"])
        self._position = state["position"]

    def _start(self, epoch: int) -> None:
        # sorted by a hash: unlike random.shuffle, sure to be the same on every Python version
        def key(index: int) -> bytes:
            return hashlib.sha256(f"{self._seed}/{epoch}/{index}".encode()).digest()

        self._order = sorted(range(len(self._prompts)), key=key)
        self._epoch, self._position = epoch, 0


class _RowError(ValueError):
    """What is wrong with one row; the message continues `FILE line N ...`."""


def _normalise(raw: dict[str, Any], needs: tuple[str, ...]) -> dict[str, Any]:
    row = {**raw, "prompt": _plain(_prompt_of(raw))}
    reward_model = raw.get("reward_model")
    if raw.get("answer") is None and isinstance(reward_model, dict):
        row["answer"] = reward_model.get("ground_truth")
    for name in needs:
        value = row.get(name)
        if value is None and name == "answer" and _generated(row):
            continue  # some reasoning-gym tasks have many right answers and a scorer that needs none
        if value is None or (isinstance(value, str) and not value.strip()):
            raise _RowError(f'has no {name} ({name} is {value!r}): give it an "{name}", or delete the row')
    if "response" in needs and not isinstance(row["response"], str):
        raise _RowError(f"has a response that is a {type(row['response']).__name__}: it must be text")
    return row


def _check_row(row: dict[str, Any], check: Callable[[dict[str, Any]], None] | None) -> None:
    try:
        if check is not None:
            check(row)
    except ValueError as error:
        raise _RowError(str(error)) from None


def _generated(row: dict[str, Any]) -> bool:
    metadata = row.get("metadata")
    return isinstance(metadata, dict) and "source_dataset" in metadata


def _prompt_of(raw: dict[str, Any]) -> Any:
    if raw.get("prompt") is not None:
        return raw["prompt"]
    names = [name for name in ("question", "problem") if raw.get(name) is not None]
    if len(names) > 1:
        raise _RowError('has a "question" and a "problem": rename the one that is meant to "prompt"')
    if not names:
        raise _RowError(f'has no prompt (its fields: {", ".join(map(str, raw)) or "none"}): give it a "prompt"')
    return raw[names[0]]


def _plain(prompt: Any) -> str | list[dict[str, str]]:
    """Checked; a single user message becomes its text, so that it works with every template."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise _RowError('has a prompt that is neither text nor a list of {"role": ..., "content": text} messages: make it one of them')
    if not any(message["content"].strip() for message in messages):
        raise _RowError("has an empty prompt: fill it in, or delete the row")
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return messages


def _template(template: str | None, tokenizer: Tokenizer) -> Callable[[str | list[dict[str, str]]], str]:
    """From a row's prompt to the text that the model reads."""
    if template == "chat":
        chat = functools.cache(tokenizer.chat)  # a dataset of repeats is rendered once
        return lambda prompt: chat(prompt) if isinstance(prompt, str) else tokenizer.chat(prompt)
    if template is not None and "{prompt}" not in template:
        raise RecipeError(f"data.template is {template!r}: write {{prompt}} where the prompt goes, or set data.template=chat")

    def insert(prompt: str | list[dict[str, str]]) -> str:
        if not isinstance(prompt, str):
            raise _RowError(f"has {len(prompt)} chat messages: only data.template=chat can join them")
        return prompt if template is None else template.replace("{prompt}", prompt)  # not str.format: \boxed{} stays

    return insert


def _check_length(tokens: tuple[int, ...], limit: int) -> None:
    if not tokens:
        raise _RowError("has a prompt that gives no tokens: does the tokenizer belong to this data?")
    if len(tokens) > limit:
        raise _RowError(f"has a prompt of {len(tokens)} tokens, over data.max_prompt_length={limit}: raise the limit, or delete the row")
