"""What recipes are made of: kinds of numbers, strict sections, and the error that a wrong one raises."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _number(value: Any) -> Any:
    """YAML reads 1e-6, without a dot, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


_from_text = BeforeValidator(_number)
Fraction = Annotated[float, Field(gt=0.0, le=1.0), _from_text]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0), _from_text]
AboveOne = Annotated[float, Field(gt=1.0), _from_text]
Positive = Annotated[float, Field(gt=0.0), _from_text]
NonNegative = Annotated[float, Field(ge=0.0), _from_text]
Temperature = Annotated[float, Field(ge=0.01, le=100.0), _from_text]  # vLLM takes what is lower for 0.01
MOST = 2**31 - 1
"""The largest whole number of any key that names no limit of its own."""
Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Ranks = Annotated[int, Field(ge=1, le=1 << 16)]
Tokens = Annotated[int, Field(ge=1, le=1 << 24)]
Megabytes = Annotated[int, Field(ge=1, le=1 << 24)]
Seconds = Annotated[float, Field(gt=0.0, le=31_536_000.0), _from_text]


class Key(str):
    """A recipe's key in the message of an error. A command without a recipe shows its own option in its place: `calling`."""


class RecipeError(ValueError):
    """The input is wrong; exit code 2. The parts join to one line: the field (a `Key` where commands call it differently), its value, and
    the fix."""

    def __init__(self, *parts: str) -> None:
        super().__init__(*parts)

    def __str__(self) -> str:
        return "".join(self.args)


@contextmanager
def calling(names: Mapping[str, str]) -> Iterator[None]:
    """What a command without a recipe calls the keys that errors name: `{"rollout.tp": "--tp"}`."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(*(names.get(part, part) if isinstance(part, Key) else part for part in error.args)) from None


def limit(bound: float) -> str:
    """A bound as people write it."""
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"


def shown(value: Any) -> str:
    """As YAML or Python writes it, cut where nobody reads on."""
    written = json.dumps(value) if isinstance(value, bool | None) else repr(value)
    return written if len(written) <= 200 else f"{written[:100]}...{written[-20:]}"


class Section(BaseModel):
    """A strict section: unknown keys and wrong types (true for 1, "5" for 5, NaN) are errors, and it never changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
