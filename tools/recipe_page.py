"""docs/recipes.md: every key of a recipe, from its declaration. Run it after a change in `megafork/recipe/`; a test compares."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types
from pydantic import BaseModel, JsonValue
from pydantic.fields import FieldInfo

from megafork.recipe import Recipe
from megafork.recipe.kinds import MOST, limit

PAGE = Path(__file__).resolve().parent.parent / "docs/recipes.md"
_INTRODUCTION = """# Recipes

A recipe is one YAML file that specifies a whole run. It consists of sections; every key of every section is listed below, with its type,
default and meaning. Unknown keys, wrong types and contradictory sections are rejected with a one-line error before anything starts.

```bash
megafork train my.yaml                                  # a recipe
megafork train my.yaml train.steps=200 parallel.tp=4    # with overrides: section.key=value, YAML values, the last one wins
```

`extends: base.yaml` at the top of a recipe inherits from another one, whose path is relative to this one; keys given here win. Paths inside
a recipe are relative to the folder in which the command runs. `null` unsets a key that is unset by default.
`runs/<name>/recipe.yaml` is the recipe with every default filled in.

This page is written by `python tools/recipe_page.py`.
"""


def render() -> str:
    sections = [_section(name, field) for name, field in Recipe.model_fields.items()]
    return "\n".join([_INTRODUCTION, *sections])


def _section(name: str, field: FieldInfo) -> str:
    model = field.annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    lines = [f"## {name}", ""]
    for key, item in model.model_fields.items():
        lines.append(_key(key, item))
        if isinstance(item.default, BaseModel):
            lines += [f"    {_key(inner, part)}" for inner, part in type(item.default).model_fields.items()]
    return "\n".join([*lines, ""])


def _key(key: str, item: FieldInfo) -> str:
    default = "**required**" if item.is_required() else "unset" if item.default is None else f"default `{_value(item.default)}`"
    what = "mapping" if isinstance(item.default, BaseModel) else f"{_type(item.annotation, item.metadata)}; {default}"
    return f"- **`{key}`** ({what}): {' '.join((item.description or '').split())}"


def _type(kind: Any, metadata: list[Any]) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _type(arguments[0], [*_flat(arguments[1:]), *metadata])
    if origin is Literal:
        return " / ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type(part, metadata) for part in arguments if part is not type(None))
    if origin in (tuple, list):
        parts = [_type(part, metadata) for part in arguments if part is not ...]
        return "list of " + (parts[0] if len(set(parts)) == 1 else "; ".join(parts))
    if origin is dict:
        return f"mapping of {_type(arguments[0], [])} to {_type(arguments[1], [])}"
    if kind is JsonValue:
        return "any value"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "mapping of " + ", ".join(f"`{key}` ({_type(item.annotation, item.metadata)})" for key, item in kind.model_fields.items())
    name = {int: "whole number", float: "number", str: "text", bool: "true or false"}[kind]
    return " ".join([name, *_bounds(metadata)])


def _flat(metadata: Any) -> list[Any]:
    return [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _bounds(metadata: list[Any]) -> list[str]:
    words = {annotated_types.Gt: ("above", "gt"), annotated_types.Ge: ("from", "ge")}
    words |= {annotated_types.Lt: ("below", "lt"), annotated_types.Le: ("up to", "le")}
    bounds = [(words[type(bound)][0], getattr(bound, words[type(bound)][1])) for bound in metadata if type(bound) in words]
    return [f"{word} {limit(value)}" for word, value in bounds if value != MOST]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_value, value))}]" if isinstance(value, tuple | list) else str(value)


if __name__ == "__main__":
    PAGE.write_text(render())
