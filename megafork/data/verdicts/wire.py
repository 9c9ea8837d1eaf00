"""What the trainer and a verifier process say to each other: items one way, verdicts the other, on two sockets of their own.

Items, the trainer's own data, are pickled behind their length. A verdict is plain data of a fixed form in one datagram of a socket that
keeps datagrams apart, so that half a message, a doubled one or a huge one is wrong by itself and shifts no other. It carries the number of
its item, 16 random bytes; a datagram without it is passed over.
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
"""Of a verifier that is loaded; of a judge that is late, or gone."""
NUMBER_BYTES = 16
_LENGTH = struct.Struct(">Q")
_VERDICT = struct.Struct(f">{NUMBER_BYTES}sd?")
_ERROR_CHARACTERS = 300
LONGEST = _VERDICT.size + 4 * _ERROR_CHARACTERS  # UTF-8


class Plain(NamedTuple):
    """A verdict as it travels. `error` is one printable line, empty for none; with it the accuracy is 0. `last`: the judge then leaves."""

    accuracy: float
    error: str = ""
    last: bool = False


def how_it_ended(code: int) -> str:
    """Of a process, by its exit code; below 0 the signal that ended it."""
    return f"the verifier process died of {signal.Signals(-code).name}" if code < 0 else f"the verifier process ended with exit code {code}"


def new_number() -> bytes:
    return secrets.token_bytes(NUMBER_BYTES)


def datagram_sockets() -> tuple[socket.socket, socket.socket]:
    """Two ends that keep datagrams apart and say when the other end has gone."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send_word(end: socket.socket, text: str) -> None:
    end.send(one_line(text).encode(errors="replace") or b" ")  # an empty datagram would read as the end


def receive_word(end: socket.socket, deadline: float) -> str:
    """Raises TimeoutError at `deadline` (of time.monotonic), EOFError or OSError if the other end is gone."""
    end.settimeout(_left(deadline))
    message = end.recv(LONGEST)
    if not message:
        raise EOFError
    return one_line(message.decode(errors="replace"))


def send_item(items: socket.socket, number: bytes, response: str, row: dict[str, Any], deadline: float) -> None:
    """Raises TimeoutError at `deadline` (of time.monotonic), with an unknown part of the item sent; OSError if the other end is gone."""
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
    """None for a datagram that is not this item's verdict."""
    if not _VERDICT.size <= len(message) <= LONGEST:
        return None
    found, accuracy, last = _VERDICT.unpack_from(message)
    error = one_line(message[_VERDICT.size :].decode(errors="replace"))
    if not secrets.compare_digest(found, number) or not 0.0 <= accuracy <= 1.0 or (error and accuracy):
        return None
    return Plain(accuracy, error, last)


def one_line(text: str) -> str:
    """At most 300 printable characters: what a verifier says may have been written by a model, and ends in terminals and logs."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(text[:4000].split()))[:_ERROR_CHARACTERS]


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
