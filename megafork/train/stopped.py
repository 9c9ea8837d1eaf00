"""The planned end of a run before its last step."""

from __future__ import annotations


class Stopped(RuntimeError):
    """A run ends before its last step, for a reason that needs no traceback. The same command continues it."""
