"""Building blocks of recipes: number types, strict sections, and the error for wrong input."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _number(value: Any) -> Any:
    """Accept a number given as text: YAML reads 1e-6, without a dot, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


_from_text = BeforeValidator(_number)
Number = Annotated[float, _from_text]
Fraction = Annotated[float, Field(gt=0.0, le=1.0), _from_text]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0), _from_text]
AtMostOne = Annotated[float, Field(ge=0.0, le=1.0), _from_text]
AtLeastOne = Annotated[float, Field(ge=1.0), _from_text]
InsideOne = Annotated[float, Field(gt=0.0, lt=1.0), _from_text]
AboveOne = Annotated[float, Field(gt=1.0), _from_text]
Positive = Annotated[float, Field(gt=0.0), _from_text]
NonNegative = Annotated[float, Field(ge=0.0), _from_text]
Temperature = Annotated[float, Field(ge=0.01, le=100.0), _from_text]  # vLLM raises lower temperatures to 0.01
MOST = 2**31 - 1
"""The largest whole number of any key without a more specific limit."""
Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=MOST)]
LARGEST_SEED = 2**63 - 1
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Ranks = Annotated[int, Field(ge=1, le=1 << 16)]
Tokens = Annotated[int, Field(ge=1, le=1 << 24)]
MOST_MEGABYTES = 1 << 24
Megabytes = Annotated[int, Field(ge=1, le=MOST_MEGABYTES)]
Seconds = Annotated[float, Field(gt=0.0, le=31_536_000.0), _from_text]


class Key(str):
    """A recipe's key in an error message. A command without a recipe replaces it by its own option: see `calling`."""


class RecipeError(ValueError):
    """The input is wrong; exit code 2. The parts form one line: the field (a `Key` if commands call it differently), its value, and the
    fix."""

    def __init__(self, *parts: str) -> None:
        super().__init__(*parts)

    def __str__(self) -> str:
        return "".join(self.args)


@contextmanager
def calling(names: Mapping[str, str]) -> Iterator[None]:
    """Replace the keys that errors name by a command's own options: `{"rollout.tp": "--tp"}`."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(*(names.get(part, part) if isinstance(part, Key) else part for part in error.args)) from None


def limit(bound: float) -> str:
    """A bound in plain notation: 1, not 1.0."""
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"


def shown(value: Any) -> str:
    """A value as YAML or Python writes it, shortened if long."""
    written = json.dumps(value) if isinstance(value, bool | None) else repr(value)
    return written if len(written) <= 200 else f"{written[:100]}...{written[-20:]}"


class Section(BaseModel):
    """A strict, immutable section: unknown keys and wrong types (true for 1, "5" for 5, NaN) are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
