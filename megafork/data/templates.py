"""Renders a row's prompt to the model's input, by a text with {prompt} or the tokenizer's chat template; and its first and last tokens."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from megafork import recipe
from megafork.data.messages import Message, RowError
from megafork.data.tokenizer import Tokenizer
from megafork.recipe import Key, RecipeError

_ASK = "Please reason step by step, and put your final answer within \\boxed{}."
_TEMPLATES = {
    "paper": f"User:\n{{prompt}}\n{_ASK}\n\nAssistant:\n",
    "qwen": f"<|im_start|>user\n{{prompt}}\n{_ASK}<|im_end|>\n<|im_start|>assistant\n",
    "plain": "{prompt}",
}
_QWEN_MARK = "<|im_start|>"
_MARK = "the_end_of_a_turn"
_OURS = ("messages", "add_generation_prompt", "chat_template", "continue_final_message", "tokenize")


def template_text(template: str, tokenizer: Tokenizer) -> str:
    """The `data.template` for a `--template`. Raises RecipeError for an unknown name, or one that does not suit the tokenizer."""
    if template == "chat" or "{prompt}" in template:
        return template
    if template not in _TEMPLATES:
        raise RecipeError(f"--template is {template!r}: must be one of {', '.join(_TEMPLATES)}, chat, or a text with {{prompt}}")
    if template == "qwen" and _QWEN_MARK not in tokenizer.backend.get_vocab():
        raise RecipeError(f"--template is 'qwen' but {_QWEN_MARK} is not a token of {tokenizer.path!r}: choose paper, or chat")
    return _TEMPLATES[template]


def renderer(data: recipe.Data, tokenizer: Tokenizer) -> Callable[[str | list[Message]], str]:
    """A function from a row's prompt to its text under `data.template`. Raises RecipeError for an unusable template; the function raises
    RowError for a prompt that the template does not accept."""
    if data.template == "chat":
        _check_chat(data, tokenizer)
        chat = functools.cache(lambda prompt: tokenizer.chat(prompt, data.chat_template_args))  # renders repeated prompts once
        return lambda prompt: chat(prompt) if isinstance(prompt, str) else tokenizer.chat(prompt, data.chat_template_args)
    if data.template is not None and "{prompt}" not in data.template:
        raise RecipeError(
            Key("data.template"), f" is {data.template!r}: write {{prompt}} where the prompt goes, or set ", Key("data.template"), "=chat"
        )

    def insert(prompt: str | list[Message]) -> str:
        if not isinstance(prompt, str):
            raise RowError(f"has {len(prompt)} chat messages: only ", Key("data.template"), "=chat can join them")
        return prompt if data.template is None else data.template.replace("{prompt}", prompt)  # str.format would choke on \boxed{}

    return insert


def first_tokens(data: recipe.Data, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that a prompt must begin with under `data.add_bos`. Raises RecipeError if the tokenizer has no such token."""
    if data.add_bos == "auto":
        return () if data.template == "chat" else tokenizer.first_ids
    if not data.add_bos:
        return ()
    if tokenizer.backend.bos_token_id is None:
        raise RecipeError(
            Key("data.add_bos"), f" is true but the tokenizer of {tokenizer.path!r} names no beginning-of-sequence token: leave it out"
        )
    return (tokenizer.backend.bos_token_id,)


def last_token(data: recipe.Data, tokenizer: Tokenizer) -> int:
    """The token that ends a supervised response: the stop id with which the chat template ends a turn, else the first stop id."""
    first, *_ = tokenizer.eos_ids
    if data.template != "chat":
        return first
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        rendered = tokenizer.chat(turns, data.chat_template_args, answer_follows=False)
    except RowError:  # a template for prompts only
        return first
    after = tokenizer.encode(rendered.rpartition(_MARK)[2], first=())
    return next((token for token in after if token in tokenizer.eos_ids), first)


def _check_chat(data: recipe.Data, tokenizer: Tokenizer) -> None:
    template: Any = tokenizer.backend.chat_template
    if template is None:
        raise RecipeError(
            Key("data.template"),
            f" is 'chat' but the tokenizer of {tokenizer.path!r} has no chat template: give a text with {{prompt}} instead",
        )
    if isinstance(template, dict):
        if "default" not in template:
            raise RecipeError(
                Key("data.template"),
                f" is 'chat' but the tokenizer of {tokenizer.path!r} has several chat templates "
                f"({', '.join(sorted(template))}) and none is named default: keep one of them in tokenizer_config.json, or give a text "
                "with {prompt} instead",
            )
        template = template["default"]
    for name in data.chat_template_args:
        if name in _OURS:
            raise RecipeError(Key("data.chat_template_args"), f" has {name!r}, which megafork itself sets: leave it out")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise RecipeError(
                Key("data.chat_template_args"),
                f" has {name!r}, which the chat template of {tokenizer.path!r} does not read: leave it out, or "
                "write it as the template does",
            )
