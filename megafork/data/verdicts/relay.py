"""Copies the output of verifier processes to this process's stderr, as plain text."""

from __future__ import annotations

import sys
from typing import IO

_MOST_BYTES = 1 << 20


def relay(messages: IO[bytes]) -> None:
    """Copy messages until the other end closes. A response may have written them, so unprintable characters become `?`, and at most 1 MB
    passes."""
    left = _MOST_BYTES
    with messages:
        while part := messages.read1(65536):  # type: ignore[attr-defined]
            text = part[:left].decode(errors="replace")
            left -= len(part[:left])
            if text:
                sys.stderr.write("".join(character if character.isprintable() or character in "\n\t" else "?" for character in text))
