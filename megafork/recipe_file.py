"""Reading a recipe: the YAML file, the recipes it `extends:`, overrides from the command line, and what is wrong in plain words.

`extends:` names a base recipe that is read first, relative to the file it stands in; overrides (`section.key=value`) come last.
Unknown keys are refused and the nearest known key is named.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Hashable
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from megafork.recipe import Recipe, RecipeError


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, the recipes it extends, and `section.key=value` overrides. Raises RecipeError."""
    values = _read(Path(path), seen=())
    for override in overrides or []:
        _apply(values, override)
    return _validate(values)


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice!r} is given twice, {str(node.start_mark).strip()}")
        return super().construct_mapping(node, deep)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise RecipeError(f"extends: {path.name} extends itself by way of {seen[-1].name}: break the circle")
    by = f", which {seen[-1].name} extends," if seen else ""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        raise RecipeError(f"recipe {str(path)!r}{by} does not exist: give the path of a .yaml file") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError, UnicodeDecodeError):
        raise RecipeError(f"recipe {str(path)!r}{by} is not a readable text file: give the path of a .yaml file") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path.name!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path.name!r} holds {type(values).__name__}: it must be sections such as `model:` with keys below them")
    base = values.pop("extends", None)
    sections = {name: {} if inner is None else inner for name, inner in values.items()}
    if base is None:
        return sections
    if not isinstance(base, str):
        raise RecipeError(f"extends is {base!r}: give one recipe's path, relative to {path.name!r}")
    return _merge(_read(path.parent / base, (*seen, path)), sections)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Key by key in each section; lists are replaced."""
    merged = dict(base)
    for name, inner in over.items():
        old = merged.get(name)
        merged[name] = {**old, **inner} if isinstance(old, dict) and isinstance(inner, dict) else inner
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.partition(".")
    if not equals or not dot or not key:
        raise RecipeError(f"override {override!r} is not of the form section.key=value, for example train.steps=5")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        value = text
    if value is not None and _takes_text(section, key) and not isinstance(value, str):
        value = text  # data.template={prompt} is no mapping, run.name=7 no number
    inner = values.setdefault(section, {})
    if not isinstance(inner, dict):
        raise RecipeError(f"{section} is {inner!r}: it must be a section with keys below it")
    inner[key] = value


def _takes_text(section: str, key: str) -> bool:
    known = Recipe.model_fields.get(section)
    field = known and _keys(section).get(key)
    if field is None:
        return False
    kinds = get_args(field.annotation) if get_origin(field.annotation) is UnionType else (field.annotation,)
    return str in kinds


def _validate(values: dict[str, Any]) -> Recipe:
    _refuse_unknown(values)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("; ".join(dict.fromkeys(_explain(item) for item in error.errors()))) from None


def _refuse_unknown(values: dict[str, Any]) -> None:
    for section, inner in values.items():
        if section not in Recipe.model_fields:
            raise RecipeError(f"unknown section {section!r}{_nearest(str(section), list(Recipe.model_fields))}")
        if not isinstance(inner, dict):
            raise RecipeError(f"{section} is {inner!r}: it must be a section with keys below it")
        for key, value in inner.items():
            if key not in _keys(section):
                raise RecipeError(f"unknown key {section}.{key} = {value!r}{_nearest(str(key), list(_keys(section)))}")


def _keys(section: str) -> dict[str, Any]:
    return Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f": known are {', '.join(known)}"


def _explain(item: Any) -> str:
    """One of pydantic's errors in plain words."""
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    section, *rest = (str(part) for part in item["loc"])
    if not rest:
        return f"{section} is missing: add the section to the recipe"
    field = ".".join((section, rest[0]))
    if item["type"] == "missing" and len(rest) == 1:
        return f"{field} is missing: add it to the recipe or give {field}=..."
    schema = Recipe.model_json_schema()
    wanted = schema["$defs"][Recipe.model_fields[section].annotation.__name__]["properties"][rest[0]]  # type: ignore[union-attr]
    value = json.dumps(item["input"]) if isinstance(item["input"], bool | None) else repr(item["input"])
    return f"{field} is {value}: must be {_wanted(wanted)}"


def _wanted(schema: dict[str, Any]) -> str:
    """What a JSON schema asks for, such as `a number above 0 and at most 1`."""
    if "anyOf" in schema:
        return " or ".join(_wanted(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if "prefixItems" in schema:
        items = [_wanted(item) for item in schema["prefixItems"]]
        return f"a list of {len(items)}" + (f", each {items[0]}" if len(set(items)) == 1 else f" ({'; '.join(items)})")
    if schema.get("type") == "array":
        return f"a list, each {_wanted(schema['items'])}"
    kinds = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text", "null": "null"}
    words = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    bounds = [f"{word} {schema[key]:g}" for key, word in words.items() if key in schema]
    return kinds[schema["type"]] + (", " + " and ".join(bounds) if bounds else "")
