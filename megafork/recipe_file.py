"""Reading a recipe: the YAML file, the recipes it `extends:`, overrides from the command line, and errors in plain words.

`extends:` names a base recipe that is read first, relative to the extending file; overrides (`section.key=value`) come last.
Unknown keys are refused, and the nearest known key is suggested. `recipe_yaml.py` parses the YAML.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from megafork.did_you_mean import did_you_mean
from megafork.recipe import Data, Key, Recipe, RecipeError
from megafork.recipe.kinds import MOST, limit, shown
from megafork.recipe_yaml import is_mapping, is_section, kind_of, parse, parse_value

if TYPE_CHECKING:
    from megafork.options import SampleOptions

_LARGEST = 1 << 20
"""Bytes of a recipe file."""
_LONGEST_CHAIN = 32
"""Recipes that extend each other."""


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, the recipes it extends, and `section.key=value` overrides. Raises RecipeError."""
    values = _read(Path(path), seen=())
    for override in overrides or []:
        _apply(values, override)
    return _validate(values)


def data_of_options(source: str, max_prompt_length: int, template: str, options: SampleOptions) -> Data:
    """The section `data` from the options of `megafork eval` and `analyze`; mappings are YAML text. Raises RecipeError."""
    data: dict[str, Any] = {"train": source, "template": template, "max_prompt_length": max_prompt_length}
    values: dict[str, Any] = {"model": {"path": "given apart"}, "data": data}
    for key in ("columns", "chat_template_args", "add_bos"):
        if text := getattr(options, key):
            _apply(values, f"data.{key}={text}")
    return _validate(values).data


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    text, path = _text(path, f", which {seen[-1].name} extends," if seen else "")
    if path in seen:
        raise RecipeError(f"extends: {path.name} extends itself through {seen[-1].name}: break the cycle")
    if len(seen) == _LONGEST_CHAIN:
        raise RecipeError(f"extends: {seen[0].name} extends a chain of more than {_LONGEST_CHAIN} recipes: join some of them")
    try:
        values = parse(text) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path.name!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path.name!r} holds {type(values).__name__}: it must be sections such as `model:` with keys below them")
    base = values.pop("extends", None)
    sections = {name: {} if inner is None else inner for name, inner in values.items()}
    if base is None:
        return sections
    if not isinstance(base, str):
        raise RecipeError(f"extends is {shown(base)}: give one recipe's path, relative to {path.name!r}")
    return _merge(_read(path.parent / base, (*seen, path)), sections)


def _text(path: Path, by: str) -> tuple[str, Path]:
    """The file's text, and its resolved path."""
    try:
        path = path.expanduser().resolve()
        if path.exists() and not path.is_file():  # reading a pipe or a device might never end
            raise IsADirectoryError
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise RecipeError(f"recipe {path.name!r}{by} is larger than {_LARGEST >> 20} MiB: give the path of a .yaml file")
        return data.decode("utf-8-sig"), path
    except FileNotFoundError:
        raise RecipeError(f"recipe {shown(str(path))}{by} does not exist: give the path of a .yaml file") from None
    except RecipeError:
        raise
    except (OSError, ValueError, RuntimeError):  # not text, a NUL in the name, a loop of links, a name too long
        raise RecipeError(f"recipe {shown(str(path))}{by} is not a readable text file: give the path of a .yaml file") from None


def _merge(base: dict[str, Any], over: dict[str, Any], section: str | None = None) -> dict[str, Any]:
    """Merge key by key in each section, and in sections inside a `section` (`loss.kl`); lists and free mappings are replaced."""
    merged = dict(base)
    for name, inner in over.items():
        old, holds_keys = merged.get(name), section is None or is_section(kind_of(section, name))
        if holds_keys and isinstance(old, dict) and isinstance(inner, dict):
            inner = _merge(old, inner, section or str(name))
        merged[name] = inner
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.partition(".")
    if not equals or not dot or not key:
        raise RecipeError(f"override {override!r} is not of the form section.key=value, for example train.steps=5")
    try:
        value = parse_value(text, section, key)
    except yaml.YAMLError:
        value = text
    mapping, dot, entry = key.partition(".")
    names = [section, mapping, entry] if dot and is_mapping(kind_of(section, mapping)) else [section, key]
    for name in names[:-1]:  # data.columns.prompt=problem sets one entry of a mapping
        if values.get(name) is None:  # absent, or unset as in a run's recipe.yaml
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            raise RecipeError(f"{name} is {shown(values)}: it must be a section with keys below it")
    values[names[-1]] = value


def _validate(values: dict[str, Any]) -> Recipe:
    _refuse_unknown(values)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        told = list(dict.fromkeys(_explain(item) for item in error.errors()))
        raise RecipeError(*(part for n, parts in enumerate(told) for part in (*(("; ",) if n else ()), *parts))) from None


def _refuse_unknown(values: dict[str, Any]) -> None:
    for section, inner in values.items():
        if section not in Recipe.model_fields:
            raise RecipeError(f"unknown section {section!r}{_nearest(str(section), Recipe.model_fields)}")
        if not isinstance(inner, dict):
            raise RecipeError(f"{section} is {shown(inner)}: it must be a section with keys below it")
        for key, value in inner.items():
            if key not in _keys(section):
                raise RecipeError(f"unknown key {section}.{key} = {shown(value)}{_nearest(str(key), _keys(section))}")


def _keys(section: str) -> dict[str, Any]:
    return Recipe.model_fields[section].annotation.model_fields  # type: ignore[union-attr]


def _nearest(name: str, known: Iterable[str]) -> str:
    return ": " + did_you_mean(name, known, f"known are {', '.join(known)}")


def _explain(item: Any) -> tuple[str, ...]:
    """A pydantic error in plain words, as the parts of a RecipeError."""
    if item["type"] == "value_error":
        return tuple(item["ctx"]["error"].args)
    section, *rest = (str(part) for part in item["loc"])
    if not rest:
        return (f"{section} is missing: add the section to the recipe",)
    keys, wanted = [section], Recipe.model_json_schema()["properties"][section]
    while len(keys) <= len(rest) and (part := rest[len(keys) - 1]) in (inner := _keys_in(wanted)):
        keys, wanted = [*keys, part], inner[part]
    field, whole = ".".join(keys), len(keys) == len(item["loc"])
    if item["type"] == "extra_forbidden":
        return (f"unknown key {field}.{rest[-1]} = {shown(item['input'])}{_nearest(rest[-1], list(_keys_in(wanted)))}",)
    if item["type"] == "missing" and whole:
        return (f"{field} is missing: add it to the recipe or give {field}=...",)
    finite = " (a finite one)" if item["type"] == "finite_number" else ""
    return Key(field), f" is {shown(item['input'])}: must be {_wanted(wanted)}{finite}"


def _keys_in(schema: dict[str, Any]) -> dict[str, Any]:
    """The keys of a section by its JSON schema, {} of what is none."""
    for option in schema.get("anyOf", [schema]):
        if "$ref" in option:
            return dict(Recipe.model_json_schema()["$defs"][option["$ref"].rpartition("/")[2]]["properties"])
    return {}


def _wanted(schema: dict[str, Any]) -> str:
    """The values that a JSON schema allows, such as `a number, above 0 and at most 1`."""
    if "anyOf" in schema:
        return " or ".join(_wanted(option) for option in schema["anyOf"])
    if "$ref" in schema:
        return f"a mapping with {', '.join(_keys_in(schema))}"
    if "const" in schema:
        return str(schema["const"])
    if "propertyNames" in schema:
        return f"a mapping of {' or '.join(schema['propertyNames']['enum'])} to {_wanted(schema['additionalProperties'])}"
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if "prefixItems" in schema:
        items = [_wanted(item) for item in schema["prefixItems"]]
        return f"a list of {len(items)}" + (f", each {items[0]}" if len(set(items)) == 1 else f" ({'; '.join(items)})")
    if schema.get("type") == "array":
        return f"a list{' of at least 1' if schema.get('minItems') else ''}, each {_wanted(schema['items'])}"
    kinds = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "null": "null",
        "object": "a mapping",
    }
    words = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    bounds = [f"{word} {limit(schema[key])}" for key, word in words.items() if schema.get(key, MOST) != MOST]
    return kinds[schema["type"]] + (", " + " and ".join(bounds) if bounds else "")
