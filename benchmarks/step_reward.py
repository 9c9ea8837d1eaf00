"""A reward that costs nothing and differs within most groups, so that every response has an advantage."""

from typing import Any


def score(response: str, row: dict[str, Any]) -> float:
    return float(len(response) % 2)
