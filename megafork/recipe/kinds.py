"""What recipes are made of: kinds of numbers, strict sections, and the error that a wrong one raises."""

from __future__ import annotations

import json
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
SEEDS = range(2**63)
Seed = Annotated[int, Field(ge=0, le=SEEDS.stop - 1)]
Ranks = Annotated[int, Field(ge=1, le=1 << 16)]
Tokens = Annotated[int, Field(ge=1, le=1 << 24)]
MEGABYTES = range(1, (1 << 24) + 1)
Megabytes = Annotated[int, Field(ge=1, le=MEGABYTES.stop - 1)]
Seconds = Annotated[float, Field(gt=0.0, le=31_536_000.0), _from_text]


class RecipeError(ValueError):
    """The input of a run is wrong. The message is one line: field, value, and how to mend it. Exit code 2."""


def check_option(name: str, value: int | None, allowed: range) -> None:
    """Refuse what is not in the range of the recipe's key of that kind. Raises RecipeError."""
    if value is not None and value not in allowed:
        raise RecipeError(f"--{name} is {value}: must be from {allowed.start} to {allowed.stop - 1}")


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
