"""Reads the config.json of a Hugging Face folder as strict JSON, and checks the type and range of each value."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megafork.recipe import Key, RecipeError
from megafork.repeated import repeated

ADAPTER = "adapter_config.json"
_SHOWN = 80
"""Maximum characters of a value quoted in an error."""


class Keys:
    """The keys of config.json, or of an object within it. Raises RecipeError, naming the key, for a value of the wrong type or range."""

    def __init__(self, values: Mapping[str, Any], folder: Path, within: str = "") -> None:
        self.values = values
        self.folder = folder
        self.within = within

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def inner(self, key: str) -> Keys:
        """The keys of the object under `key`; empty if the key is absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "must be an object with keys of its own")
        return Keys(value or {}, self.folder, f"{self.within}{key}.")

    def without_null(self, *keys: str) -> Keys:
        """The same keys, except that null for any of `keys` counts as absent."""
        return Keys({key: value for key, value in self.values.items() if value is not None or key not in keys}, self.folder, self.within)

    def whole(self, key: str, *, largest: int, default: int | None = None) -> int:
        """A whole number from 1 to `largest`."""
        value = self._value(key, default)
        if type(value) is not int or not 1 <= value <= largest:
            raise self.error(key, f"must be a whole number between 1 and {largest:,}")
        return value

    def number(self, key: str, *, above: float, below: float = 1e15, default: float | None = None) -> float:
        """A number strictly between `above` and `below`."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not above < value < below:
            raise self.error(key, f"must be a number above {above:g} and below {below:g}")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            raise self.error(key, "must be true or false")
        return value

    def text(self, key: str, *, among: Iterable[str]) -> str:
        value = self._value(key, None)
        if not isinstance(value, str) or value not in among:
            raise self.error(key, f"must be one of {', '.join(among)}")
        return value

    def error(self, key: str, must: str) -> RecipeError:
        shown = repr(self.values.get(key))
        shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
        name = f"{self.within}{key}"
        name = name if name.replace(".", "").isidentifier() else repr(name)
        return RecipeError(Key("model.path"), f" is {str(self.folder)!r}: its {name} is {shown}: {must}")

    def _value(self, key: str, default: Any) -> Any:
        if key not in self.values and default is None:
            raise RecipeError(Key("model.path"), f" is {str(self.folder)!r}: its config.json lacks {self.within + key!r}")
        return self.values.get(key, default)


def read_config(folder: Path) -> dict[str, Any]:
    """The keys of a folder's config.json. Raises RecipeError if the folder is not a model's or the file is not strict JSON."""
    named = (Key("model.path"), f" is {str(folder)!r}")
    file = folder / "config.json"
    if not os.path.isdir(folder):
        raise RecipeError(*named, ": no such folder; give a Hugging Face model folder")
    refuse_adapter(folder, *named)
    if not os.path.lexists(file):
        raise RecipeError(*named, ": it has no config.json; give a Hugging Face model folder")
    if not os.path.isfile(file):
        raise RecipeError(*named, ": its config.json is not a file; give a Hugging Face model folder")
    try:
        config = json.loads(file.read_bytes().decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except OSError as error:
        raise RecipeError(*named, f": its config.json cannot be read ({error.strerror})") from None
    except RecursionError:
        raise RecipeError(*named, ": its config.json is not valid JSON (objects within objects without end)") from None
    except ValueError as error:
        raise RecipeError(*named, f": its config.json is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise RecipeError(*named, f": its config.json holds a {type(config).__name__}, not a Hugging Face config")
    return config


def refuse_adapter(folder: Path, *named: str) -> None:
    """Refuse a folder that holds a LoRA adapter, which transformers would apply to the weights beside it or to the base model it names.

    Raises RecipeError. `named`: how the message names the folder.
    """
    if os.path.exists(folder / ADAPTER):
        raise RecipeError(
            *named,
            f", a LoRA adapter ({ADAPTER}): merge it into its base model first (peft's merge_and_unload), and give the merged "
            f"folder without {ADAPTER}",
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict. Raises ValueError for a duplicate key: JSON readers differ in which value they keep."""
    if (twice := repeated([name for name, _ in pairs])) is not None:
        raise ValueError(f"{twice!r} is given twice")
    return dict(pairs)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")
