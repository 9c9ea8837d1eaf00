"""A command's options, declared once: the fields of a dataclass, with their help texts, become the command's parameters."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from megafork.recipe import RecipeError
from megafork.recipe.kinds import LARGEST_SEED, MOST_MEGABYTES


def argument(help: str, *, metavar: str | None = None) -> Any:
    """A field that is a positional argument of the command."""
    return field(metadata={"info": typer.Argument(help=help, metavar=metavar, show_default=False)})


def option(default: Any = MISSING, help: str = "", *, name: str | None = None, unset: str | None = None, split: str = "") -> Any:
    """A field that is an option of the command: `--name`, by default the field's name.

    `unset`: shown in the help instead of the default. `split`: the separator of a tuple given as one string; without it, the option of a
    tuple may be repeated.
    """
    shown = unset if unset is not None else default is not MISSING
    info = typer.Option(*([name] if name else []), help=help, show_default=shown)
    return field(default=default, metadata={"info": info, "split": split})


def takes(options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the declared fields of a dataclass to a command's parameters. The command receives their values as one mapping, then its own
    parameters."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        fields = sorted(dataclasses.fields(options), key=lambda item: item.name not in options.__annotations__)  # inherited ones last
        declared = {item.name: item for item in fields if "info" in item.metadata}
        hints = get_type_hints(options)
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [_parameter(item, hints[name]) for name, item in declared.items()]

        @functools.wraps(command)
        def called(**values: Any) -> None:
            given = {name: _read(item, hints[name], values.pop(name)) for name, item in declared.items()}
            command(given, **values)

        every = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*parameters, *own)]
        called.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined] # typer reads it
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        return called

    return decorate


def _is_tuple(hint: Any) -> bool:
    return get_origin(hint) is tuple and get_args(hint)[-1:] == (...,)


def _parameter(item: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if item.default is MISSING else item.default
    if _is_tuple(hint):
        hint = str if item.metadata["split"] else list[get_args(hint)[0]] | None  # type: ignore[misc]
        default = default if default is inspect.Parameter.empty else None
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, item.metadata["info"]])


def _read(item: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    if not _is_tuple(hint):
        return value
    if split := item.metadata["split"]:
        return tuple(part.strip() for part in value.split(split))
    return tuple(value or ())


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The options that `megafork eval` and `megafork analyze` share."""

    template: str = option("paper", "paper, qwen, chat (the tokenizer's), plain, or a text with {prompt}.")
    columns: str = option("", "Column of each field, as {prompt: problem, answer: gold}.", unset="by name")
    chat_template_args: str = option("", "Variables of the chat template, as {enable_thinking: false}.", unset="none")
    add_bos: str = option("auto", "auto (as the tokenizer begins raw text), true or false.")
    max_tokens: int | None = option(None, "Maximum tokens in a response.", unset="20480, or as many as the model's positions allow")
    limit: int | None = option(None, "Use only the first N prompts of each source.", unset="all")
    seed: int = option(1, "Seed of every random number.")
    ranks: int | None = option(None, "Processes that share the work; ignored under torchrun and Slurm.", unset="one per GPU")
    dtype: str | None = option(None, "fp32 or bf16.", unset="from config.json")
    kv_cache_mb: int | None = option(None, "KV cache per engine in MiB.", unset="sized to the GPU, or 256")

    def __post_init__(self) -> None:
        self.check_counts("max_tokens", "limit", "ranks")
        for name, value, least, most in (("seed", self.seed, 0, LARGEST_SEED), ("kv-cache-mb", self.kv_cache_mb, 1, MOST_MEGABYTES)):
            if value is not None and not least <= value <= most:
                raise RecipeError(f"--{name} is {value}: must be from {least} to {most}")
        if self.dtype not in (None, "fp32", "bf16"):
            raise RecipeError(f"--dtype is {self.dtype!r}: must be fp32 or bf16")

    def check_counts(self, *names: str) -> None:
        """Raise RecipeError for one of these options that is given and below 1."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"--{name.replace('_', '-')} is {value}: must be at least 1")
