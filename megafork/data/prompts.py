"""Prompts of a run: rows read, rendered, de-duplicated and tokenised; and the order in which a run takes them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megafork import recipe
from megafork.data.messages import RowError
from megafork.data.rows import read_row
from megafork.data.sources import read_rows
from megafork.data.templates import first_tokens, renderer
from megafork.data.tokenizer import Tokenizer
from megafork.recipe import RecipeError
from megafork.recipe.data import Source

Remark = Callable[[str], None]
"""Receives a line for the user about rows that were dropped from a dataset."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: `text` is the model's input (template applied), `tokens` its ids, `row` the dataset's row as read by `rows.read_row`."""

    index: int
    """Position in the list that `load_prompts` returned."""
    text: str
    tokens: tuple[int, ...]
    row: dict[str, Any]
    place: str = ""
    """Where the row came from, such as `train.jsonl line 7`."""


def load_prompts(
    source: Source,
    data: recipe.Data,
    tokenizer: Tokenizer,
    *,
    needs: tuple[str, ...] = ("answer",),
    check_row: Callable[[dict[str, Any]], None] | None = None,
    field: str = "data.train",
    remark: Remark = lambda line: None,
) -> list[Prompt]:
    """Read `source` (forms: `recipe.Data.train`; rows: docs/data.md); the same list on every rank and in every run.

    `needs` names the fields that every row must have; `check_row` raises ValueError, whose text continues `FILE line N ...`, for a row that
    the verifier cannot use; `field` is the recipe key or the option that holds `source`. Repeated training prompts are dropped under
    `data.deduplicate`; of other data, repeats of a prompt with the same answer are always dropped. Raises RecipeError for the first invalid
    row, and for an empty dataset.
    """
    training = field == "data.train"
    render, first = renderer(data, tokenizer), first_tokens(data, tokenizer)
    prompts: list[Prompt] = []
    repeats, overlong = _Repeats(by_answer=not training or "response" in needs), _Overlong(data, field)
    for place, raw in read_rows(source, field):
        try:
            row = read_row(raw, needs, data.columns, everywhere=training)
            _check_row(row, check_row)
            text = render(row["prompt"])
            if repeats.has(text, row, place) and (data.deduplicate or not training):
                continue
            tokens = tuple(tokenizer.encode(text, first=first))
            if not tokens:
                raise RowError("has a prompt that gives no tokens: does the tokenizer belong to this data?")
            if overlong.drops(tokens):
                continue
        except RowError as error:
            raise RecipeError(f"{field}: {place} ", *error.args) from None
        prompts.append(Prompt(len(prompts), text, tokens, row, place))
    for line in (*(repeats.remarks(field, training) if data.deduplicate or not training else ()), *overlong.remarks(repeats.rows)):
        remark(line)
    if not prompts:
        left = "no rows that are short enough" if overlong.lengths else "no rows"
        raise RecipeError(f"{field} is {source!r}: it has {left}; give a dataset with at least one prompt")
    return prompts


def without_training_prompts(held_out: Sequence[Prompt], train: Sequence[Prompt], source: Source, remark: Remark) -> list[Prompt]:
    """The held-out prompts that the model does not also train on, renumbered. Raises RecipeError if none is left."""
    trained = {prompt.tokens: prompt.place for prompt in train}
    shared = [prompt for prompt in held_out if prompt.tokens in trained]
    if shared and len(shared) == len(held_out):
        raise RecipeError(
            f"data.eval is {source!r}: all its {len(held_out)} prompts are training prompts too ({shared[0].place} is "
            f"{trained[shared[0].tokens]}): hold out others, or leave data.eval unset"
        )
    if shared:
        remark(
            f"data.eval: {len(shared)} of {len(held_out)} prompts are training prompts too and are dropped (first: {shared[0].place} "
            f"is {trained[shared[0].tokens]})"
        )
    left = [prompt for prompt in held_out if prompt.tokens not in trained]
    return [dataclasses.replace(prompt, index=index) for index, prompt in enumerate(left)]


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """16 hex digits that change with any prompt, token or row field, and with the order: a verifier may read all of a row."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.text, prompt.tokens, prompt.row], default=str, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


def problems(prompts: Sequence[Prompt]) -> str:
    """16 hex digits that identify the problems and their answers, whatever the template."""
    pairs = [[prompt.row["prompt"], prompt.row.get("answer")] for prompt in prompts]
    return hashlib.sha256(json.dumps(pairs, default=str).encode()).hexdigest()[:16]


class PromptOrder:
    """An endless shuffle: every prompt once per epoch, in an order that depends only on the seed and the epoch."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts = prompts
        self._seed = seed
        self._start(epoch=0)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts. Across the end of an epoch a prompt may appear twice."""
        taken: list[Prompt] = []
        while len(taken) < count:
            chunk = self._order[self._position : self._position + count - len(taken)]
            taken += [self._prompts[index] for index in chunk]
            self._position += len(chunk)
            if self._position == len(self._order):
                self._start(self._epoch + 1)
        return taken

    def state(self) -> dict[str, int]:
        """State for a checkpoint, from which `restore` continues exactly, given the same prompts and seed."""
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
        # sorted by a hash: unlike random.shuffle, guaranteed to be the same on every Python version
        def key(index: int) -> bytes:
            return hashlib.sha256(f"{self._seed}/{epoch}/{index}".encode()).digest()

        self._order = sorted(range(len(self._prompts)), key=key)
        self._epoch, self._position = epoch, 0


@dataclass
class _Repeats:
    """Rows that repeat an earlier prompt."""

    by_answer: bool
    """Whether a prompt with a different answer or response counts as a different one."""
    rows: int = 0
    again: int = 0
    differing: int = 0
    """Repeated prompts with a different answer."""
    first: str = ""
    seen: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """The answers or responses seen with each prompt."""

    def has(self, text: str, row: dict[str, Any], place: str) -> bool:
        self.rows += 1
        answer = row.get("response", row.get("answer"))
        before = self.seen.setdefault(text, [])
        known = answer in before
        repeated = known if self.by_answer else bool(before)
        if before and not known:
            self.differing += 1
            self.first = self.first or place
        if not known:
            before.append(answer)
        self.again += repeated
        return repeated

    def remarks(self, field: str, training: bool) -> list[str]:
        if not training:
            counted = f"{field}: {self.again} of {self.rows} rows repeat a prompt with its answer and are not counted again"
            return [counted] if self.again else []
        what = "a prompt with its response" if self.by_answer else "a prompt"
        conflict = (
            f", {self.differing} of them with a different answer (first: {self.first})" if self.differing and not self.by_answer else ""
        )
        counted = f"{field}: {self.again} of {self.rows} rows repeat {what} and are dropped{conflict}"
        return [counted] if self.again else []


@dataclass
class _Overlong:
    """Prompts over the limit, under `data.overlong_prompts`."""

    data: recipe.Data
    field: str
    lengths: list[int] = dataclasses.field(default_factory=list)

    def drops(self, tokens: tuple[int, ...]) -> bool:
        """Whether the prompt is dropped for its length. Raises RowError if overlong prompts are to be refused."""
        limit = self.data.max_prompt_length
        if len(tokens) <= limit:
            return False
        if self.data.overlong_prompts == "refuse":
            is_key = self.field.startswith("data.")
            over = f"data.max_prompt_length={limit}: raise the limit, set data.overlong_prompts=drop" if is_key else f"the limit of {limit}"
            raise RowError(f"has a prompt of {len(tokens)} tokens, over {over}{', or' if is_key else ':'} delete the row")
        self.lengths.append(len(tokens))
        return True

    def remarks(self, rows: int) -> list[str]:
        limit = self.data.max_prompt_length
        counted = f"{self.field}: {len(self.lengths)} of {rows} rows have prompts over data.max_prompt_length={limit} and are dropped"
        return [f"{counted} (longest: {max(self.lengths)} tokens)"] if self.lengths else []


def _check_row(row: dict[str, Any], check: Callable[[dict[str, Any]], None] | None) -> None:
    try:
        if check is not None:
            check(row)
    except ValueError as error:
        raise RowError(*error.args) from None
