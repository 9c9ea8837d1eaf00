"""Which cases of a slow test `make test-fast` runs as well."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def by_speed(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Parameters of a test: those that are not quick are marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
