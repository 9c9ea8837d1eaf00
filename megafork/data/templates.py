"""The texts that a problem is put into, by their names."""

from __future__ import annotations

from megafork.data.tokenizer import Tokenizer
from megafork.recipe import RecipeError

_ASK = "Please reason step by step, and put your final answer within \\boxed{}."
_TEMPLATES = {
    "paper": f"User:\n{{prompt}}\n{_ASK}\n\nAssistant:\n",
    "qwen": f"<|im_start|>user\n{{prompt}}\n{_ASK}<|im_end|>\n<|im_start|>assistant\n",
    "plain": "{prompt}",
}
_QWEN_MARK = "<|im_start|>"


def template_text(template: str, tokenizer: Tokenizer) -> str:
    """What `data.template` is for a `--template`. Raises RecipeError for an unknown name, or one that the tokenizer is not made for."""
    if template == "chat" or "{prompt}" in template:
        return template
    if template not in _TEMPLATES:
        raise RecipeError(f"--template is {template!r}: must be one of {', '.join(_TEMPLATES)}, chat, or a text with {{prompt}}")
    if template == "qwen" and _QWEN_MARK not in tokenizer.backend.get_vocab():
        raise RecipeError(f"--template is 'qwen' but {_QWEN_MARK} is not a token of {tokenizer.path!r}: choose paper, or chat")
    return _TEMPLATES[template]
