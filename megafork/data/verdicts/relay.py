"""What verifier processes print, brought to this process's stderr as text alone."""

from __future__ import annotations

import sys
from typing import IO

_MOST_BYTES = 1 << 20


def relay(messages: IO[bytes]) -> None:
    """Until the other end closes. A response may have written them: nothing that moves a terminal's cursor, and no more than 1 MB."""
    left = _MOST_BYTES
    with messages:
        while part := messages.read1(65536):  # type: ignore[attr-defined]
            text = part[:left].decode(errors="replace")
            left -= len(part[:left])
            if text:
                sys.stderr.write("".join(character if character.isprintable() or character in "\n\t" else "?" for character in text))
