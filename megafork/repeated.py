"""Finds what is given twice, in names that users write."""

from __future__ import annotations

from collections.abc import Sequence


def repeated(names: Sequence[str]) -> str | None:
    """The first name that is there more than once; None if there is none."""
    if len(set(names)) == len(names):
        return None
    return next(name for name in names if names.count(name) > 1)
