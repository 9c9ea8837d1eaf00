"""The protocol between the trainer and a verifier process: items one way, verdicts the other, on separate sockets.

Items, the trainer's own data, are pickled and prefixed with their length. A verdict is plain data of a fixed form in one datagram, so that
a truncated, duplicated or oversized message is invalid by itself and never shifts the next. It carries its item's number, 16 random bytes;
datagrams without it are ignored.
"""

from __future__ import annotations

import pickle
import secrets
import signal
import socket
import struct
import time
from io import BufferedReader
from typing import Any, NamedTuple

READY, STUCK, ENDED = "ready", "stuck", "ended"
"""States: a verifier is loaded; a judge is late, or gone."""
NUMBER_BYTES = 16
_LENGTH = struct.Struct(">Q")
_VERDICT = struct.Struct(f">{NUMBER_BYTES}sd?")
_ERROR_CHARACTERS = 300
LONGEST = _VERDICT.size + 4 * _ERROR_CHARACTERS  # UTF-8


class Plain(NamedTuple):
    """A verdict on the wire. `error` is one printable line, "" for none; with it the accuracy is 0. `last`: the judge exits after it."""

    accuracy: float
    error: str = ""
    last: bool = False


def how_it_ended(code: int) -> str:
    """Describe a process's exit code; a negative one is the signal that ended it."""
    return f"the verifier process died of {signal.Signals(-code).name}" if code < 0 else f"the verifier process ended with exit code {code}"


def new_number() -> bytes:
    return secrets.token_bytes(NUMBER_BYTES)


def datagram_sockets() -> tuple[socket.socket, socket.socket]:
    """A pair of sockets that keep message boundaries and report when the other end closes."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send_word(end: socket.socket, text: str) -> None:
    end.send(one_line(text).encode(errors="replace") or b" ")  # an empty datagram would read as end of file


def receive_word(end: socket.socket, deadline: float) -> str:
    """Receive one word. Raises TimeoutError at `deadline` (of time.monotonic), EOFError or OSError if the other end is gone."""
    end.settimeout(_left(deadline))
    message = end.recv(LONGEST)
    if not message:
        raise EOFError
    return one_line(message.decode(errors="replace"))


def send_item(items: socket.socket, number: bytes, response: str, row: dict[str, Any], deadline: float) -> None:
    """Send an item. Raises TimeoutError at `deadline` (of time.monotonic), with the item partly sent; OSError if the other end is gone."""
    data = pickle.dumps((response, row))
    items.settimeout(_left(deadline))
    items.sendall(_LENGTH.pack(len(data)) + number + data)


def receive_item(items: BufferedReader) -> tuple[bytes, str, dict[str, Any]] | None:
    """(number, response, row); None when the trainer has closed its end."""
    head = items.read(_LENGTH.size + NUMBER_BYTES)
    if len(head) < _LENGTH.size + NUMBER_BYTES:
        return None
    length, number = _LENGTH.unpack(head[: _LENGTH.size])[0], head[_LENGTH.size :]
    data = items.read(length)
    return (number, *pickle.loads(data)) if len(data) == length else None


def send_verdict(verdicts: socket.socket, number: bytes, verdict: Plain) -> None:
    verdicts.send(pack(number, verdict))


def receive_verdict(verdicts: socket.socket, number: bytes, deadline: float) -> Plain:
    """The verdict with that number. Raises TimeoutError at `deadline`, EOFError or OSError if the other end is gone."""
    while True:
        verdicts.settimeout(_left(deadline))
        message = verdicts.recv(LONGEST + 1)
        if not message:
            raise EOFError
        verdict = unpack(message, number)
        if verdict is not None:
            return verdict


def pack(number: bytes, verdict: Plain) -> bytes:
    return _VERDICT.pack(number, verdict.accuracy, verdict.last) + one_line(verdict.error).encode(errors="replace")


def unpack(message: bytes, number: bytes) -> Plain | None:
    """Decode a verdict; None if the datagram is not a verdict on this item."""
    if not _VERDICT.size <= len(message) <= LONGEST:
        return None
    found, accuracy, last = _VERDICT.unpack_from(message)
    error = one_line(message[_VERDICT.size :].decode(errors="replace"))
    if not secrets.compare_digest(found, number) or not 0.0 <= accuracy <= 1.0 or (error and accuracy):
        return None
    return Plain(accuracy, error, last)


def one_line(text: str) -> str:
    """Reduce text to at most 300 printable characters: a model may have written it, and it is shown in terminals and logs."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text[:4000].split()))[:_ERROR_CHARACTERS]


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
