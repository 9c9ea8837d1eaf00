"""A function that a recipe names: a built-in one, or the user's own as FILE.py:FUNCTION."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from megafork.recipe import RecipeError
from megafork.user_code import import_file, name_problem, split

F = TypeVar("F", bound=Callable[..., Any])


def function_named(key: str, name: str, built_in: Mapping[str, F]) -> F:
    """The function that `key` names; a user's file is imported anew. Raises RecipeError."""
    if problem := name_problem(name, built_in):
        raise RecipeError(f"{key} is {name!r}: {problem}")
    if name in built_in:
        return built_in[name]
    file, function = split(name)
    try:
        found = getattr(import_file(file, f"megafork_{key.rpartition('.')[2]}"), function, None)
    except Exception as error:  # noqa: BLE001 - whatever the user's own file raises
        raise RecipeError(f"{key} is {name!r}: the file cannot be imported ({type(error).__name__}: {error}); fix it") from None
    if not callable(found):
        raise RecipeError(f"{key} is {name!r}: {file} defines no function {function!r}; name one that it has")
    return found


def tried(key: str, name: str, call: Callable[[], Any]) -> Any:
    """What the function that `key` names returns for made-up tokens. Raises RecipeError if it raises anything."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - whatever the user's own function raises
        raise RecipeError(f"{key} is {name!r}: its function raised {type(error).__name__}: {error}; fix it") from None
